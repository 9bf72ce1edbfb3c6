"""Datasets through `datasets`, from local folders: no network is needed."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from ftlib.config.schema import Data
from ftlib.core import files
from ftlib.data.example import Example
from ftlib.data.sources import hf_datasets, hf_tables
from ftlib.errors import UserError
from tests.data.sources.releases import data, read, write


@pytest.fixture(autouse=True)
def datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`datasets` with a cache of its own, and a store."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("FTLIB_STORE", str(tmp_path / "store"))
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
    rows, bad = read(hf_datasets.examples, data(tmp_path, file=str(tmp_path / "set"), columns=columns))
    assert rows == [
        Example("", "a/1.png", "what?", "cat", [], {"n": 3}, part="train"),
        Example("", "c.png", "", "dog", [], {}, part="test"),
    ]
    assert [(one.location, one.reason) for one in bad] == [
        (
            f"{tmp_path / 'set'}: train row 2",
            "field q: is missing; available: file, label (set data.columns for other names)",
        )
    ]


def test_own_ids_and_references(tmp_path: Path) -> None:
    rows = [{"image": "a", "answers": ["x", "y"], "id": key, "key": 7} for key in ("k", "l")]
    jsonl(tmp_path / "set/validation.jsonl", *rows)
    section = data(tmp_path, file=str(tmp_path / "set"), columns={"references": "answers", "id": "key"})
    (row,), (bad,) = read(hf_datasets.examples, section)
    assert (row.id, row.part, row.suffix, row.references) == ("7", "valid", "x", ["x", "y"])
    assert row.facts == {"id": "k"}
    assert "field id: duplicate of '7' in validation row 1" in bad.reason


def test_changed_files_are_another_version(tmp_path: Path) -> None:
    jsonl(tmp_path / "set/train.jsonl", {"image": "a", "prefix": "q", "suffix": "x"})
    section = data(tmp_path, file=str(tmp_path / "set"))
    before = hf_datasets.content_version(section)
    assert hf_datasets.content_version(section) == before
    jsonl(tmp_path / "set/train.jsonl", {"image": "a", "prefix": "q", "suffix": "another"})
    changed = hf_datasets.content_version(section)
    jsonl(tmp_path / "set/test.jsonl", {"image": "b", "prefix": "q", "suffix": "x"})
    assert len({tuple(one) for one in (before, changed, hf_datasets.content_version(section))}) == 3


def test_another_staged_commit_is_another_version(tmp_path: Path) -> None:
    section = data(tmp_path, file="some/rows:subset")
    assert hf_datasets.content_version(section) == []
    cache = tmp_path / "store/hf/hub/datasets--some--rows"
    for commit in ("a" * 40, "b" * 40):
        with files.atomic_directory(cache / "snapshots" / commit) as folder:
            files.write_text(folder / "rows.csv", "image\n")
        files.write_text(cache / "refs" / "main", commit)
        assert hf_datasets.content_version(section) == [commit]


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
    with pytest.raises(UserError, match=r"its images are not extracted \(.*/root/\.images/") as caught:
        read(hf_datasets.examples, section)
    assert "ftlib stage CONFIG" in caught.value.remedy
    hf_datasets.fetch(section)
    rows, bad = read(hf_datasets.examples, section)
    assert [(Path(row.image).name, row.prefix, row.suffix) for row in rows] == [
        ("00000001", "", "yes"),
        ("00000002", "", "no"),
    ]
    assert rows[0].facts == {"boxes": {"x": [0.5]}}
    assert [one.reason for one in bad] == ["field label: -1 is not the number of a label"]
    folder = (tmp_path / "root" / rows[0].image).parent
    assert [path.read_bytes() for path in sorted(folder.iterdir())] == [png(0), png(9), png(200)]
    monkeypatch.setattr(hf_datasets, "load_tables", None)  # again: nothing is read
    hf_datasets.fetch(section)


def parquet(path: Path, *greys: int, **fields: Any) -> None:
    """Rows with a picture of one grey each, which is the answer, too."""
    import datasets

    features = {"image": datasets.Image(), "suffix": datasets.Value("string")}
    content = {"image": [{"bytes": png(grey), "path": None} for grey in greys], "suffix": list(map(str, greys))}
    features |= {name: datasets.Image() for name in fields}
    content |= {name: [{"bytes": png(grey), "path": None} for grey in column] for name, column in fields.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    table = datasets.Dataset.from_dict(content, features=datasets.Features(features))
    table.to_parquet(str(path))


def shown(root: Path, *sections: Data) -> list[tuple[str, int]]:
    """Each row's answer and the grey of its picture, after all datasets were staged."""
    from PIL import Image

    for section in sections:
        hf_datasets.fetch(section)
    rows = [row for section in sections for row in read(hf_datasets.examples, section)[0]]
    return [(row.suffix, Image.open(root / row.image).getpixel((0, 0))) for row in rows]  # type: ignore[misc]


