"""Whatever stands in a config ends in a checked experiment or in plain words with file, line and key; and soon."""

from __future__ import annotations

import re
import typing
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ftlib.config import hf_fields, yaml12
from ftlib.config.loader import load_experiment, read_raw_config
from ftlib.config.schema import Config, Section
from ftlib.core.paths import Site
from ftlib.errors import UserError
from tests.conftest import LORA
from tests.limits import time_limit

Ftlib = Callable[..., tuple[int, str, str]]
SITE = Site(Path("/somewhere/store"), Path("/somewhere/runs"))

VALUES = {
    "long number": "1" * 5000,
    "long hexadecimal": "0x" + "f" * 5000,
    "negative": "-1" + "0" * 90,
    "minus one": "-1",
    "zero": "0",
    "32 bits": str(2**31),
    "64 bits": str(2**63),
    "overflow": "1e400",
    "huge exponent": "1e" + "9" * 5000,
    "huge": "1e300",
    "hugely negative": "-1e300",
    "tiny": "1e-320",
    "nan": ".nan",
    "infinite": ".inf",
    "null": "null",
    "boolean": "true",
    "fraction": "1.5",
    "empty": "''",
    "long text": "'" + "x" * 5000 + "'",
    "shell": "'\"$(x)`;<b>&|\\'",
    "nobody's home": "~no_such_user/x",
    "NUL": '"\\0"',
    "surrogate": '"\\ud800"',
    "brace": "'{'",
    "field": "'{nothing}'",
    "glob": "'[*'",
    "list": "[]",
    "deep": "[" * 40 + "1" + "]" * 40,
    "deeper": "[" * 60 + "1" + "]" * 60,
    "mixed list": "[null, 1, x]",
    "mapping": "{}",
    "mapping in mapping": "{a: {b: 1}}",
}


def _sections(annotation: object) -> Iterator[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for inner in typing.get_args(annotation):
        yield from _sections(inner)


def _keys(section: type[Section], above: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        yield f"{above}{name}"
        for inner in _sections(field.annotation):
            yield from _keys(inner, f"{above}{name}.")


KEYS = [
    *dict.fromkeys(_keys(Config)),
    *(f"training.{name}" for name in sorted(set(hf_fields.table()) - set(hf_fields.OWNED))),
    *(f"evaluation.generation.{name}" for name in hf_fields.FIELDS),
    *(f"job.sbatch.{name}" for name in ("comment", "nice", "exclusive", "licenses")),
    "model.chat_template_arguments.x",
]


@pytest.mark.parametrize("group", sorted({key.split(".")[0] for key in KEYS}))
def test_every_key_with_every_value(group: str, write_config: Callable[..., Path], tmp_path: Path) -> None:
    config, saved = write_config(LORA), tmp_path / "saved.yaml"
    for key in (key for key in KEYS if key.split(".")[0] == group):
        for value in VALUES.values():
            try:
                with time_limit():
                    experiment = load_experiment(config, [f"{key}={value}"], SITE, {})
            except UserError as error:
                assert "command line" in error.problem or "config.yaml" in error.problem, (key, value, error.problem)
                continue
            saved.write_text(experiment.to_yaml(), encoding="utf-8")
            assert load_experiment(saved, [], SITE, {}).config == experiment.config, (key, value)


@pytest.mark.parametrize(
    "value", ["long number", "overflow", "64 bits", "long text", "nobody's home", "surrogate", "deeper"]
)
@pytest.mark.parametrize(
    "key", ["seed", "name", "data.root", "training.max_steps", "job.cpus", "sweep.seed", "warm_start"]
)
def test_submit(store: Path, write_config: Callable[..., Path], ftlib: Ftlib, key: str, value: str) -> None:
    code, _, error = ftlib("submit", write_config(), f"{key}={VALUES[value]}", "--dry-run")
    assert code == 2 and "command line: " in error and "Traceback" not in error
    assert key in error and len(error) < 3000, error
    assert not store.exists()


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 26)
)


