"""JSONL, CSV, folders of classes, instructions."""

from __future__ import annotations

import csv
import gzip
import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from ftlib.config.schema import Data, SplitRule
from ftlib.data.example import Example, InvalidRecord, to_json_line
from ftlib.data.prompts import render_prompt
from ftlib.data.sources import csv_table, imagefolder, instructions, jsonl
from ftlib.data.sources.registry import skipped_counts
from ftlib.errors import UserError
from tests.data.sources.releases import data, read, write

ROW = {"image": "a/../b.png", "prefix": "what?", "suffix": " 3 "}


def lines(root: Path, *rows: Any, name: str = "data.jsonl") -> Path:
    """Write lines: bytes as they are, other values as JSON."""
    return write(
        root / name, b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows)
    )


def test_jsonl(tmp_path: Path) -> None:
    lines(
        tmp_path,
        b'\xef\xbb\xbf{"image": "x.png", "prefix": "", "suffix": "\xe7\x8a\xac", "box": [1, 2]}\r',
        b" ",
        {**ROW, "id": "q", "references": ["3", "three"]},
        {"image": "c", "prefix": "", "references": ["r", "s"], "id": 7},
    )
    rows, bad = read(jsonl.examples, data(tmp_path))
    assert not bad
    assert rows == [
        Example("", "x.png", "", "犬", [], {"box": [1, 2]}),
        Example("q", "b.png", "what?", " 3 ", ["3", "three"]),
        Example("7", "c", "", "r", ["r", "s"]),
    ]


@pytest.mark.parametrize(
    ("fields", "suffix"),
    [
        ({"references": ["no", "yes", "maybe", "yes"]}, "yes"),
        ({"references": ["b", "a", "a", "b"]}, "b"),
        ({"references": ["no", "yes", "yes"], "suffix": "no"}, "no"),
        ({"references": [2, 2.0, 2]}, "2"),
        ({"suffix": 1}, "1"),
        ({"suffix": -1.5}, "-1.5"),
    ],
)
def test_the_answer_that_is_learned(tmp_path: Path, fields: dict[str, Any], suffix: str) -> None:
    """The most frequent one, of several the first; numbers as their text."""
    lines(tmp_path, {"image": "x.png", "prefix": "q", **fields})
    rows, bad = read(jsonl.examples, data(tmp_path))
    assert not bad and rows[0].suffix == suffix
    assert rows[0].references == [str(one) for one in fields.get("references", [])]


@pytest.mark.parametrize("value", [True, None, ["a"], float("nan"), {"a": 1}])
def test_what_is_no_answer(tmp_path: Path, value: Any) -> None:
    row = {"image": "x.png", "prefix": "q"}
    lines(tmp_path, {**row, "suffix": value}, {**row, "references": ["a", value]}, {**row, "references": value})
    rows, bad = read(jsonl.examples, data(tmp_path))
    reasons = [one.reason[:40] for one in bad]
    if value == ["a"]:
        assert [row.suffix for row in rows] == ["a"] and len(bad) == 2
    else:
        assert reasons[0].startswith("field suffix: must be text, got") and len(rows) == 0
        assert reasons[1:] == ["field references: must be a list of texts"[:40]] * 2


def test_jsonl_columns(tmp_path: Path) -> None:
    path = lines(
        tmp_path,
        {"file": "a.png", "question": "q?", "label": "x", "key": "k", "suffix": "other"},
        {"file": 3},
        name="my.jsonl",
    )
    columns = {"image": "file", "prefix": "question", "suffix": "label", "id": "key"}
    rows, bad = read(jsonl.examples, data(tmp_path, file="my.jsonl", columns=columns))
    assert rows == [Example("k", "a.png", "q?", "x", [], {"suffix": "other"})]
    assert bad == [InvalidRecord(f"{path}:2", "field file: must be text, got 3")]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"image": "\xff"}', "not UTF-8"),
        (b"[" * 100_000, "nested more than 64 deep"),
        (
            b'{"image": "x", "prefix": "", "suffix": "y", "f": ' + b"[" * 70 + b"]" * 70 + b"}",
            "nested more than 64 deep",
        ),
        (b'{"image": "x", "prefix": "", "suffix": "\\ud800"}', "a lone surrogate"),
        (b'{"image": "x", "prefix": "", "suffix": ' + b"9" * 5000 + b"}", "field suffix: must be text"),
        ({**ROW, "id": True}, "field id: must be text or a whole number, got True"),
    ],
)
def test_jsonl_lines_that_spoil_no_other(tmp_path: Path, line: Any, reason: str) -> None:
    path = lines(tmp_path, ROW, line, ROW)
    rows, bad = read(jsonl.examples, data(tmp_path))
    assert [row.location for row in rows] == [f"{path}:1", f"{path}:3"]
    assert [one.location for one in bad] == [f"{path}:2"] and reason in bad[0].reason


def test_jsonl_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"data\.jsonl: no such file"):
        read(jsonl.examples, data(tmp_path))
    (tmp_path / "data.jsonl").mkdir()
    with pytest.raises(UserError, match=r"data\.jsonl: cannot be read"):
        read(jsonl.examples, data(tmp_path))
    monkeypatch.setattr("ftlib.data.sources.json_stream.MAX_LINE", 50)
    write(tmp_path / "x.jsonl", b"\n" + b" " * 51)
    with pytest.raises(UserError, match=r"x\.jsonl:2: more than"):
        read(jsonl.examples, data(tmp_path, file="x.jsonl"))