def test_columns_that_are_not_read_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A second column of pictures, such as masks, was passed without a word."""
    section = data(tmp_path / "root", file=str(tmp_path / "set"))
    parquet(tmp_path / "set/train.parquet", 1, 2, mask=(3, 4))
    assert shown(tmp_path / "root", section) == [("1", 1), ("2", 2)]
    assert "columns not read: mask\n" in capsys.readouterr().err


def test_rows_show_the_pictures_of_their_version(tmp_path: Path) -> None:
    """Of a parquet file that is written anew in another order, rows showed the pictures of the old one."""
    section = data(tmp_path / "root", file=str(tmp_path / "set"))
    parquet(tmp_path / "set/train.parquet", 1, 2, 3)
    assert shown(tmp_path / "root", section) == [("1", 1), ("2", 2), ("3", 3)]
    before = {path for path in (tmp_path / "root").rglob("*") if path.is_file()}
    parquet(tmp_path / "set/train.parquet", 3, 1, 2)
    assert shown(tmp_path / "root", section) == [("3", 3), ("1", 1), ("2", 2)]
    assert all(path.is_file() for path in before), "runs that began with the old version still show its pictures"


def test_datasets_under_one_root_have_pictures_of_their_own(tmp_path: Path) -> None:
    parquet(tmp_path / "a/train.parquet", 1, 2)
    parquet(tmp_path / "b/train.parquet", 8, 9, mask=[18, 19])
    root = tmp_path / "root"
    sections = [data(root, file=str(tmp_path / name)) for name in ("a", "b")]
    masks = data(root, file=str(tmp_path / "b"), columns={"image": "mask"})
    assert shown(root, *sections, masks) == [("1", 1), ("2", 2), ("8", 8), ("9", 9), ("8", 18), ("9", 19)]


def test_subsets_have_pictures_of_their_own(tmp_path: Path) -> None:
    parquet(tmp_path / "set/a/train.parquet", 1, 2)
    parquet(tmp_path / "set/b/train.parquet", 8, 9)
    names = "".join(f"- config_name: {name}\n  data_files: {name}/*.parquet\n" for name in "ab")
    write(tmp_path / "set/README.md", f"---\nconfigs:\n{names}---\n")
    root = tmp_path / "root"
    sections = [data(root, file=f"{tmp_path / 'set'}:{name}") for name in "ab"]
    assert shown(root, *sections) == [("1", 1), ("2", 2), ("8", 8), ("9", 9)]


@pytest.mark.parametrize("old", [False, True])
def test_a_dataset_that_is_the_root_itself(tmp_path: Path, old: bool) -> None:
    """`datasets` took the folders of extracted pictures, named as splits, for the dataset."""
    parquet(tmp_path / "set/train.parquet", 1, 2)
    parquet(tmp_path / "set/test.parquet", 3)
    section = data(tmp_path / "set", file=str(tmp_path / "set"))
    before = hf_datasets.content_version(section)
    if old:  # as version 0.1 left them
        for split in ("train", "test"):
            with files.atomic_directory(tmp_path / "set/images" / split) as folder:
                write(folder / "00000001", png(77))
    for _ in range(2):
        assert shown(tmp_path / "set", section) == [("1", 1), ("2", 2), ("3", 3)]
        assert hf_datasets.content_version(section) == before
    assert not old or (tmp_path / "set/images/train/00000001").read_bytes() == png(77)


def test_the_content_is_the_version(tmp_path: Path) -> None:
    """A copy, whose files have other times, is the same dataset."""
    parquet(tmp_path / "a/train.parquet", 1, 2)
    write(tmp_path / "b/train.parquet", (tmp_path / "a/train.parquet").read_bytes())
    one, other = (data(tmp_path, file=str(tmp_path / name)) for name in "ab")
    assert hf_datasets.content_version(one) == hf_datasets.content_version(other) != []
    write(tmp_path / "b/.cache/x", "hidden files belong to programs")
    assert hf_datasets.content_version(one) == hf_datasets.content_version(other)


def test_saved_to_disk(tmp_path: Path, datasets: Any) -> None:
    parquet(tmp_path / "set/train.parquet", 1, 2)
    parquet(tmp_path / "set/test.parquet", 3)
    tables = datasets.load_dataset(str(tmp_path / "set"), cache_dir=str(tmp_path / "cache"))
    tables.save_to_disk(str(tmp_path / "both"))
    tables["test"].save_to_disk(str(tmp_path / "one"))
    datasets.Dataset.from_dict({"image": ["a.png"], "suffix": ["x"]}).save_to_disk(str(tmp_path / "plain"))
    root = tmp_path / "root"
    both, one, plain = (data(root, file=str(tmp_path / name)) for name in ("both", "one", "plain"))
    assert shown(root, both) == [("1", 1), ("2", 2), ("3", 3)]
    assert shown(root, one) == [("3", 3)]
    assert [row.part for row in read(hf_datasets.examples, both)[0]] == ["train", "train", "test"]
    assert [row.part for row in read(hf_datasets.examples, one)[0]] == ["test"]
    ((row,), _) = read(hf_datasets.examples, plain)
    assert (row.image, row.suffix, row.part) == ("a.png", "x", "")


@pytest.mark.parametrize("form", ["struct", "binary", "large_binary"])
def test_pictures_as_plain_bytes(tmp_path: Path, form: str) -> None:
    """Parquet as pandas and pyarrow write it, without the types of `datasets`."""
    import pyarrow
    import pyarrow.parquet

    content: list[Any] = [png(grey) for grey in (1, 2)]
    kind: Any = pyarrow.binary() if form == "binary" else pyarrow.large_binary()
    if form == "struct":
        content = [{"bytes": one, "path": "a.png"} for one in content]
        kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    table = pyarrow.table({"image": pyarrow.array(content, type=kind), "suffix": ["1", "2"]})
    (tmp_path / "set").mkdir()
    pyarrow.parquet.write_table(table, tmp_path / "set" / "train.parquet")
    section = data(tmp_path / "root", file=str(tmp_path / "set"))
    assert shown(tmp_path / "root", section) == [("1", 1), ("2", 2)]


def named(path: Path, *pictures: Any) -> None:
    """Rows whose pictures are records of bytes and path, or lists of such."""
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    kind = pyarrow.list_(kind) if isinstance(pictures[0], list) else kind
    suffixes = [str(number) for number in range(len(pictures))]
    table = pyarrow.table({"image": pyarrow.array(list(pictures), type=kind), "suffix": suffixes})
    pyarrow.parquet.write_table(table, path)


def test_rows_bring_no_other_files_into_the_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A row named /proc/self/environ as its picture, and a token got into a folder that the group can read."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    write(tmp_path / "secret", "hf_secret")
    write(tmp_path / "other/secret", "hf_secret")
    write(tmp_path / "set/a/1.png", png(1))
    (tmp_path / "set/leaves.png").symlink_to(tmp_path / "secret")
    (tmp_path / "set/broken.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / "set/stays.png").symlink_to(tmp_path / "set/a/1.png")
    (tmp_path / "set/out").symlink_to(tmp_path / "other")
    paths = ["a/1.png", str(tmp_path / "set/a/1.png"), "stays.png", "a/../a/1.png"]
    bad = ["/proc/self/environ", "../secret", str(tmp_path / "secret"), "leaves.png", "out/secret", "broken.png"]
    bad += ["a/../../secret", f"file://{tmp_path}/secret", "https://example.org/1.png", "none.png", "a", "x" * 5000]
    named(tmp_path / "set/train.parquet", *[{"bytes": None, "path": path} for path in paths + bad], None)
    section = data(tmp_path / "root", file=str(tmp_path / "set"))
    monkeypatch.chdir(tmp_path)
    assert shown(tmp_path / "root", section) == [(str(number), 1) for number in range(len(paths))]
    _, found = read(hf_datasets.examples, section)
    assert [one.location for one in found] == [f"{tmp_path}/set: train row {number}" for number in range(5, 18)]
    for one, path in zip(found, bad, strict=False):
        assert f"field image: {path[:100]!r} is not a file inside the dataset ({tmp_path}/set)" in one.reason
    assert found[-1].reason == "field image: contains no image"
    told = capsys.readouterr().err
    assert "train row 5: field image: '/proc/self/environ' is not a file" in told and "13 rows of train" in told
    for path in (tmp_path / "root").rglob("*"):
        assert path.is_dir() or b"hf_secret" not in path.read_bytes()


def test_links_within_a_cache_of_the_hub_are_followed(tmp_path: Path) -> None:
    """A snapshot's files are links to blobs beside it."""
    cache = tmp_path / "datasets--some--rows"
    write(cache / "blobs/abc", png(5))
    named(cache / "snapshots/1/train.parquet", {"bytes": None, "path": "5.png"})
    (cache / "snapshots/1/5.png").symlink_to("../../blobs/abc")
    assert shown(tmp_path / "root", data(tmp_path / "root", file=str(cache / "snapshots/1"))) == [("0", 5)]