@pytest.mark.parametrize("command", ["prepare", "submit", "train", "stage"])
@pytest.mark.parametrize(
    ("added", "told"),
    [
        (BOMB, r"config.yaml:\d+: a\d[\d.]*: more than 100,000 values in one file"),
        ("sweep: {random: {count: 1000000000, draw: {seed: {uniform: [0, 1]}}}}\n", ""),
        ("sweep:\n" + "".join(f"  k{n}: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]\n" for n in range(10)), ""),
        ("x: " + "[" * 100_000, "config.yaml: not valid YAML: nested too deeply"),
        ("x: " + "[" * 60 + "]" * 60, r"config.yaml:\d+: x.0.0.0.0.…: nested more than 50 deep"),
        ("# " + "x" * 2**19, "config.yaml: more than 524,288 characters, too many for a config"),
    ],
    ids=["aliases", "draws", "grid", "brackets", "levels", "size"],
)
def test_small_files_that_stand_for_much(
    store: Path, write_config: Callable[..., Path], ftlib: Ftlib, command: str, added: str, told: str
) -> None:
    config = write_config()
    config.write_text(config.read_text() + added)
    if not told:
        told = "config.yaml:\\d+: sweep" if command == "submit" else "this config defines several runs"
    with time_limit():
        code, _, error = ftlib(command, config)
    assert code == 2
    assert re.search(told, error), error
    assert not store.exists()


def test_a_file_without_an_end() -> None:
    with time_limit(), pytest.raises(UserError, match="/dev/zero: "):
        read_raw_config(Path("/dev/zero"), [])


def test_a_key_without_an_end(write_config: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match=r"command line: .*: nested more than 50 deep"):
        read_raw_config(write_config(), [".".join("a" * 5000) + "=1"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: " + "1" * 5000, "f:1: a: a number of 5,000 digits; the maximum is 100"),
        ("b: [1, 0x" + "f" * 100 + "]", "f:1: b.1: a number of 102 digits; the maximum is 100"),
        ("a:\n  b: -1e400", "f:2: a.b: the number -1e400 is too large"),
        ("? [a]\n: 1", "f:1: a key must be text, got a list or mapping"),
        ("x: 1\n1: 2", "f:2: a key must be text, got 1"),
        ("~: 2", "f:1: a key must be text, got ~"),
        ('a: "\\ud800"', r"f:1: a: the character '\\ud800' cannot be written to a file"),
        ('"\\0": 1', r"f:1: the character '\\x00' cannot be written to a file"),
        ('a: "\\UFFFFFFFF"', "f: not valid YAML: "),
        ("a: !!int x", "f:1: a: 'x' is not a valid int"),
        ("a: !!bool x", "f:1: a: 'x' is not a valid bool"),
        ("a: !!float x", "f:1: a: 'x' is not a valid float"),
        ("a: !!binary aGk=", "f:1: not valid YAML: the tag 'tag:yaml.org,2002:binary' is not in the core schema"),
        ("a: !!set {b}", "f:1: not valid YAML: the tag"),
        ("a: &x {b: *x, c: *x}", "f:1: an alias that contains itself"),
    ],
)
def test_values_that_no_config_has(text: str, message: str) -> None:
    with time_limit(), pytest.raises(UserError, match=message):
        yaml12.load(text, "f")


def test_bounds_are_far_from_what_configs_need() -> None:
    shared = "x: &x [1, 2, 3]\n" + "".join(f"y{n}: *x\n" for n in range(1000))
    assert yaml12.load(shared, "f")[0]["y999"] == [1, 2, 3]
    assert yaml12.load("a: " + "9" * 100, "f")[0]["a"] == int("9" * 100)
    assert yaml12.load("a: [1e308, .inf, !!str 1, !!int 7]", "f")[0]["a"] == [1e308, float("inf"), "1", 7]
    nested = "[" * 49 + "]" * 49
    assert yaml12.load(f"a: {nested}", "f")[0]["a"]
