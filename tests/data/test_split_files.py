"""Files that are splits: `data.files`, mixtures and single files that should have been written so."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from pydantic import ValidationError

from ftlib.config.loader import load_experiment
from ftlib.config.schema import Data
from ftlib.core.paths import find_site
from ftlib.data.dataset import prepared_folder
from ftlib.data.example import Example, InvalidRecord
from ftlib.data.scan import scan_source
from ftlib.data.sources.registry import annotation_files, iter_examples
from ftlib.errors import UserError
from ftlib.tasks.registry import load_task
from tests.data.preparing import prepare
from tests.data.sources.releases import write

NAMES = {"jsonl": "jsonl", "csv": "csv", "instructions": "json"}
SPLITS = ("train", "valid", "test")


def put(path: Path, *rows: dict[str, Any]) -> None:
    """Write rows in the form that the file's name says."""
    if path.suffix == ".csv":
        lines = [",".join(rows[0]), *[",".join(map(str, row.values())) for row in rows]]
        write(path, "\n".join(lines) + "\n")
    else:
        write(path, list(rows) if path.suffix == ".json" else "".join(json.dumps(row) + "\n" for row in rows))


def row(source: str, number: int, **more: Any) -> dict[str, Any]:
    if source == "instructions":
        return {"instruction": f"q{number}", "output": "x", **more}
    return {"image": f"{number}.png", "prefix": "q", "suffix": "x", **more}


def rows_of(data: Data) -> tuple[list[Example], list[InvalidRecord]]:
    rows = list(iter_examples(data))
    return [one for one in rows if isinstance(one, Example)], [one for one in rows if isinstance(one, InvalidRecord)]


@pytest.mark.parametrize("source", NAMES)
def test_each_file_is_a_split(tmp_path: Path, source: str) -> None:
    """Ids may start anew in each."""
    end = NAMES[source]
    for number, split in enumerate((*SPLITS, "more"), 1):
        put(tmp_path / f"{split}.{end}", row(source, number, id=1), row(source, 10 + number, id=2))
    files = {"test": [f"test.{end}", f"more.{end}"], "valid": f"valid.{end}", "train": f"train.{end}"}
    data = Data.model_validate({"source": source, "root": str(tmp_path), "files": files})
    rows, bad = rows_of(data)
    assert not bad
    assert [one.part for one in rows] == ["train"] * 2 + ["valid"] * 2 + ["test"] * 4
    assert [one.part_name for one in rows[::2]] == [f"{name}.{end}" for name in (*SPLITS, "more")]
    ids = ["train/1", "train/2", "valid/1", "valid/2", "test/1", "test/2", "test-2/1", "test-2/2"]
    assert [one.id for one in rows] == ids
    assert source != "instructions" or [one.group for one in rows] == ids
    assert [path.name for path in annotation_files(data)] == [f"{name}.{end}" for name in (*SPLITS, "more")]


def test_rows_without_ids(tmp_path: Path) -> None:
    for split in SPLITS:
        put(tmp_path / f"{split}.jsonl", row("jsonl", 1), row("jsonl", 2))
    rows, bad = rows_of(Data(source="jsonl", root=str(tmp_path), files={split: [f"{split}.jsonl"] for split in SPLITS}))
    assert not bad and len({one.id for one in rows if one.id}) in (0, 6)


def test_images_that_lie_beside_their_file(tmp_path: Path) -> None:
    """As Roboflow exports them: a folder for each split, with its images and annotations."""
    for split in SPLITS:
        write(tmp_path / split / "1.png", b"")
        put(tmp_path / split / "_annotations.jsonl", row("jsonl", 1), row("jsonl", 2))
    files = {split: [f"{split}/_annotations.jsonl"] for split in SPLITS}
    data = Data(source="jsonl", root=str(tmp_path), files=files)
    images = [f"{split}/{number}.png" for split in SPLITS for number in (1, 2)]
    assert [one.image for one in rows_of(data)[0]] == images
    write(tmp_path / "1.png", b"")
    assert [one.image for one in rows_of(data)[0]] == ["1.png", "2.png"] * 3, (
        "paths count from data.root, if it is there"
    )


