"""A run that starts from big_vision's `.npz` checkpoint: staged once, trained, evaluated, merged."""

from __future__ import annotations

import importlib.util
import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from ftlib.config.loader import load_experiment
from ftlib.core.paths import find_site
from tests.cli.test_paligemma import plain_answers
from tests.conftest import FULL, LORA, read_lines, start_ftlib
from tests.models import literal_big_vision as literal
from tests.models.test_big_vision import TOKENIZER, arrays_of

Ftlib = Callable[..., tuple[int, str, str]]
WriteConfig = Callable[..., Path]


FORMS = ("float32", "float16", "bfloat16", "mixed")
RARER = [
    pytest.param(generation, form, LORA, before, marks=pytest.mark.long,
                 id=f"{generation}-{form}{'' if before else '-bare'}")
    for generation in (1, 2)
    for form in FORMS
    for before in ("params/", "")
]  # fmt: skip


def checkpoint(
    folder: Path, generation: int = 1, form: str = "float32", seed: int = 0, before: str = "params/"
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    arrays = arrays_of(generation)
    if seed:
        arrays["img/head/bias"] = arrays["img/head/bias"] + seed
    return literal.save_npz(folder / "tiny.npz", literal.in_form(arrays, form), before)


def base(npz: Path, tokenizer: Path | str = TOKENIZER) -> str:
    return f"{npz}, tokenizer: {tokenizer}"


@pytest.mark.parametrize(
    ("generation", "form", "adapter", "before_names"),
    [
        pytest.param(1, "mixed", LORA, "params/", id="1-lora"),
        pytest.param(2, "bfloat16", FULL, "params/", id="2-full"),
        *RARER,
    ],
)
def test_the_chain(
    generation: int,
    form: str,
    adapter: str,
    before_names: str,
    write_config: WriteConfig,
    store: Path,
    shared: Path,
    tmp_path: Path,
    ftlib: Ftlib,
) -> None:
    npz = checkpoint(tmp_path / "downloads", generation, form, before=before_names)
    config = write_config(adapter, base=base(npz), replace=("max_steps: 12", "max_steps: 2"))
    assert ftlib("prepare", config)[0] == 0
    code, _, error = ftlib("train", config)
    assert code == 2 and "not converted yet" in error and "jobs/run.sh ftlib stage CONFIG" in error
    code, _, error = ftlib("stage", config)
    assert code == 0, error
    [model] = (store / "models").iterdir()
    assert str(model) in error and "PaliGemma" in error
    record = json.loads((model / "big_vision.json").read_text())
    assert (record["checkpoint"], record["tokenizer"]) == ("tiny.npz", "tokenizer.model")
    assert record["dtypes"] == (["float16", "float32"] if form == "mixed" else [form])
    before = {path: path.stat().st_mtime_ns for path in model.iterdir()}
    assert ftlib("stage", config)[0] == 0
    assert {path: path.stat().st_mtime_ns for path in model.iterdir()} == before
    npz.unlink()  # what was converted is enough
    code, output, error = ftlib("train", config)
    assert code == 0, error
    run = Path(output.strip())
    assert ftlib("evaluate", "tiny", "--split", "test")[0] == 0
    folder = run / "eval" / "jsonl" / "test"
    records, untrained = (read_lines(folder / when / "predictions.jsonl") for when in ("after", "before"))
    found = [record["prediction"] for record in records]
    assert len(found) == 12 and any(found) and found != [record["prediction"] for record in untrained]
    result = run / ("adapter" if adapter == LORA else "model")
    ours = (model, result) if adapter == LORA else (result, None)
    assert [answer.strip() for answer in found] == plain_answers(*ours, shared / "data", records)
    assert "The base is converted from big_vision's tiny.npz (SHA-256 " in (result / "README.md").read_text()
    code, output, error = ftlib("report", "tiny")
    assert code == 0 and "s tiny.npz (SHA-256 " in Path(output.strip()).read_text(), error
    if adapter == LORA:
        merged = tmp_path / "merged"
        code, _, error = ftlib(
            "merge", "--base", model, "--model", run, "--method", "linear", "--dtype", "float32", "-o", merged
        )
        assert code == 0, error
        assert plain_answers(merged, None, shared / "data", records) == [answer.strip() for answer in found]


def test_a_run_is_named_by_content(write_config: WriteConfig, store: Path, tmp_path: Path, ftlib: Ftlib) -> None:
    def identity(npz: Path, tokenizer: Path = TOKENIZER) -> str:
        return load_experiment(write_config(base=base(npz, tokenizer)), [], find_site()).identity

    here = checkpoint(tmp_path / "here")
    first = identity(here)
    moved = tmp_path / "moved" / "renamed.npz"
    moved.parent.mkdir()
    shutil.copy(here, moved)
    shutil.copy(TOKENIZER, moved.with_suffix(".model"))
    assert identity(moved, moved.with_suffix(".model")) == first
    relative = write_config(base="here/tiny.npz, tokenizer: moved/renamed.model")
    assert load_experiment(relative, [], find_site()).identity == first
    assert identity(checkpoint(tmp_path / "other", seed=1)) != first
    other = tmp_path / "other.model"
    other.write_bytes(TOKENIZER.read_bytes() + b"\x9a\x01\x00")
    assert identity(here, other) != first
    here.unlink()
    assert identity(here) == first  # known since it was hashed
    checkpoint(tmp_path / "here", seed=2)
    assert identity(here) != first
    code, _, error = ftlib("stage", write_config(base=base(tmp_path / "never.npz")))
    assert code == 2 and "model.base" in error and "never.npz: no such file" in error


def test_the_light_install_says_where_to_convert(
    write_config: WriteConfig, store: Path, tmp_path: Path, ftlib: Ftlib, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_config(base=base(checkpoint(tmp_path / "downloads")))
    find = importlib.util.find_spec
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: None if name == "transformers" else find(name))
        code, _, error = ftlib("stage", config)
    assert code == 2 and "Run `jobs/run.sh ftlib stage CONFIG`" in error
    assert ftlib("stage", config)[0] == 0


@pytest.mark.parametrize(
    ("model", "told"),
    [
        ("/x/a.npz", "set model.tokenizer"),
        ("google/paligemma-3b-pt-224, tokenizer: /x/t.model", "tokenizer is only for an .npz base"),
        ("/x/a.npz, tokenizer: /x/folder/", "must be a .model file, a tokenizer.json or a hub name"),
        ("/x/a.npz, tokenizer: /x/t.model, revision: main", "no revision"),
        ("/x/a.npz, tokenizer: /x/t.model", "/x/a.npz: no such file"),
    ],
)
def test_mistakes_in_the_config(model: str, told: str, write_config: WriteConfig, store: Path, ftlib: Ftlib) -> None:
    code, _, error = ftlib("stage", write_config(base=model))
    assert code == 2 and told in error and "Traceback" not in error


def test_a_tokenizer_from_the_hub_cache(
    write_config: WriteConfig,
    store: Path,
    shared: Path,
    tmp_path: Path,
    ftlib: Ftlib,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setenv("HF_HUB_CACHE", str(cache))
    config = write_config(base=base(checkpoint(tmp_path / "downloads"), "google/tiny-paligemma"))
    code, _, error = ftlib("stage", config)
    assert code == 2 and "google/tiny-paligemma is neither in the store nor in the hub cache" in error
    repository, commit = cache / "models--google--tiny-paligemma", "5" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots" / commit).mkdir(parents=True)
    shutil.copy(TOKENIZER, repository / "snapshots" / commit)
    assert ftlib("stage", config)[0] == 0
    [model] = (store / "models").iterdir()
    assert json.loads((model / "big_vision.json").read_text())["tokenizer"] == "google/tiny-paligemma"


DIES = """
import os, signal, sys
from ftlib.models import big_vision
write, calls = big_vision._write_source, []
def deadly(*arguments):
    calls.append(0)
    if len(calls) == 20:
        os.kill(os.getpid(), signal.SIGKILL)
    write(*arguments)
big_vision._write_source = deadly
from ftlib.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_killed_conversion_leaves_nothing(
    write_config: WriteConfig, store: Path, tmp_path: Path, ftlib: Ftlib
) -> None:
    config = write_config(base=base(checkpoint(tmp_path / "downloads")))
    process = start_ftlib("stage", config, program=("-c", DIES))
    assert process.wait(timeout=300) == -signal.SIGKILL
    assert not list((store / "models").glob("*/COMPLETE.json"))
    assert ftlib("stage", config)[0] == 0
    [model] = (store / "models").iterdir()
    assert (model / "COMPLETE.json").is_file() and not list((store / "hf" / "staging").iterdir())