def test_a_folder_of_pictures_keeps_to_itself(tmp_path: Path) -> None:
    """`datasets` follows links of a folder of images."""
    write(tmp_path / "secret", "hf_secret")
    for name in ("cat/1.png", "dog/2.png"):
        write(tmp_path / "set/train" / name, png(len(name)))
    (tmp_path / "set/train/dog/3.png").symlink_to(tmp_path / "secret")
    section = data(tmp_path / "root", file=str(tmp_path / "set"), columns={"suffix": "label"})
    assert shown(tmp_path / "root", section) == [("cat", 9), ("dog", 9)]
    (bad,) = read(hf_datasets.examples, section)[1]
    assert "dog/3.png' is not a file inside" in bad.reason


@pytest.mark.parametrize("path", ["{}/secret.csv", "../secret.csv"])
def test_a_dataset_names_no_files_outside_of_it(tmp_path: Path, path: str) -> None:
    """Its README.md could make rows of any file of the machine."""
    write(tmp_path / "secret.csv", "image,prefix,suffix\na.png,q,hf_secret\n")
    write(tmp_path / "set/README.md", f"---\nconfigs:\n- config_name: a\n  data_files: {path.format(tmp_path)}\n---\n")
    with pytest.raises(UserError, match=r"it lists the file .*secret\.csv, which is outside"):
        read(hf_datasets.examples, data(tmp_path / "root", file=f"{tmp_path / 'set'}:a"))