def table(root: Path, *rows: list[Any], name: str = "data.csv") -> Path:
    with (root / name).open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    return root / name


def test_csv(tmp_path: Path) -> None:
    path = table(tmp_path, ["image", "label", "note"], ["a.png", "OK", 'say "no",\nor'], [], ["b.png", " NG ", ""])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    rows, bad = read(csv_table.examples, data(tmp_path, columns={"suffix": "label"}))
    assert not bad
    assert rows == [
        Example("", "a.png", "", "OK", [], {"note": 'say "no",\nor'}),
        Example("", "b.png", "", " NG ", [], {"note": ""}),
    ]


def test_csv_with_everything(tmp_path: Path) -> None:
    table(
        tmp_path,
        ["id", "image", "prefix", "suffix", "references"],
        ["k", "a", "q?", "x", '["x", "y"]'],
        ["l", "a", "", "z", ""],
    )
    rows, _ = read(csv_table.examples, data(tmp_path))
    assert rows == [Example("k", "a", "q?", "x", ["x", "y"]), Example("l", "a", "", "z", [])]


def test_csv_against_the_standard_reader(tmp_path: Path) -> None:
    chance = random.Random(1)
    cells = ["x", "", 'a "b"', "c,d", "e\nf", "g\r\nh", "犬", " i ", "'"]
    rows = [["a.png", "s", *(chance.choice(cells) for _ in range(3))] for _ in range(300)]
    table(tmp_path, ["image", "suffix", "f", "g", "h"], *rows)
    found, bad = read(csv_table.examples, data(tmp_path))
    assert not bad and [[row.facts[name] for name in "fgh"] for row in found] == [row[2:] for row in rows]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"a.png", "1 cells, but the header has 2"),
        (b"a.png,x,y", "3 cells, but the header has 2"),
        (b"a.png, ", "field suffix: is empty"),
        (b",x", "field image: is empty"),
        (b"a.png,\xff", "not UTF-8"),
        (b'"a.png"b,x', "not CSV"),
        (b"a\rb,x", "not CSV"),
    ],
)
def test_csv_faults(tmp_path: Path, line: bytes, reason: str) -> None:
    path = write(tmp_path / "data.csv", b"image,suffix\na.png,x\n" + line + b"\nb.png,y\n")
    rows, bad = read(csv_table.examples, data(tmp_path))
    assert [row.image for row in rows] == ["a.png", "b.png"]
    assert [one.location for one in bad] == [f"{path}:3"] and reason in bad[0].reason


def test_csv_quotes_that_nothing_closes(tmp_path: Path) -> None:
    path = write(tmp_path / "data.csv", b'image,suffix\na.png,x\nb.png,"y\nc.png,z\n')
    rows, bad = read(csv_table.examples, data(tmp_path))
    assert [row.image for row in rows] == ["a.png"]
    assert [one.location for one in bad] == [f"{path}:3"]
    write(path, path.read_bytes() + b"d.png,z\n" * 50_000)
    with pytest.raises(UserError, match=r"data\.csv:3: a cell extends to line 50,004; is a quote not closed"):
        read(csv_table.examples, data(tmp_path))


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"", r"data\.csv:1: no column image, suffix; available: none"),
        (b"image,text\n", r"no column suffix; available: image, text"),
        (b"image,suffix,image\n", "duplicate columns: image"),
        (b"image,\xff\n", "the header cannot be read: not UTF-8"),
        (b'image,"suffix\n', "the header cannot be read: not CSV"),
    ],
)
def test_csv_headers(tmp_path: Path, header: bytes, message: str) -> None:
    write(tmp_path / "data.csv", header)
    with pytest.raises(UserError, match=message):
        read(csv_table.examples, data(tmp_path))


def test_csv_columns_that_are_not_there(tmp_path: Path) -> None:
    table(tmp_path, ["image", "suffix"], ["a", "b"])
    with pytest.raises(UserError, match="no column question; available: image, suffix"):
        read(csv_table.examples, data(tmp_path, columns={"prefix": "question"}))
    table(tmp_path, ["image", "references"], ["a", '["x", "y"]'], ["a", "x"], ["a", '"x"'])
    rows, bad = read(csv_table.examples, data(tmp_path))
    assert [row.suffix for row in rows] == ["x"] and len(bad) == 2


def tree(root: Path, *names: str) -> Path:
    for name in names:
        write(root / name, b"")
    return root


def test_folder(tmp_path: Path) -> None:
    tree(
        tmp_path,
        "dog/b.JPG",
        "dog/a.png",
        "dog/old/2/c.gif",
        "cat/z.webp",
        "dog/old.png",
        "README.md",
        ".git/x.png",
        "cat/.x",
    )
    rows, bad = read(imagefolder.examples, data(tmp_path))
    assert not bad
    names = ["cat/z.webp", "dog/a.png", "dog/b.JPG", "dog/old/2/c.gif", "dog/old.png"]
    assert rows == [Example(name, name, "", name[:3]) for name in names]


