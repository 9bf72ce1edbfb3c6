"""Answers that a task could not learn or judge are named with file and line before anything is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ftlib.data import scan

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
SIZE = {"width": 100, "height": 100}
OBJECTS = [{"label": name, "box": [0.2, 0.1, 39.1, 29.3]} for name in ("cat", "dog")]
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
        ({"suffix": f"{BOX}"}, "a label"),
        ({"suffix": f"{BOX} cat ; <loc0001><loc0002><loc0003> dog"}, "a label"),
        ({"suffix": "<loc0500><loc0002><loc0300><loc0400> cat"}, "a label"),
        ({"suffix": "a cat"}, "a label"),
        ({"suffix": f"{BOX} cat ; {BOX}"}, "object 2: no label after its box"),
        (
            {"suffix": f"{BOX} cat ; <loc0001><loc0002><loc0300><loc1024> dog"},
            "object 2 (dog): <loc1024> is not a token",
        ),
        ({"suffix": "<loc0001><loc0400><loc0300><loc0400> dog"}, "object 1 (dog): its box has no width"),
        ({"suffix": "<loc0300><loc0002><loc0300><loc0400> dog"}, "object 1 (dog): its box has no height"),
        ({"suffix": "<loc0500><loc0002><loc0300><loc0400> cat"}, "y_min 500 is larger than y_max 300"),
        ({"suffix": "<loc12><loc0002><loc0300><loc0400> cat"}, "<loc12> is not a token"),
        ({"suffix": "<loc0002><loc0300><loc0400> cat"}, "3 location tokens, but a box has 4"),
        ({"suffix": f"{BOX}<seg001> cat"}, "1 segmentation tokens, but a mask has 16"),
        ({"objects": [{"label": "cat"}], **SIZE}, 'field objects: needs objects with a "label" and a "box"'),
        ({"objects": OBJECTS}, "field objects: needs a list of objects, width and height"),
        (
            {"objects": [{"label": "dog", "box": [0, 0, 9, 114]}], **SIZE},
            "objects: object 1 (dog): x_min, y_min, x_max",
        ),
        (
            {"objects": [*OBJECTS[:1], {"label": "dog", "box": [0, 0, 0.3, 0.3]}], **SIZE},
            "object 2 (dog) is x_min",
        ),
    ],
    "refer": [
        ({"suffix": f"{BOX} ; {BOX}"}, "2 boxes; must be one box"),
        ({"suffix": "<loc0001>"}, "one box"),
        ({"suffix": "<loc0001><loc0002><loc0300><loc1024>"}, "<loc1024> is not a token"),
        ({"box": [0, 0, 8, 8]}, "field box: needs a box"),
        (
            {"box": [0, 0, 8, 114], **SIZE},
            "field box: x_min, y_min, x_max, y_max [0, 0, 8, 114] exceed the image of 100 × 100",
        ),
        ({"box": [4, 4, 8, 8], **SIZE}, "field suffix: the box is x_min"),
    ],
    "segment": [
        ({"suffix": f"{BOX} cat"}, "sixteen <segXXX>"),
        ({"suffix": f"{BOX}{CODES[:-8]} cat"}, "sixteen <segXXX>"),
        ({"suffix": f"{BOX}{CODES}; {BOX}{CODES}"}, "sixteen <segXXX>"),
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


def test_sizes_of_every_row_of_an_image_are_compared(config: Callable[..., Path], ftlib: Ftlib) -> None:
    right = {"image": "0.png", "width": 8, "height": 8}
    path = config("refer", [right, {**right, "width": 16}, right])
    code, _, error = ftlib("prepare", path)
    assert code == 2 and error.count("0.png: 8 × 8 pixels, but its annotation has 16 × 8") == 1
    assert ftlib("prepare", config("refer", [right, right]))[0] == 0


@pytest.mark.parametrize(
    ("task", "fields"), [("detect", {"objects": OBJECTS}), ("refer", {"box": [0.2, 0.1, 39.1, 29.3]})]
)
def test_boxes_beside_the_answer_that_are_its_own(
    task: str, fields: dict[str, Any], config: Callable[..., Path], ftlib: Ftlib
) -> None:
    """Read from a picture of 100 × 100 pixels, which only the last one is not."""
    path = config(task, [{**fields, **SIZE}])
    assert ftlib("prepare", path)[0] == 2
    Image.new("RGB", (100, 100), "red").save(path.with_name("9.png"))
    code, _, error = ftlib("prepare", path)
    assert code == 0, error


def test_negatives_of_detection_are_learned_and_asked(
    tmp_path: Path, write_config: Callable[..., Path], ftlib: Ftlib, store: Path
) -> None:
    """An empty answer of task detect; of any other task there is nothing to learn in it."""
    for number in range(12):
        Image.effect_noise((8, 8), 50).save(tmp_path / f"{number}.png")
    lines = [{"image": f"{n}.png", "prefix": "detect cat", "suffix": f"{BOX} cat" if n % 3 else " "} for n in range(12)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    settings = [f"data.root={tmp_path}", "data.source=jsonl", "data.file=data.jsonl", "data.split.valid=3"]
    settings += ["evaluation.splits=[train,valid]", "evaluation.before=false"]
    config = write_config()
    code, _, error = ftlib("prepare", config, *settings, "task=caption")
    assert code == 2 and "data.jsonl:1: field suffix: is empty" in error
    for command in ("prepare", "train", "evaluate"):
        more = ["--json"] if command == "evaluate" else []
        code, output, error = ftlib(command, config, *settings, "task=detect", *more)
        assert code == 0, error
    assert sum(one["n"] for one in json.loads(output)) >= 9


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
    assert code == 0 and f"{len(WRONG[task])} invalid records are skipped" in error


@pytest.mark.parametrize(
    ("task", "change", "told"),
    [
        ("detect", {"width": 9, "height": 8}, "9 × 8"),
        ("refer", {"width": 8, "height": 16}, "8 × 16"),
        ("segment", {"mask": {"size": [8, 9], "polygons": [[1, 1, 6, 1, 6, 6]]}}, "9 × 8"),
    ],
)
def test_sizes_that_are_not_the_image_s(
    task: str, change: dict[str, Any], told: str, config: Callable[..., Path], ftlib: Ftlib
) -> None:
    path = config(task, [change])
    for more in ([], ["--check"]):
        code, _, error = ftlib("prepare", path, *more)
        assert code == 2 and f"9.png: 8 × 8 pixels, but its annotation has {told}" in error
    assert ftlib("prepare", path, "task=vqa", "data.on_bad=skip")[0] == 2, "no row has ten answers"
    code, _, error = ftlib("prepare", path, "task=caption")
    assert code == 0, f"a field called width is any field there: {error}"


def test_answers_that_are_no_closed_set(
    config: Callable[..., Path], ftlib: Ftlib, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scan, "MAX_LABELS", 3)
    path = config("classify", [{"suffix": str(n)} for n in range(3)])
    code, _, error = ftlib("prepare", path)
    assert code == 2 and "more than 3 different answers, too many for a set" in error
    path = config("classify", [{"suffix": str(n)} for n in range(2)])
    assert ftlib("prepare", path)[0] == 0