def test_a_saved_dataset_names_no_files_outside_of_it(tmp_path: Path, datasets: Any) -> None:
    datasets.Dataset.from_dict({"image": ["a.png"], "suffix": ["x"]}).save_to_disk(str(tmp_path / "set"))
    (arrow,) = (tmp_path / "set").glob("*.arrow")
    arrow.rename(tmp_path / "other.arrow")
    state = (tmp_path / "set/state.json").read_text()
    write(tmp_path / "set/state.json", state.replace(arrow.name, "../other.arrow"))
    with pytest.raises(UserError, match=r"it lists the file .*other\.arrow, which is outside"):
        read(hf_datasets.examples, data(tmp_path / "root", file=str(tmp_path / "set")))


@pytest.mark.parametrize("typed", [True, False])
def test_lists_of_pictures(tmp_path: Path, datasets: Any, typed: bool) -> None:
    """Also where only the lists of one picture have been extracted, as version 0.1 did."""
    lists = [[{"bytes": png(grey), "path": None} for grey in greys] for greys in ((7,), (), (1, 2), (9,))]
    if typed:
        (tmp_path / "set").mkdir()
        features = datasets.Features({"image": [datasets.Image()], "suffix": datasets.Value("string")})
        content = {"image": lists, "suffix": list("0123")}
        datasets.Dataset.from_dict(content, features=features).to_parquet(str(tmp_path / "set/train.parquet"))
    else:
        named(tmp_path / "set/train.parquet", *lists)
    section = data(tmp_path / "root", file=str(tmp_path / "set"))
    root = tmp_path / "root"
    pictures = hf_datasets._pictures(section, hf_tables.load_tables(section))
    plain = hf_datasets._picture_folder(section, hf_datasets.content_version(section))
    with files.atomic_directory(root / plain) as folder:
        reason = "field image: 2 images in this row instead of one; make a row for each image"
        files.write_json(folder / "faults.json", {"train": {"3": reason}})
    hf_datasets.fetch(section)
    rows, bad = read(hf_datasets.examples, section)
    assert not bad and [len(row.images) for row in rows] == [1, 0, 2, 1]
    assert [(root / name).read_bytes() for row in rows for name in row.images] == [png(grey) for grey in (7, 1, 2, 9)]
    assert all(name.startswith(f"{pictures}/train/0000000") for row in rows for name in row.images)