def test_a_folder_in_two_places_is_no_circle(tmp_path: Path) -> None:
    tree(tmp_path, "dog/old/1.png", "dog/z/2.png", "cat/1.png")
    (tmp_path / "dog" / "young").symlink_to(tmp_path / "dog" / "old")
    rows, bad = read(imagefolder.examples, data(tmp_path))
    assert [row.id for row in rows] == ["cat/1.png", "dog/old/1.png", "dog/young/1.png", "dog/z/2.png"] and not bad


def test_folder_of_parts(tmp_path: Path) -> None:
    tree(tmp_path, "train/yes/1.png", "val/no/1.png", "test/yes/1.png", "train/loose.png")
    rows, bad = read(imagefolder.examples, data(tmp_path))
    assert [(row.id, row.part, row.suffix) for row in rows] == [
        ("test/yes/1.png", "test", "yes"),
        ("train/yes/1.png", "train", "yes"),
        ("val/no/1.png", "valid", "no"),
    ]
    assert [one.location for one in bad] == [str(tmp_path / "train/loose.png")]


@pytest.mark.parametrize(
    "names",
    [
        {"Train": "train", "Test": "test"},
        {"TRAIN": "train", "VAL": "valid", "TEST": "test"},
        {"training": "train", "validation": "valid", "testing": "test"},
        {"training_set": "train", "dev": "valid", "test_set": "test"},
        {"seg_train/seg_train": "train", "seg_test/seg_test": "test"},
    ],
)
def test_folders_of_parts_under_other_names(tmp_path: Path, names: dict[str, str]) -> None:
    """They were the classes, and the real classes were lost."""
    tree(tmp_path, *[f"{name}/{label}/1.png" for name in names for label in ("cat", "dog")])
    rows, bad = read(imagefolder.examples, data(tmp_path))
    assert not bad
    found = {(row.id, row.part, row.part_name, row.suffix) for row in rows}
    assert found == {
        (f"{name}/{label}/1.png", part, name.split("/")[0], label)
        for name, part in names.items()
        for label in ("cat", "dog")
    }


def test_classes_with_names_like_those_of_splits(tmp_path: Path) -> None:
    tree(tmp_path, "train/1.png", "bus/old/1.png", "test_tube/1.png", "train_station/1.png")
    rows, bad = read(imagefolder.examples, data(tmp_path))
    assert not bad and {(row.part, row.suffix) for row in rows} == {
        ("", "train"),
        ("", "bus"),
        ("", "test_tube"),
        ("", "train_station"),
    }


def test_parts_beside_other_folders(tmp_path: Path) -> None:
    tree(tmp_path, "Train/cat/1.png", "Test/cat/1.png", "pred/1.png", "pred/2.png")
    with pytest.raises(
        UserError, match=r"folders with split names \(Test, Train\) and other folders \(pred\)"
    ) as caught:
        read(imagefolder.examples, data(tmp_path))
    assert "data.splits, such as {left_out: [pred]}" in caught.value.remedy
    section = Data(source="folder", root=str(tmp_path), splits={"left_out": ["pred"]})
    rows, bad = read(imagefolder.examples, section)
    assert not bad and [(row.part, row.suffix) for row in rows] == [("test", "cat"), ("train", "cat")]
    assert skipped_counts(section) == {"data.splits leaves out pred": 2}
    tree(tmp_path, "blind/dog/1.png")
    rows, _ = read(imagefolder.examples, data(tmp_path, splits={"left_out": ["pred"], "test": ["blind"]}))
    assert [(row.part, row.part_name) for row in rows][-1] == ("test", "blind")


def test_folders_of_parts_whose_names_are_no_text(tmp_path: Path) -> None:
    tree(tmp_path, "test/cat/1.png")
    inner = Path(os.fsdecode(os.fsencode(tmp_path) + b"/train\xff"))
    tree(inner, "cat/1.png")
    rows, bad = read(imagefolder.examples, data(tmp_path))
    assert [(row.part, row.part_name) for row in rows] == [("test", "test")]
    assert ["not UTF-8" in one.reason for one in bad] == [True]
    for name in (b"other\xff", b"other"):
        tree(Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)), "1.png")
    with pytest.raises(UserError, match="and other folders") as caught:
        read(imagefolder.examples, data(tmp_path))
    str(caught.value).encode()


def test_classes_that_lie_deeper(tmp_path: Path) -> None:
    tree(tmp_path, "pets/cat/1.png", "pets/dog/1.png")
    with pytest.raises(UserError, match="a single class folder, pets, which contains folders") as caught:
        read(imagefolder.examples, data(tmp_path))
    assert f"set data.root to {tmp_path / 'pets'}" in caught.value.remedy
    tree(tmp_path, "flat/Train/1.png", "flat/test/1.png")
    with pytest.raises(UserError, match=r"folders with split names \(Train, test\) contain no class folders"):
        read(imagefolder.examples, data(tmp_path / "flat"))
    tree(tmp_path, "more/x/train/1.png", "more/x/test/1.png", "more/y/train/1.png")
    with pytest.raises(UserError, match="folders with split names below class folders: x/test, x/train, y/train"):
        read(imagefolder.examples, data(tmp_path / "more"))
    rows, _ = read(imagefolder.examples, data(tmp_path / "more", split=SplitRule(official=False)))
    assert [row.suffix for row in rows] == ["x", "x", "y"]