def test_a_row_that_says_another_split_than_its_file(tmp_path: Path) -> None:
    put(
        tmp_path / "a.jsonl",
        row("jsonl", 1, split="val"),
        row("jsonl", 2, split="Training"),
        row("jsonl", 3, split="y"),
    )
    rows, bad = rows_of(Data(source="jsonl", root=str(tmp_path), files={"train": ["a.jsonl"]}))
    assert [one.reason for one in bad] == ["field split: 'val', but the row is in a.jsonl (train)"]
    assert [one.part for one in rows] == ["train", "train"]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"file": "a"}, "file and files: set only one of them"),
        ({"source": "folder"}, "files: only for sources csv, instructions, jsonl, coco_.*; source folder has fixed"),
        ({"files": {"train": ["a", "./a"]}}, "files: duplicate file a"),
        ({"files": {"train": "a", "test": ["a"]}}, "files: duplicate file a"),
        (
            {"source": "coco_detection", "files": {"train": ["a", "b"]}},
            "files: source coco_detection takes one file for each split",
        ),
        ({"files": {"train": []}}, "a split has no file"),
        ({"files": {"train": "a", "dev": "b"}}, "'train', 'valid' or 'test'"),
        (
            {"source": "mixture", "parts": [{"name": "a", "source": "jsonl"}]},
            "for a mixture, set file, files, .* in its parts",
        ),
    ],
)
def test_configs(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        Data.model_validate({"source": "jsonl", "root": "r", "files": {"train": "a", "test": "b"}, **fields})


CONFIG = """
name: files
task: classify
model: {family: paligemma, base: ftlib/tiny-paligemma}
adapter: {method: full}
data: DATA
"""


@pytest.fixture
def config(tmp_path: Path, store: Path) -> Callable[..., Any]:
    def load(**data: Any) -> Any:
        path = tmp_path / "config.yaml"
        path.write_text(CONFIG.replace("DATA", json.dumps({"source": "jsonl", "root": str(tmp_path), **data})))
        return load_experiment(path, [], find_site())

    return load


def pictures(root: Path, numbers: range) -> list[dict[str, Any]]:
    root.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        Image.new("RGB", (4, 4), (number, 0, 0)).save(root / f"{number}.png")
    return [row("jsonl", number) for number in numbers]


def test_prepared(config: Callable[..., Any], tmp_path: Path) -> None:
    rows = pictures(tmp_path, range(9))
    for start, split in enumerate(SPLITS):
        put(tmp_path / f"{split}.jsonl", *rows[3 * start : 3 * start + 3])
    files = {split: f"{split}.jsonl" for split in SPLITS}
    experiment = config(files=files)
    prepared = prepare(experiment.config, find_site())
    for start, split in enumerate(SPLITS):
        assert sorted(one.image for one in prepared.rows(split)) == [f"{3 * start + n}.png" for n in range(3)]
    folder = prepared_folder(experiment.config, find_site())
    assert folder == prepared.folder == prepared_folder(config(files=dict(reversed(files.items()))).config, find_site())
    put(tmp_path / "test.jsonl", *rows[6:8])
    assert prepared_folder(experiment.config, find_site()) != folder
    (tmp_path / "test.jsonl").unlink()
    with pytest.raises(UserError, match=r"test\.jsonl: no such file"):
        prepared_folder(experiment.config, find_site())


def test_unknown_splits_are_told_with_those_there_are(config: Callable[..., Any]) -> None:
    with pytest.raises(UserError, match=r"data\.files\.tets: unknown key; did you mean test\?"):
        config(files={"tets": "a.jsonl"})


def test_files_that_lie_elsewhere_now() -> None:
    files = {"train": ["/old/a.jsonl", "b.jsonl"], "test": ["c.jsonl"]}
    part = {"name": "x", "source": "jsonl", "files": files}
    data = Data.model_validate({"source": "mixture", "root": "/r", "parts": [part]})
    key = "parts.0.files.train.0"
    assert data.locations[key] == "/old/a.jsonl" and data.locations["parts.0.files.test.0"] == "c.jsonl"
    assert data.with_locations(data.locations) == data
    moved = data.with_locations({key: "/new/a.jsonl"})
    assert moved.parts[0].files == {"train": ["/new/a.jsonl", "b.jsonl"], "test": ["c.jsonl"]}
    assert moved.with_locations({key: "/old/a.jsonl"}) == data


def mixture(root: Path, *parts: dict[str, Any], **more: Any) -> Data:
    return Data.model_validate({"source": "mixture", "root": str(root), "parts": list(parts), **more})


@pytest.mark.parametrize(
    ("parts", "hint"),
    [
        (
            [{"name": name, "file": f"{name}.jsonl"} for name in ("train", "val", "test")],
            "data.files: {train: train.jsonl, valid: val.jsonl, test: test.jsonl}",
        ),
        (
            [{"name": "one", "file": "_annotations.train.jsonl"}, {"name": "two", "file": "_annotations.test.jsonl"}],
            "data.files: {train: _annotations.train.jsonl, test: _annotations.test.jsonl}",
        ),
        (
            [{"name": "a", "root": "train"}, {"name": "b", "root": "Test"}],
            "data.files: {train: train/data.jsonl, test: Test/data.jsonl}",
        ),
        (
            [{"name": f"cats_{split}", "file": f"{n}.jsonl"} for n, split in enumerate(("train", "test"))],
            "data.files: {train: 0.jsonl, test: 1.jsonl}",
        ),
    ],
)
def test_parts_that_are_splits(tmp_path: Path, parts: list[dict[str, Any]], hint: str) -> None:
    """Each was divided by itself, so that the test images of their authors were learned."""
    sections = [{"source": "jsonl", **part} for part in parts]
    for part in sections:
        put(tmp_path / part.get("root", ".") / part.get("file", "data.jsonl"), row("jsonl", 1))
    with pytest.raises(UserError, match="parts of the mixture have the names of splits") as caught:
        rows_of(mixture(tmp_path, *sections))
    assert hint in caught.value.remedy
    rows, _ = rows_of(mixture(tmp_path, *sections, split={"official": False}))
    assert len(rows) == len(parts)
    for part in sections:  # whose rows know their splits
        put(tmp_path / part.get("root", ".") / part.get("file", "data.jsonl"), row("jsonl", 1, part="test"))
    rows, _ = rows_of(mixture(tmp_path, *sections))
    assert [one.part for one in rows] == ["test"] * len(parts)


def test_parts_that_are_splits_of_another_kind_of_source(tmp_path: Path) -> None:
    for name in ("Train/cat", "Train/dog", "val/cat", "val/dog"):
        write(tmp_path / name / "1.png", b"")
    parts = [{"name": name.lower(), "source": "folder", "root": name} for name in ("Train", "val")]
    with pytest.raises(UserError, match=r"train \(train\), val \(valid\)") as caught:
        rows_of(mixture(tmp_path, *parts))
    assert "as one dataset with official splits" in caught.value.remedy
    rows, _ = rows_of(Data(source="folder", root=str(tmp_path)))
    assert [(one.part, one.suffix) for one in rows] == [
        (part, label) for part in ("train", "valid") for label in ("cat", "dog")
    ]


def test_parts_that_are_no_splits(tmp_path: Path) -> None:
    parts = []
    for name, file in (("train_signs", "signs.jsonl"), ("cars", "cars.jsonl"), ("test_tubes", "tubes.jsonl")):
        put(tmp_path / file, row("jsonl", 1))
        parts.append({"name": name, "source": "jsonl", "file": file})
    assert len(rows_of(mixture(tmp_path, *parts))[0]) == 3


def test_other_splits_beside_a_file_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a/cats_train", "a/cats_dev", "a/cats_test", "a/dogs_test", "a/notes"):
        put(tmp_path / f"{name}.jsonl", row("jsonl", 1))
    data = Data(source="jsonl", root=str(tmp_path), file="a/cats_train.jsonl")
    assert len(scan_source(data, tmp_path / "rows.arrow", load_task("caption")).rows) == 1
    said = capsys.readouterr().err
    assert "not reading a/cats_dev.jsonl, a/cats_test.jsonl beside it" in said.replace("\n", " ")
    assert "data.files: {train: a/cats_train.jsonl, valid: a/cats_dev.jsonl, test: a/cats_test.jsonl}" in said
    scan_source(
        Data(source="jsonl", root=str(tmp_path), file="a/notes.jsonl"), tmp_path / "rows.arrow", load_task("caption")
    )
    assert not capsys.readouterr().err


def test_other_splits_in_folders_beside_that_of_a_file_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a/train", "a/valid", "a/Test", "a/cats"):
        put(tmp_path / name / "_annotations.jsonl", row("jsonl", 1))
    for name in ("a/train", "a/cats"):
        data = Data(source="jsonl", root=str(tmp_path), file=f"{name}/_annotations.jsonl")
        scan_source(data, tmp_path / "rows.arrow", load_task("caption"))
        said = capsys.readouterr().err.replace("\n", " ")
        assert ("not reading a/valid/_annotations.jsonl, a/Test/_annotations.jsonl beside it" in said) == (
            name[2] == "t"
        )


def test_coco_files_that_are_splits_are_found(tmp_path: Path) -> None:
    for name in ("train", "test"):
        write(tmp_path / f"{name}.json", b"{}")
    with pytest.raises(UserError) as caught:
        rows_of(Data(source="coco_detection", root=str(tmp_path)))
    assert "data.files: {train: train.json, test: test.json}" in caught.value.remedy


def test_a_chat_about_an_image_is_named(tmp_path: Path) -> None:
    """LLaVA's form, which source instructions reads."""
    put(tmp_path / "data.jsonl", {"image": "1.png", "conversations": [{"from": "human", "value": "<image>?"}]})
    (bad,) = rows_of(Data(source="jsonl", root=str(tmp_path)))[1]
    assert bad.reason.startswith("field conversations: chats are read by source instructions")


@pytest.mark.parametrize("source", NAMES)
def test_without_a_usual_file_splits_are_found(tmp_path: Path, source: str) -> None:
    for name in ("train", "test", "other"):
        put(tmp_path / f"{name}.{NAMES[source]}", row(source, 1))
    with pytest.raises(UserError) as caught:
        rows_of(Data.model_validate({"source": source, "root": str(tmp_path)}))
    names = f"train: train.{NAMES[source]}, test: test.{NAMES[source]}"
    assert f"data.files: {{{names}}}" in caught.value.remedy
    for name in ("train", "test"):
        (tmp_path / name).mkdir()
        (tmp_path / f"{name}.{NAMES[source]}").rename(tmp_path / name / f"list.{NAMES[source]}")
    with pytest.raises(UserError) as caught:
        rows_of(Data.model_validate({"source": source, "root": str(tmp_path)}))
    names = f"train: train/list.{NAMES[source]}, test: test/list.{NAMES[source]}"
    assert f"data.files: {{{names}}}" in caught.value.remedy


def test_a_part_of_a_mixture_that_is_only_asked(config: Callable[..., Any], tmp_path: Path) -> None:
    put(tmp_path / "seen.jsonl", *pictures(tmp_path, range(20)))
    put(tmp_path / "unseen.jsonl", *pictures(tmp_path, range(20, 25)))
    parts = [
        {"name": "seen", "source": "jsonl", "file": "seen.jsonl"},
        {"name": "unseen", "source": "jsonl", "files": {"test": "unseen.jsonl"}},
    ]
    prepared = prepare(config(source="mixture", parts=parts).config, find_site())
    counts = {split: entry["parts"] for split, entry in prepared.metadata["splits"].items()}
    assert counts == {
        "train": {"seen": 16, "unseen": 0},
        "valid": {"seen": 2, "unseen": 0},
        "test": {"seen": 2, "unseen": 5},
    }