def test_lists_of_one_picture_that_version_0_1_extracted_stay(tmp_path: Path) -> None:
    named(tmp_path / "set/train.parquet", [{"bytes": png(7), "path": None}])
    section = data(tmp_path / "root", file=str(tmp_path / "set"))
    plain = hf_datasets._picture_folder(section, hf_datasets.content_version(section))
    with files.atomic_directory(tmp_path / "root" / plain) as folder:
        files.write_json(folder / "faults.json", {"train": {}})
    hf_datasets.fetch(section)
    ((row,), bad) = read(hf_datasets.examples, section)
    assert not bad and row.images == [f"{plain}/train/00000001"]


def test_conversations_with_pictures_inside(tmp_path: Path, datasets: Any) -> None:
    features = datasets.Features(
        {
            "messages": [
                {
                    "role": datasets.Value("string"),
                    "content": [{"type": datasets.Value("string"), "text": datasets.Value("string")}],
                }
            ],
            "images": [datasets.Image()],
        }
    )
    parts = [{"type": "image", "text": None}, {"type": "image", "text": None}, {"type": "text", "text": "q"}]
    asked, answer = {"role": "user", "content": parts}, {"role": "assistant", "content": parts[2:]}
    pictures = [[{"bytes": png(grey), "path": None} for grey in greys] for greys in ((7, 8), (9,))]
    content = {"messages": [[asked, answer]] * 2, "images": pictures}
    (tmp_path / "set").mkdir()
    datasets.Dataset.from_dict(content, features=features).to_parquet(str(tmp_path / "set/train.parquet"))
    section = data(tmp_path / "root", file=str(tmp_path / "set"), columns={"image": "images"}, prompt="chat")
    hf_datasets.fetch(section)
    (row,), (bad,) = read(hf_datasets.examples, section)
    assert (row.prefix, row.suffix, len(row.images)) == ("q", "q", 2)
    assert "row 2" in bad.location and "2 placeholders in the messages for 1 images" in bad.reason


def test_instructions(tmp_path: Path) -> None:
    jsonl(
        tmp_path / "set/train.jsonl",
        {"instruction": "Add.", "input": "1, 2", "output": "3"},
        {"instruction": "Hi", "output": "ho"},
    )
    rows, bad = read(hf_datasets.examples, data(tmp_path, file=str(tmp_path / "set")))
    assert not bad
    assert rows[0] == Example("", "", "Add.", "3", [], {"instruction": "Add.", "input": "1, 2"}, "train")
    assert rows[1].facts == {"instruction": "Hi", "input": ""}