def test_what_systems_leave_in_folders(tmp_path: Path) -> None:
    junk = ("__MACOSX/cat/._1.png", "cat/.DS_Store", "cat/Thumbs.db", "cat/desktop.ini", "@eaDir/x/1.png")
    tree(tmp_path, "cat/1.png", "dog/.ipynb_checkpoints/1-checkpoint.png", "dog/2.png", *junk)
    rows, bad = read(imagefolder.examples, data(tmp_path))
    assert not bad and [row.id for row in rows] == ["cat/1.png", "dog/2.png"]


def test_folder_faults(tmp_path: Path) -> None:
    tree(tmp_path, "dog/notes.txt", "dog/a.png", "loose.jpg")
    (tmp_path / "empty").mkdir()
    (tmp_path / "dog" / "z").symlink_to(tmp_path / "dog")
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/dog/\xff.png")).touch()
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xfe")).mkdir()
    rows, bad = read(imagefolder.examples, data(tmp_path))
    assert [row.id for row in rows] == ["dog/a.png"]
    assert {(one.location.removeprefix(f"{tmp_path}/"), one.reason) for one in bad} == {
        ("loose.jpg", "an image outside of class folders"),
        ("dog/notes.txt", "not an image (by its name)"),
        ("dog/z", "a symbolic link loop"),
        ("dog/\ufffd.png", "its name is not UTF-8"),
        ("empty", "a class without any image"),
        ("\ufffd", "the folder's name is not a valid class: it is empty or not UTF-8"),
    }


def test_folder_roots(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no class folders"):
        read(imagefolder.examples, data(tmp_path))
    with pytest.raises(UserError, match="nowhere: cannot be read"):
        read(imagefolder.examples, data(tmp_path / "nowhere"))
    deep = tmp_path.joinpath("dog", *["d"] * 400)
    deep.mkdir(parents=True)
    tree(deep, "x.png")
    assert len(read(imagefolder.examples, data(tmp_path))[0]) == 1


ALPACA = [
    {"instruction": "Add.", "input": "1 and 2", "output": " 3 "},
    {"instruction": "名前は?", "input": "", "output": "OpenCALM"},
    {"instruction": "Say hi.", "output": "hi", "category": "qa"},
]


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_alpaca(tmp_path: Path, name: str) -> None:
    if name == "data.json":
        write(tmp_path / name, ALPACA)
    else:
        lines(tmp_path, *ALPACA)
    rows, bad = read(instructions.examples, data(tmp_path))
    assert not bad
    assert rows == [
        Example("", "", "Add.", " 3 ", [], {"instruction": "Add.", "input": "1 and 2"}),
        Example("", "", "名前は?", "OpenCALM", [], {"instruction": "名前は?", "input": ""}),
        Example("", "", "Say hi.", "hi", [], {"category": "qa", "instruction": "Say hi.", "input": ""}),
    ]


def test_instructions_under_other_names(tmp_path: Path) -> None:
    lines(tmp_path, {"question": "q?", "input": None, "answer": "a", "key": "k"}, name="x.jsonl")
    columns = {"prefix": "question", "suffix": "answer", "id": "key"}
    rows, _ = read(instructions.examples, data(tmp_path, file="x.jsonl", columns=columns))
    assert rows == [Example("k", "", "q?", "a", [], {"instruction": "q?", "input": ""}, group="k")]


def said(*turns: str) -> dict[str, Any]:
    roles = {"s": "system", "u": "user", "a": "assistant"}
    return {"messages": [{"role": roles[turn[0]], "content": turn[1:]} for turn in turns]}


def test_chats(tmp_path: Path) -> None:
    """Every answer is a row of its own, and what was said before is its prompt."""
    lines(tmp_path, {**said("uq", "aa"), "id": "one"}, said("sbe brief", "uq1", "aa1", "uq2", "aa2"))
    rows, bad = read(instructions.examples, data(tmp_path))
    assert not bad
    assert [(row.id, row.prefix, row.suffix, row.image) for row in rows] == [
        ("one-1", "q", "a", ""),
        ("", "q1", "a1", ""),
        ("", "q2", "a2", ""),
    ]
    assert rows[0].group == "one" and rows[1].group == rows[2].group != ""
    assert rows[2].facts == {**said("sbe brief", "uq1", "aa1", "uq2"), "instruction": "q2", "input": ""}


def test_dolly(tmp_path: Path) -> None:
    dolly = {"instruction": "Who?", "context": "Ada wrote it.", "response": "Ada", "category": "closed_qa"}
    lines(tmp_path, dolly, {**dolly, "context": ""}, {**dolly, "output": "x"}, {**dolly, "input": "y", "context": None})
    rows, bad = read(instructions.examples, data(tmp_path))
    assert not bad and [row.suffix for row in rows] == ["Ada", "Ada", "x", "Ada"]
    assert [row.facts["input"] for row in rows] == ["Ada wrote it.", "", "Ada wrote it.", "y"]
    assert render_prompt(rows[0], "chat") == '[{"role": "user", "content": "Who?\\n\\nAda wrote it."}]'


def test_alpaca_with_a_system_text_and_a_history(tmp_path: Path) -> None:
    lines(tmp_path, {**ALPACA[2], "system": "Be kind.", "history": [["Hi.", "Hello."]]})
    rows, _ = read(instructions.examples, data(tmp_path))
    assert [turn["content"] for turn in json.loads(render_prompt(rows[0], "chat"))] == [
        "Be kind.",
        "Hi.",
        "Hello.",
        "Say hi.",
    ]
    assert render_prompt(rows[0], "alpaca").startswith("Be kind.\n\n### Instruction:\nHi.\n\n### Response:\nHello.\n\n")


def test_sharegpt(tmp_path: Path) -> None:
    turns = [("human", "q1"), ("gpt", "a1"), ("user", "q2"), ("assistant", "a2")]
    record = {"conversations": [{"from": role, "value": text} for role, text in turns], "system": "Be kind."}
    lines(tmp_path, record)
    rows, bad = read(instructions.examples, data(tmp_path))
    assert not bad and [(row.prefix, row.suffix) for row in rows] == [("q1", "a1"), ("q2", "a2")]
    assert rows[1].facts["messages"] == said("sBe kind.", "uq1", "aa1", "uq2")["messages"]


@pytest.mark.parametrize(
    "mark", [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"loss_weight": 0}, {"loss": False}, {"training": False}]
)
def test_answers_that_are_not_to_be_learned(tmp_path: Path, mark: dict[str, Any]) -> None:
    """They give no row, and stay where they are in the conversation."""
    chat = said("uq1", "aa1", "uq2", "aa2", "uq3", "aa3")
    for place, message in enumerate(chat["messages"]):
        message |= mark if place in (1, 3) else dict.fromkeys(mark, 1)
    lines(tmp_path, chat, said("uq", "aa"))
    rows, bad = read(instructions.examples, data(tmp_path))
    assert not bad and [(row.suffix, row.unlabelled_turns) for row in rows] == [("a3", 2), ("a", 0)]
    assert rows[0].facts["messages"] == said("uq1", "aa1", "uq2", "aa2", "uq3")["messages"]
    assert "unlearned" not in to_json_line(rows[0], None)


