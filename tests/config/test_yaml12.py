"""YAML 1.2 core words and numbers, line numbers, duplicates."""

import math

import pytest

from ftlib.config import yaml12
from ftlib.errors import UserError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("yes", "yes"),
        ("no", "no"),
        ("on", "on"),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("2e-4", 2e-4),
        ("1.", 1.0),
        (".5", 0.5),
        ("-3", -3),
        ("010", 10),
        ("0o17", 15),
        ("0x1F", 31),
        ("1_000", "1_000"),
        ("12:30:45", "12:30:45"),
        ("2026-11-22", "2026-11-22"),
        ("-.inf", -math.inf),
        ("'2e-4'", "2e-4"),
        ("=", "="),
        ("<<", "<<"),
    ],
)
def test_scalars_follow_the_core_schema(text: str, value: object) -> None:
    assert yaml12.load(f"key: {text}", "f")[0] == {"key": value}
    if not text.startswith("'"):
        assert yaml12.load_value(text, "f") == value


def test_nan() -> None:
    assert math.isnan(yaml12.load("key: .nan", "f")[0]["key"])


def test_lines_of_keys_and_items() -> None:
    _, lines = yaml12.load("a: 1\nb:\n  c: [1,\n   2]\n", "f")
    assert lines == {("a",): 1, ("b",): 2, ("b", "c"): 3, ("b", "c", 0): 3, ("b", "c", 1): 4}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", r"f:3: a: duplicate key, first in line 1"),
        ("a: {b: 1, b: 2}", r"f:1: a.b: duplicate key"),
        ("a: 1\n b: 2\n", r"f:2: not valid YAML"),
        ("a: [1, 2\n", r"f:\d: not valid YAML"),
        ("a: !!python/object:os.system x", r"f:1: not valid YAML"),
        ("a: \x00", r"f.*: not valid YAML"),
        ("a: &x [*x]", r"f:1: an alias that contains itself"),
        ("a: 1\n---\nb: 2\n", r"f:2: not valid YAML"),
        ("[" * 5000, r"f: not valid YAML: nested too deeply"),
    ],
)
def test_faults_name_the_line(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        yaml12.load(text, "f")


def test_values_of_the_command_line_stay_text_unless_they_begin_like_yaml() -> None:
    assert yaml12.load_value("Question: what? # not a comment", "f") == "Question: what? # not a comment"
    assert yaml12.load_value("{question} en", "f") == "{question} en"
    assert yaml12.load_value("{prefix}", "f") == "{prefix}"
    assert yaml12.load_value("{a: 1}", "f") == {"a": 1}
    assert yaml12.load_value("[1, two]", "f") == [1, "two"]