def test_chats(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    jsonl(tmp_path / "set/train.jsonl", {"messages": messages})
    (row,), _ = read(hf_datasets.examples, data(tmp_path, file=str(tmp_path / "set")))
    assert (row.id, row.prefix, row.suffix, row.facts["messages"]) == ("", "q", "a", messages[:1])


def test_conversations_with_images_are_no_text(tmp_path: Path, datasets: Any) -> None:
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    jsonl(tmp_path / "set/train.jsonl", {"conversations": turns})
    (row,), _ = read(hf_datasets.examples, data(tmp_path, file=str(tmp_path / "set")))
    assert (row.prefix, row.suffix) == ("q", "a")
    features = datasets.Features({"instruction": datasets.Value("string"), "images": [datasets.Image()]})
    content = {"instruction": ["q"], "images": [[{"bytes": png(9), "path": None}]]}
    (tmp_path / "other").mkdir()
    datasets.Dataset.from_dict(content, features=features).to_parquet(str(tmp_path / "other" / "train.parquet"))
    with pytest.raises(UserError, match="column images of split train would not be used"):
        read(hf_datasets.examples, data(tmp_path, file=str(tmp_path / "other")))


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
    (row,), _ = read(hf_datasets.examples, data(tmp_path, file="some/thing:small"))
    assert (row.id, row.suffix) == ("", "3")
    with pytest.raises(UserError, match="dataset some/other: cannot be read") as caught:
        read(hf_datasets.examples, data(tmp_path, file="some/other"))
    assert "ftlib stage CONFIG" in caught.value.remedy


def test_a_staged_dataset_is_read_from_the_store(tmp_path: Path) -> None:
    """Its tables go to a folder of this process: not to the store, which may be read-only, nor to a shared cache."""
    folder = tmp_path / "store" / "hf" / "hub" / "datasets--some--rows"
    with files.atomic_directory(folder / "snapshots" / ("c" * 40)) as temporary:
        jsonl(temporary / "train.jsonl", {"instruction": "Add.", "output": "3"})
    files.write_text(folder / "refs" / "main", "c" * 40)
    (row,), _ = read(hf_datasets.examples, data(tmp_path, file="some/rows"))
    assert (row.id, row.suffix) == ("", "3")
    assert not list((tmp_path / "cache").rglob("*.arrow")) and not list((tmp_path / "store").rglob("*.arrow"))


def test_faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jsonl(tmp_path / "set/train.jsonl", {"picture": "a", "text": "b"})
    with pytest.raises(UserError, match="split train has no column image; available: picture, text"):
        read(hf_datasets.examples, data(tmp_path, file=str(tmp_path / "set")))
    with pytest.raises(UserError, match="has no column label"):
        read(
            hf_datasets.examples,
            data(tmp_path, file=str(tmp_path / "set"), columns={"image": "picture", "suffix": "label"}),
        )
    with pytest.raises(UserError, match="must be the name of the dataset"):
        read(hf_datasets.examples, data(tmp_path))
    write(tmp_path / "torn/train.parquet", b"PAR1 no")
    with pytest.raises(UserError, match="torn: cannot be read: "):
        read(hf_datasets.examples, data(tmp_path, file=str(tmp_path / "torn")))
    with pytest.raises(UserError, match="nowhere: cannot be read: "):
        read(hf_datasets.examples, data(tmp_path, file=str(tmp_path / "nowhere")))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="needs `datasets`, which is not installed"):
        read(hf_datasets.examples, data(tmp_path, file=str(tmp_path / "set")))


def test_images_without_anything_else_are_no_empty_dataset(tmp_path: Path) -> None:
    """A table whose only column is not read would be one without rows."""
    write(tmp_path / "set/1.png", png(1))
    with pytest.raises(UserError, match="split train has no column of answers; available: image"):
        shown(tmp_path / "root", data(tmp_path / "root", file=str(tmp_path / "set")))


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"null\n", 1),
        (b'\xef\xbb\xbfnull\n{"image": "a", "suffix": "b"}\n', 1),
        (b'[null, {"image": "a", "suffix": "b"}]', 1),
        (b'{"image": "a", "suffix": "b"}\n null \n', 2),
    ],
)
def test_null_in_the_place_of_a_record(tmp_path: Path, content: bytes, line: int) -> None:
    """pyarrow would end the process."""
    write(tmp_path / "set/train.jsonl", content)
    with pytest.raises(UserError, match=rf"train\.jsonl:{line}: null instead of a record"):
        read(hf_datasets.examples, data(tmp_path, file=str(tmp_path / "set")))