def test_messages_in_parts(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "q"}, {"type": "text", "text": "1"}]
    chat = said("uq", "aa")
    lines(tmp_path, {"messages": [{"role": "user", "content": parts}, chat["messages"][1]]})
    rows, _ = read(instructions.examples, data(tmp_path))
    assert rows[0].prefix == "q1"


def parts(*kinds: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(kinds)}, {"role": "assistant", "content": "a"}]}


def marked(**fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", **fields}]}


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (
            parts({"type": "image"}, {"type": "text", "text": "q"}),
            "images: 1 placeholders in the messages for 0 images",
        ),
        (parts({"type": "video", "video": "x"}), "message 1: a part of type video: only texts and images"),
        (parts({"type": "image_url", "image_url": {"url": 3}}), "the image_url of an image part must be a path"),
        (parts({"type": "text"}), "message 1: must be an object with a text `content`"),
        ({**said("uq", "aa"), "images": [3]}, "field images: must be a path or a list of paths"),
        ({**said("uq", "aa"), "images": ["1.png"], "image": "2.png"}, "fields image and images: images in both"),
        ({**said("u<image>q", "aa"), "images": []}, "images: 1 placeholders in the messages for 0 images"),
        ({**said("u<image>q", "aa"), "images": ["1.png", "2.png"]}, "images: 1 placeholders in the messages for 2"),
        ({**said("uq", "a<image>"), "image": "1.png"}, "message 2: an image in a turn of role assistant"),
        ({**said("u<video>q", "aa"), "image": "1.png"}, "message 1: <video>: videos and sounds are not supported"),
        ({"instruction": "a <image> b", "output": "y", "image": "1.png"}, "images between words need `messages`"),
        ({"instruction": "<image>a", "output": "y", "images": []}, "1 placeholders <image> for 0 images"),
        ({"instruction": "x", "output": "y", "videos": ["1.mp4"]}, "field videos: videos and sounds"),
        ({**said("uq", "aa"), "tools": "f(x)"}, "field tools: must be a list of tools, or its JSON"),
        ({**said("uq", "aa"), "prompt": "q", "completion": "a"}, "can be read as a conversation (messages) and as TRL"),
        ({**ALPACA[0], **said("uq", "aa")}, "and as an instruction (instruction, output); set data.columns"),
        ({**said("uq", "aa"), "conversations": []}, "fields messages and conversations: only one"),
        ({**said("sx", "uq", "aa"), "system": "y"}, "field system: messages also has a system message"),
        ({**said("uq", "aa"), "system": 3}, "field system: must be text, got 3"),
        ({"conversations": [{"from": "bot", "value": "x"}]}, "message 1: role human or gpt or"),
        ({"conversations": [{"from": "function_call", "value": "f"}]}, "a function_call must be the JSON of a call"),
        ({"conversations": [{"from": "human", "value": 3}]}, "message 1: must be an object with a text `value`"),
        (marked(weight=0), "field messages: none of its answers is marked"),
        (marked(weight=0.5), "message 2: field weight: must be 0 or 1, got 0.5"),
        (marked(train="no"), "message 2: field train: must be 0 or 1, got 'no'"),
        (marked(tool_calls=[{}]), "message 2: a tool call needs a function with a name"),
        (marked(tool_calls=[{"name": "f", "arguments": "{"}]), "message 2: arguments of a tool call: not JSON"),
        (marked(reasoning_content="hm"), "message 2: field reasoning_content: is not supported"),
        ({**said("uq", "aa"), "label": False}, "field label: false marks a bad answer"),
        ({"instruction": "x", "output": "y", "kto_tag": False}, "field kto_tag: false marks a bad answer"),
        (
            {"prompt": "x", "chosen": "y"},
            "field instruction: is missing; available: prompt, chosen (set data.columns",
        ),
        ({"instruction": "x", "output": "y", "input": "a", "context": "b"}, "fields input and context: only one"),
        ({"instruction": "x", "output": "y", "history": ["a"]}, "field history: must be a list of [question, answer]"),
        ({"instruction": "x", "output": "y", "system": ["a"]}, "field system: must be text, got ['a']"),
        ({"instruction": "x"}, "field output: is missing"),
        ({"instruction": " ", "output": "y"}, "field instruction: is empty"),
        ({"instruction": "x", "output": ""}, "field output: is empty"),
        ({"instruction": "x", "output": "y", "input": 3}, "field input: must be text, got 3"),
        ({"instruction": "x", "output": "y", "id": []}, "field id: must be text or a whole number"),
        ({"messages": "x"}, "must be a list of messages"),
        ({"messages": []}, "the last message must be an answer"),
        ({"messages": ["x"]}, "message 1: must be an object with a text `content`"),
        (
            {"messages": [{"role": "bot", "content": "x"}]},
            "message 1: role system or user or assistant or tool expected, got 'bot'",
        ),
        (said("aa"), "message 1 is an answer without a user message"),
        (said("uq", "aa", "ab"), "message 3 is an answer without a user message"),
        (said("uq", "aa", "uq"), "the last message must be an answer"),
        (said("uq", "a "), "field messages: is empty"),
    ],
)
def test_instruction_faults(tmp_path: Path, record: Any, reason: str) -> None:
    path = write(tmp_path / "data.json", [ALPACA[0], record, ALPACA[1]])
    rows, bad = read(instructions.examples, data(tmp_path))
    assert [row.location for row in rows] == [f"{path}: record 1", f"{path}: record 3"]
    assert [one.location for one in bad] == [f"{path}: record 2"] and reason in bad[0].reason


