"""Datasets through `datasets`, from local folders: no network is needed."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from ftlib import files
from ftlib.data.examples import Example
from ftlib.data.loaders import hub
from ftlib.errors import UserError
from tests.data.loaders.releases import data, read, write


@pytest.fixture(autouse=True)
def datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`datasets` with a cache of its own."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    return datasets


def jsonl(path: Path, *rows: Any) -> None:
    write(path, "".join(json.dumps(row) + "\n" for row in rows))


def test_named_images(tmp_path: Path) -> None:
    jsonl(
        tmp_path / "set/train.jsonl",
        {"file": "a/1.png", "q": "what?", "label": "cat", "n": 3},
        {"file": "b.png", "q": None, "label": ""},
    )
    jsonl(tmp_path / "set/test.jsonl", {"file": "c.png", "q": "", "label": "dog", "n": None})
    columns = {"image": "file", "prefix": "q", "suffix": "label"}
    rows, bad = read(hub.examples, data(tmp_path, file=str(tmp_path / "set"), columns=columns))
    assert rows == [
        Example("train-1", "a/1.png", "what?", "cat", [], {"n": 3}, part="train"),
        Example("test-1", "c.png", "", "dog", [], {}, part="test"),
    ]
    assert [(one.place, one.reason) for one in bad] == [(f"{tmp_path / 'set'}: train row 2", "field q: is missing")]


def test_own_ids_and_references(tmp_path: Path) -> None:
    rows = [{"image": "a", "answers": ["x", "y"], "id": key, "key": 7} for key in ("k", "l")]
    jsonl(tmp_path / "set/validation.jsonl", *rows)
    section = data(tmp_path, file=str(tmp_path / "set"), columns={"references": "answers", "id": "key"})
    (row,), (bad,) = read(hub.examples, section)
    assert (row.id, row.part, row.suffix, row.references) == ("7", "valid", "x", ["x", "y"])
    assert row.facts == {"id": "k"}
    assert "field id: '7' stands in validation row 1 already" in bad.reason


def test_changed_files_are_another_version(tmp_path: Path) -> None:
    jsonl(tmp_path / "set/train.jsonl", {"image": "a", "prefix": "q", "suffix": "x"})
    section = data(tmp_path, file=str(tmp_path / "set"))
    before = hub.version(section)
    assert hub.version(section) == before
    jsonl(tmp_path / "set/train.jsonl", {"image": "a", "prefix": "q", "suffix": "another"})
    changed = hub.version(section)
    jsonl(tmp_path / "set/test.jsonl", {"image": "b", "prefix": "q", "suffix": "x"})
    assert len({tuple(one) for one in (before, changed, hub.version(section))}) == 3


def test_another_staged_commit_is_another_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FTLIB_STORE", str(tmp_path / "store"))
    section = data(tmp_path, file="some/rows:subset")
    assert hub.version(section) == []
    cache = tmp_path / "store/hf/hub/datasets--some--rows"
    for commit in ("a" * 40, "b" * 40):
        with files.publish_folder(cache / "snapshots" / commit) as folder:
            files.write_text(folder / "rows.csv", "image\n")
        files.write_text(cache / "refs" / "main", commit)
        assert hub.version(section) == [commit]


def png(grey: int) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("L", (3, 2), grey).save(buffer, "PNG")
    return buffer.getvalue()


def test_pictures_inside(tmp_path: Path, datasets: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=["no", "yes"]),
            "when": datasets.Value("timestamp[s]"),
            "boxes": datasets.Sequence({"x": datasets.Value("float32")}),
        }
    )
    content = {
        "image": [{"bytes": png(grey), "path": None} for grey in (0, 9, 200)],
        "label": [1, 0, -1],
        "when": [0, 1, 2],
        "boxes": [{"x": [0.5]}] * 3,
    }
    (tmp_path / "set").mkdir()
    datasets.Dataset.from_dict(content, features=features).to_parquet(str(tmp_path / "set" / "train.parquet"))
    section = data(tmp_path / "root", file=str(tmp_path / "set"), columns={"suffix": "label"})
    rows, bad = read(hub.examples, section)
    assert [(row.image, row.prefix, row.suffix) for row in rows] == [
        ("images/train/00000001", "", "yes"),
        ("images/train/00000002", "", "no"),
    ]
    assert rows[0].facts == {"boxes": {"x": [0.5]}}
    assert [one.reason for one in bad] == ["field label: must be text, got -1"]
    assert not (tmp_path / "root").exists()
    hub.fetch(section)
    written = [tmp_path / "root" / "images" / "train" / f"{number:08d}" for number in (1, 2, 3)]
    assert [path.read_bytes() for path in written] == [png(0), png(9), png(200)]
    monkeypatch.setattr(hub, "_write_pictures", None)
    hub.fetch(section)


def test_instructions(tmp_path: Path) -> None:
    jsonl(
        tmp_path / "set/train.jsonl",
        {"instruction": "Add.", "input": "1, 2", "output": "3"},
        {"instruction": "Hi", "output": "ho"},
    )
    rows, bad = read(hub.examples, data(tmp_path, file=str(tmp_path / "set")))
    assert not bad
    assert rows[0] == Example(
        "train-1", "", "Add.", "3", [], {"instruction": "Add.", "input": "1, 2"}, "train", "train-1"
    )
    assert rows[1].facts == {"instruction": "Hi", "input": ""}


def test_chats(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    jsonl(tmp_path / "set/train.jsonl", {"messages": messages})
    (row,), _ = read(hub.examples, data(tmp_path, file=str(tmp_path / "set")))
    assert (row.id, row.prefix, row.suffix, row.facts["messages"]) == ("train-1-1", "q", "a", messages[:1])


def test_a_dataset_of_the_hub_from_the_cache(tmp_path: Path, datasets: Any) -> None:
    """What a download leaves in the cache is found without a connection, by name and subset."""
    jsonl(tmp_path / "set/train.jsonl", {"instruction": "Add.", "output": "3"})
    datasets.load_dataset(str(tmp_path / "set"))
    (info,) = (tmp_path / "cache").rglob("dataset_info.json")
    target = tmp_path / "cache" / "some___thing" / "small" / "0.0.0" / ("a" * 40)
    target.parent.mkdir(parents=True)
    info.parent.rename(target)
    content = json.loads((target / "dataset_info.json").read_text())
    write(target / "dataset_info.json", {**content, "dataset_name": "thing", "config_name": "small"})
    for arrow in target.glob("*.arrow"):
        arrow.rename(target / "thing-train.arrow")
    (row,), _ = read(hub.examples, data(tmp_path, file="some/thing:small"))
    assert (row.id, row.suffix) == ("train-1", "3")
    with pytest.raises(UserError, match="dataset some/other: cannot be read") as caught:
        read(hub.examples, data(tmp_path, file="some/other"))
    assert "ftlib stage CONFIG" in caught.value.remedy


def test_a_staged_dataset_is_read_from_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tables go to a folder of this process: not to the store, which may be read-only, nor to a shared cache."""
    monkeypatch.setenv("FTLIB_STORE", str(tmp_path / "store"))
    folder = tmp_path / "store" / "hf" / "hub" / "datasets--some--rows"
    with files.publish_folder(folder / "snapshots" / ("c" * 40)) as temporary:
        jsonl(temporary / "train.jsonl", {"instruction": "Add.", "output": "3"})
    files.write_text(folder / "refs" / "main", "c" * 40)
    (row,), _ = read(hub.examples, data(tmp_path, file="some/rows"))
    assert (row.id, row.suffix) == ("train-1", "3")
    assert not list((tmp_path / "cache").rglob("*.arrow")) and not list((tmp_path / "store").rglob("*.arrow"))


def test_faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jsonl(tmp_path / "set/train.jsonl", {"picture": "a", "text": "b"})
    with pytest.raises(UserError, match="split train has no column image; there are: picture, text"):
        read(hub.examples, data(tmp_path, file=str(tmp_path / "set")))
    with pytest.raises(UserError, match="has no column label"):
        read(hub.examples, data(tmp_path, file=str(tmp_path / "set"), columns={"image": "picture", "suffix": "label"}))
    with pytest.raises(UserError, match="the name of the dataset is needed"):
        read(hub.examples, data(tmp_path))
    write(tmp_path / "torn/train.parquet", b"PAR1 no")
    with pytest.raises(UserError, match="torn: cannot be read: "):
        read(hub.examples, data(tmp_path, file=str(tmp_path / "torn")))
    with pytest.raises(UserError, match="nowhere: cannot be read: "):
        read(hub.examples, data(tmp_path, file=str(tmp_path / "nowhere")))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="needs `datasets`, which is not installed"):
        read(hub.examples, data(tmp_path, file=str(tmp_path / "set")))