def test_null_among_values_is_one(tmp_path: Path) -> None:
    records = [{"image": "a", "suffix": "b", "f": None, "l": [None, None]}]
    write(tmp_path / "set/train.json", json.dumps(records, indent=1))
    ((row,), bad) = read(hf_datasets.examples, data(tmp_path, file=str(tmp_path / "set")))
    assert row.suffix == "b" and not bad


def test_a_reason_is_told_where_the_reader_has_no_words(tmp_path: Path) -> None:
    write(tmp_path / "set/train.jsonl", b"")
    with pytest.raises(UserError, match=r"set: cannot be read: \w+"):
        read(hf_datasets.examples, data(tmp_path, file=str(tmp_path / "set")))


def test_parquet_is_read_in_place(tmp_path: Path) -> None:
    """It is not converted, which takes as much space again."""
    before = set(hf_tables._private_folder().rglob("*.arrow"))
    for number, greys in enumerate(((1, 2), (3,))):
        parquet(tmp_path / f"set/data/train-0000{number}-of-00002.parquet", *greys)
    section = data(tmp_path / "root", file=str(tmp_path / "set"))
    assert shown(tmp_path / "root", section) == [("1", 1), ("2", 2), ("3", 3)]
    assert set(hf_tables._private_folder().rglob("*.arrow")) == before


def test_parquet_files_that_do_not_fit_one_another(tmp_path: Path) -> None:
    parquet(tmp_path / "set/data/train-00000-of-00002.parquet", 1)
    parquet(tmp_path / "set/data/train-00001-of-00002.parquet", 2, split=[5])
    with pytest.raises(UserError, match=r"00001-of-00002\.parquet: columns differ from the first .*: split"):
        shown(tmp_path / "root", data(tmp_path / "root", file=str(tmp_path / "set")))


def test_parquet_that_is_damaged_inside(tmp_path: Path) -> None:
    parquet(tmp_path / "set/train.parquet", *range(200))
    section = data(tmp_path / "root", file=str(tmp_path / "set"))
    content = bytearray((tmp_path / "set/train.parquet").read_bytes())
    content[4:4000] = bytes(3996)
    write(tmp_path / "set/train.parquet", bytes(content))
    with pytest.raises(UserError, match="set: cannot be read: "):
        shown(tmp_path / "root", section)
    assert not list((tmp_path / "root").rglob("*0000*"))
    for number in (0, 1):
        parquet(tmp_path / f"other/data/train-0000{number}-of-00002.parquet", number)
    (tmp_path / "other/data/train-00001-of-00002.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(UserError, match="other: cannot be read: "):
        read(hf_datasets.examples, data(tmp_path / "root", file=str(tmp_path / "other")))


def test_types_that_only_the_readme_knows(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    (tmp_path / "set").mkdir()
    table = pyarrow.table({"image": ["a", "b"], "label": [1, 0]})
    pyarrow.parquet.write_table(table, tmp_path / "set" / "train.parquet")
    section = data(tmp_path, file=str(tmp_path / "set"), columns={"suffix": "label"})
    assert [row.suffix for row in read(hf_datasets.examples, section)[0]] == ["1", "0"]
    names = "{class_label: {names: {'0': 'no', '1': 'yes'}}}"
    lines = ["features:", "- {name: image, dtype: string}", f"- {{name: label, dtype: {names}}}"]
    write(tmp_path / "set/README.md", "\n".join(["---", "dataset_info:", *(f"  {line}" for line in lines), "---"]))
    assert [row.suffix for row in read(hf_datasets.examples, section)[0]] == ["yes", "no"]


def test_a_column_of_several_types(tmp_path: Path) -> None:
    """Newer versions of `datasets` keep it as JSON; it was left out."""
    rows = [{"image": "a", "suffix": "x", "more": [1, "b"]}, {"image": "a", "suffix": "y", "more": [{"c": None}]}]
    jsonl(tmp_path / "set/train.jsonl", *rows)
    try:
        found, _ = read(hf_datasets.examples, data(tmp_path, file=str(tmp_path / "set")))
    except UserError as error:  # older versions cannot read it
        assert "cannot be read" in error.problem
        return
    assert [row.facts["more"] for row in found] == [[1, "b"], [{"c": None}]]