def test_fields_beside_a_chat_are_kept(tmp_path: Path) -> None:
    """They were dropped without a word: KTO's label, where a chat comes from."""
    record = {**said("sx", "uq", "aa"), "label": True, "tools": "[]"}
    write(tmp_path / "data.json", [record, {**said("uq", "aa"), "system": "s", "source": "web"}])
    (first, second), bad = read(instructions.examples, data(tmp_path))
    assert not bad and {"label": True, "tools": "[]"}.items() <= first.facts.items()
    assert set(second.facts) == {"source", "messages", "instruction", "input"}


def test_instruction_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"contains neither data\.jsonl nor data\.json"):
        read(instructions.examples, data(tmp_path))
    path = write(tmp_path / "data.json", {"a": 1})
    assert read(instructions.examples, data(tmp_path))[1] == [
        InvalidRecord(f"{path}:1", "field instruction: is missing; available: a (set data.columns for other names)")
    ]
    write(tmp_path / "data.jsonl", "")
    with pytest.raises(UserError, match=r"contains both data\.jsonl and data\.json"):
        read(instructions.examples, data(tmp_path))


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.txt", "x"])
def test_lists_and_lines_are_known_by_their_content(tmp_path: Path, name: str) -> None:
    """Whatever the file is called: a list, in one line or several, or a record in each line."""
    records = [{"image": f"{n}.png", "prefix": "", "suffix": "犬"} for n in range(3)]
    written = [json.dumps(records), json.dumps(records, indent=1), "\ufeff\n " + json.dumps(records)]
    written.append("\n".join(json.dumps(record, ensure_ascii=False) for record in records))
    for text in written:
        write(tmp_path / name, text)
        rows, bad = read(jsonl.examples, data(tmp_path, file=name))
        assert not bad and [row.image for row in rows] == ["0.png", "1.png", "2.png"]
    write(tmp_path / name, json.dumps([{"instruction": "q", "output": "a"}]))
    assert len(read(instructions.examples, data(tmp_path, file=name))[0]) == 1


def test_a_first_line_that_is_a_list_is_a_faulty_record(tmp_path: Path) -> None:
    path = lines(tmp_path, [1], ROW)
    rows, bad = read(jsonl.examples, data(tmp_path))
    assert len(rows) == 1 and bad == [InvalidRecord(f"{path}:1", "not a JSON object")]


def test_one_object_over_several_lines(tmp_path: Path) -> None:
    write(tmp_path / "data.jsonl", json.dumps({"data": [ROW]}, indent=2))
    with pytest.raises(UserError, match="a JSON object over several lines") as caught:
        read(jsonl.examples, data(tmp_path))
    assert "Write a list of records" in caught.value.remedy


