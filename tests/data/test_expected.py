"""Answers that a task could not learn or judge are named with file and line before anything is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ftlib.data import intake

Ftlib = Callable[..., tuple[int, str, str]]

CONFIG = """
name: checked
task: TASK
model: {family: paligemma, base: ftlib/tiny-paligemma}
adapter: {method: full}
data: {source: jsonl, root: ROOT, split: {valid: 2, test: 2}}
"""
BOX = "<loc0001><loc0002><loc0300><loc0400>"
CODES = "".join(f"<seg{code:03d}>" for code in range(16))
MASK = {"size": [8, 8], "polygons": [[1, 1, 6, 1, 6, 6]]}
QUESTION = {
    "isBalanced": True,
    "types": {"structural": "verify", "semantic": "attr", "detailed": "x"},
    "groups": {"global": None, "local": "x"},
    "entailed": [],
    "semantic": [],
}
RIGHT: dict[str, dict[str, Any]] = {
    "detect": {"suffix": f"{BOX} cat ; {BOX} dog"},
    "refer": {"suffix": BOX},
    "segment": {"suffix": f"{BOX}{CODES} cat", "mask": MASK},
    "vqa": {"suffix": "a", "references": ["a"] * 10},
    "gqa": {"suffix": "yes", **QUESTION},
    "docvqa": {"suffix": "anything"},
    "caption": {"suffix": "anything"},
    "classify": {"suffix": "yes"},
}
WRONG: dict[str, list[tuple[dict[str, Any], str]]] = {
    "detect": [
        ({"suffix": f"{BOX}"}, "a label are needed"),
        ({"suffix": f"{BOX} cat ; <loc0001><loc0002><loc0003> dog"}, "a label are needed"),
        ({"suffix": "<loc0500><loc0002><loc0300><loc0400> cat"}, "a label are needed"),
        ({"suffix": "a cat"}, "a label are needed"),
    ],
    "refer": [({"suffix": f"{BOX} ; {BOX}"}, "one box"), ({"suffix": "<loc0001>"}, "one box")],
    "segment": [
        ({"suffix": f"{BOX} cat"}, "<segXXX> sixteen"),
        ({"suffix": f"{BOX}{CODES[:-8]} cat"}, "<segXXX> sixteen"),
        ({"suffix": f"{BOX}{CODES}; {BOX}{CODES}"}, "<segXXX> sixteen"),
        ({"mask": None}, "field mask"),
        ({"mask": {"size": [8], "polygons": []}}, "field mask: size"),
    ],
    "vqa": [({"references": ["a", "a", "a"]}, "3 answers, but VQA accuracy needs 4")],
    "gqa": [({"isBalanced": "yes"}, "isBalanced")],
}


@pytest.fixture
def config(tmp_path: Path, store: Path) -> Callable[..., Path]:
    def write(task: str, changes: list[dict[str, Any]]) -> Path:
        """Nine right rows, and behind them those with changes."""
        Image.new("RGB", (8, 8)).save(tmp_path / "one.png")
        lines = []
        for number in range(9 + len(changes)):
            Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / f"{number}.png")
            changed = changes[number - 9] if number >= 9 else {}
            lines.append(json.dumps({"image": f"{number}.png", "prefix": "q", **RIGHT[task], **changed}))
        (tmp_path / "data.jsonl").write_text("\n".join(lines) + "\n")
        path = tmp_path / "checked.yaml"
        path.write_text(CONFIG.replace("TASK", task).replace("ROOT", str(tmp_path)))
        return path

    return write


@pytest.mark.parametrize("task", RIGHT)
def test_right_answers_pass(task: str, config: Callable[..., Path], ftlib: Ftlib) -> None:
    code, _, error = ftlib("prepare", config(task, []))
    assert code == 0, error


@pytest.mark.parametrize("task", WRONG)
def test_wrong_answers_are_named(task: str, config: Callable[..., Path], ftlib: Ftlib, store: Path) -> None:
    path = config(task, [change for change, _ in WRONG[task]])
    for more in ([], ["--check"]):
        code, _, error = ftlib("prepare", path, *more)
        assert code == 2 and not list(store.glob("prepared/*/COMPLETE.json"))
        for line, (_, words) in enumerate(WRONG[task], 10):
            (said,) = [text for text in error.splitlines() if f"data.jsonl:{line}: " in text]
            assert words in said
    code, _, error = ftlib("prepare", path, "data.on_bad=skip")
    assert code == 0 and f"{len(WRONG[task])} records cannot be used" in error


def test_answers_that_are_no_closed_set(
    config: Callable[..., Path], ftlib: Ftlib, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intake, "MAX_LABELS", 3)
    path = config("classify", [{"suffix": str(n)} for n in range(3)])
    code, _, error = ftlib("prepare", path)
    assert code == 2 and "more than 3 different answers are no closed set" in error
    path = config("classify", [{"suffix": str(n)} for n in range(2)])
    assert ftlib("prepare", path)[0] == 0