JAPANESE = "これは犬です。①〜"
ENCODED = [
    ("utf-16", JAPANESE),
    ("utf-16-le", JAPANESE),
    ("utf-16-be", JAPANESE),
    ("utf-32", JAPANESE),
    ("shift_jis", "これは犬です。"),
    ("cp932", "これは犬です。①"),
    ("euc_jp", "これは犬です。"),
    ("cp1252", "été – naïve"),
    ("latin-1", "été naïve"),
]


def in_encoding(root: Path, kind: str, encoding: str, text: str) -> tuple[Any, str]:
    """A table of 200 rows; its loader and name."""
    records = [{"image": f"{n}.png", "prefix": "", "suffix": text} for n in range(200)]
    if kind == "csv":
        written = "image,suffix\n" + "".join(f"{record['image']},{text}\n" for record in records)
    elif kind == "list":
        written = json.dumps(records, ensure_ascii=False)
    else:
        written = "\r\n".join(json.dumps(record, ensure_ascii=False) for record in records)
    write(root / "x", written.encode(encoding))
    return (csv_table.examples if kind == "csv" else jsonl.examples), "x"


@pytest.mark.parametrize("kind", ["csv", "list", "lines"])
@pytest.mark.parametrize(("encoding", "text"), ENCODED)
def test_encodings_are_known_and_read(tmp_path: Path, kind: str, encoding: str, text: str) -> None:
    examples, name = in_encoding(tmp_path, kind, encoding, text)
    try:
        rows, bad = read(examples, data(tmp_path, file=name))
        told = bad[0].reason
        assert not rows and len(bad) == 200 and told.startswith("not UTF-8")
    except UserError as error:
        told = f"{error.problem} {error.remedy}"
        assert "not UTF-8" in told
    assert f"data.encoding: {'cp1252' if encoding == 'latin-1' else encoding}" in told
    rows, bad = read(examples, data(tmp_path, file=name, encoding=encoding))
    assert not bad and len(rows) == 200 and {row.suffix for row in rows} == {text}


@pytest.mark.parametrize("encoding", ["", "cp1252"])
@pytest.mark.parametrize("read_of", [jsonl.examples, csv_table.examples, instructions.examples])
def test_packed_files_are_no_text(tmp_path: Path, read_of: Any, encoding: str) -> None:
    """They were said to be Western European: followed, that gave rows of rubbish."""
    for name, content, what in (
        ("a.gz", gzip.compress(b"x"), "gzip, not text"),
        ("a.xlsx", b"PK\3\4...", "a zip archive or a spreadsheet, not text"),
        ("a.parquet", b"PAR1...", "Parquet, not text"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{name}: {what}"):
            read(read_of, data(tmp_path, file=name, encoding=encoding))


def test_a_damaged_line_is_no_other_encoding(tmp_path: Path) -> None:
    """Japanese UTF-8 of which a byte is lost stays what it is, however long its lines are."""
    row = {"image": "x.png", "prefix": "", "suffix": JAPANESE * 2000}
    good = json.dumps(row, ensure_ascii=False).encode()
    for place in (60, 61, 62):
        path = lines(tmp_path, good, good[:place] + good[place + 1 :], good)
        rows, bad = read(jsonl.examples, data(tmp_path))
        assert len(rows) == 2 and bad[0].location == f"{path}:2" and bad[0].reason.startswith("not UTF-8")


@pytest.mark.parametrize("encoding", ["shift_jis", "cp932", "euc_jp"])
def test_a_line_that_is_not_in_the_encoding_either(tmp_path: Path, encoding: str) -> None:
    good = json.dumps({**ROW, "suffix": "これは犬です。"}, ensure_ascii=False).encode(encoding)
    path = lines(tmp_path, good, b'{"image": "\x81 \xc3\xa9\x81"}', good)
    rows, bad = read(jsonl.examples, data(tmp_path, encoding=encoding))
    assert len(rows) == 2 and bad == [InvalidRecord(f"{path}:2", f"not {encoding}")]
    write(tmp_path / "data.jsonl", good * 3)
    with pytest.raises(UserError, match=r"data\.jsonl: not utf-16"):
        read(jsonl.examples, data(tmp_path, encoding="utf-16"))


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_the_header_tells_what_stands_between_cells(tmp_path: Path, delimiter: str) -> None:
    rows = [["image", "label", "note"], ["a.png", "x", "1,5;2\t3"], ["b.png", 'say "no"', ""]]
    with (tmp_path / "data.csv").open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file, delimiter=delimiter).writerows(rows)
    found, bad = read(csv_table.examples, data(tmp_path, columns={"suffix": "label"}))
    assert not bad and [(row.image, row.suffix, row.facts["note"]) for row in found] == [
        ("a.png", "x", "1,5;2\t3"), ("b.png", 'say "no"', ""),
    ]  # fmt: skip


def test_headers_that_do_not_tell(tmp_path: Path) -> None:
    write(tmp_path / "data.csv", "image,suffix,a;image;suffix\n")
    with pytest.raises(UserError, match=r"data\.csv:1: ambiguous delimiter: the header can be read with ',' and ';'"):
        read(csv_table.examples, data(tmp_path))
    write(tmp_path / "data.csv", "image;label;note\n")
    with pytest.raises(UserError, match="no column suffix; available: image, label, note"):
        read(csv_table.examples, data(tmp_path))


def test_long_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page of text in a cell is read; a quote that swallows a thousand rows is none, although another closes it."""
    text = "word, " * 100_000
    path = table(tmp_path, ["image", "suffix"], ["a.png", text], ["b.png", "x"])
    rows, bad = read(csv_table.examples, data(tmp_path))
    assert not bad and [row.suffix for row in rows] == [text, "x"]
    path = write(path, 'image,suffix\na.png,"y\n' + "b.png,z\n" * 20_000 + 'c.png,x"\nd.png,z\n')
    with pytest.raises(UserError, match=r"data\.csv:2: a cell extends to line 20,003"):
        read(csv_table.examples, data(tmp_path))
    monkeypatch.setattr("ftlib.data.sources.csv_table.MAX_CELL", 1000)
    table(tmp_path, ["image", "suffix"], ["a.png", "x" * 1001])
    with pytest.raises(UserError, match=r"data\.csv:2: a cell extends to line 2") as caught:
        read(csv_table.examples, data(tmp_path))
    assert "at most 1,000 characters" in caught.value.remedy


def test_encodings_of_a_config() -> None:
    part = {"name": "a", "source": "csv", "encoding": "shift_jis"}
    mixture = Data(source="mixture", root="r", parts=[part])  # type: ignore[list-item]
    assert mixture.datasets["a"].encoding == "shift_jis"
    for section, message in (
        ({"source": "jsonl", "encoding": "klingon"}, "encoding: klingon is unknown"),
        ({"source": "jsonl", "encoding": "hex"}, "encoding: hex is unknown"),
        ({"source": "vqav2", "encoding": "utf-16"}, "files of source vqav2 are UTF-8"),
        (
            {"source": "mixture", "encoding": "utf-16", "parts": [part]},
            "for a mixture, set .*encoding, .* in its parts",
        ),
        ({"source": "mixture", "parts": [{**part, "source": "folder"}]}, "files of source folder are UTF-8"),
    ):
        with pytest.raises(ValidationError, match=message):
            Data.model_validate({"root": "r", **section})


def test_a_prefix_that_the_prompt_does_not_show_may_be_missing(tmp_path: Path) -> None:
    """As in Hugging Face's metadata.jsonl, which has file_name and text."""
    lines(tmp_path, {"file_name": "a.jpg", "text": "a cat"}, name="metadata.jsonl")
    how = {"file": "metadata.jsonl", "columns": {"image": "file_name", "suffix": "text"}}
    rows, bad = read(jsonl.examples, data(tmp_path, "jsonl", prompt="caption en", **how))
    assert not bad and [(row.image, row.prefix, row.suffix) for row in rows] == [("a.jpg", "", "a cat")]
    for prompt in ("{prefix}", "say {prefix}", "alpaca"):
        rows, bad = read(jsonl.examples, data(tmp_path, "jsonl", prompt=prompt, **how))
        assert not rows and "field prefix: is missing" in bad[0].reason
    named = how | {"columns": {"image": "file_name", "suffix": "text", "prefix": "q"}}
    rows, bad = read(jsonl.examples, data(tmp_path, "jsonl", prompt="caption en", **named))
    assert not rows and "field q: is missing" in bad[0].reason


@pytest.mark.parametrize(("first", "between"), [(b"sep=;\r\n", ";"), (b'"sep=|"\n', "|"), (b"sep=,\n", ",")])
def test_csv_that_names_its_delimiter(tmp_path: Path, first: bytes, between: str) -> None:
    """As Excel has it: the first line."""
    table = f"image{between}suffix\na.png{between}x, y; z\n".replace("x, y; z", '"x, y; z"').encode()
    write(tmp_path / "data.csv", first + table)
    rows, bad = read(csv_table.examples, data(tmp_path, "csv"))
    assert not bad and [(row.image, row.suffix) for row in rows] == [("a.png", "x, y; z")]
    write(tmp_path / "data.csv", first + table + f"b.png{between}1{between}2\n".encode())
    rows, bad = read(csv_table.examples, data(tmp_path, "csv"))
    assert len(rows) == 1 and bad[0].location.endswith("data.csv:4")


@pytest.mark.parametrize(
    "names", [("images", "masks"), ("images", "labels"), ("JPEGImages", "Annotations", "ImageSets")]
)
def test_folders_of_images_and_of_what_belongs_to_them_are_no_classes(tmp_path: Path, names: tuple[str, ...]) -> None:
    tree(tmp_path, *(f"{name}/1.png" for name in names))
    with pytest.raises(UserError, match=f"folders .*{names[0]}.* are not classes"):
        read(imagefolder.examples, data(tmp_path, "folder"))
    tree(tmp_path, "cat/1.png")
    assert len(read(imagefolder.examples, data(tmp_path, "folder"))[0]) == len(names) + 1


def test_fields_of_messages_that_nothing_uses_are_known(tmp_path: Path) -> None:
    said = [{"role": "user", "content": "q", "name": "Eve", "train": False}, {"role": "assistant", "content": "a"}]
    lines(tmp_path, {"messages": said}, {"messages": [said[0], {**said[1], "ts": 3}]})
    rows, bad = read(instructions.examples, data(tmp_path))
    assert not bad and [row.unused for row in rows] == [{"messages.name"}, {"messages.name", "messages.ts"}]
