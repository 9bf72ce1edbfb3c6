"""JSONL, CSV, folders of classes, instructions."""

from __future__ import annotations

import csv
import json
import os
import random
from pathlib import Path
from typing import Any

import pytest

from ftlib.data.examples import Bad, Example
from ftlib.data.loaders import csv_table, folder, instructions, jsonl
from ftlib.errors import UserError
from tests.data.loaders.releases import data, read, write

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
        Example("1", "x.png", "", "犬", [], {"box": [1, 2]}),
        Example("q", "b.png", "what?", "3", ["3", "three"]),
        Example("7", "c", "", "r", ["r", "s"]),
    ]


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
    assert bad == [Bad(f"{path}:2", "field file: must be text, got 3")]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"image": "\xff"}', "not UTF-8"),
        (b"[" * 100_000, "nested more than 64 deep"),
        (
            b'{"image": "x", "prefix": "", "suffix": "y", "f": ' + b"[" * 70 + b"]" * 70 + b"}",
            "nested more than 64 deep",
        ),
        (b'{"image": "x", "prefix": "", "suffix": "\\ud800"}', "half a surrogate pair"),
        (b'{"image": "x", "prefix": "", "suffix": ' + b"9" * 5000 + b"}", "field suffix: must be text"),
        ({**ROW, "id": True}, "field id: must be text or a number, got True"),
    ],
)
def test_jsonl_lines_that_spoil_no_other(tmp_path: Path, line: Any, reason: str) -> None:
    path = lines(tmp_path, ROW, line, ROW)
    rows, bad = read(jsonl.examples, data(tmp_path))
    assert [row.id for row in rows] == ["1", "3"]
    assert [one.place for one in bad] == [f"{path}:2"] and reason in bad[0].reason


def test_jsonl_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"data\.jsonl: no such file"):
        read(jsonl.examples, data(tmp_path))
    (tmp_path / "data.jsonl").mkdir()
    with pytest.raises(UserError, match=r"data\.jsonl: cannot be read"):
        read(jsonl.examples, data(tmp_path))
    monkeypatch.setattr("ftlib.data.loaders.lines.MAX_LINE", 50)
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
        Example("2", "a.png", "", "OK", [], {"note": 'say "no",\nor'}),
        Example("5", "b.png", "", "NG", [], {"note": ""}),
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
    assert [one.place for one in bad] == [f"{path}:3"] and reason in bad[0].reason


def test_csv_quotes_that_nothing_closes(tmp_path: Path) -> None:
    path = write(tmp_path / "data.csv", b'image,suffix\na.png,x\nb.png,"y\nc.png,z\n')
    rows, bad = read(csv_table.examples, data(tmp_path))
    assert [row.image for row in rows] == ["a.png"]
    assert [one.place for one in bad] == [f"{path}:3"]
    write(path, path.read_bytes() + b"d.png,z\n" * 50_000)
    with pytest.raises(UserError, match=r"data\.csv:3: a cell of more than 131,072 characters"):
        read(csv_table.examples, data(tmp_path))


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"", r"data\.csv:1: no column image, suffix; there are: none"),
        (b"image,text\n", r"no column suffix; there are: image, text"),
        (b"image,suffix,image\n", "columns of the same name: image"),
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
    with pytest.raises(UserError, match="no column question; there are: image, suffix"):
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
    rows, bad = read(folder.examples, data(tmp_path))
    assert not bad
    names = ["cat/z.webp", "dog/a.png", "dog/b.JPG", "dog/old/2/c.gif", "dog/old.png"]
    assert rows == [Example(name, name, "", name[:3]) for name in names]


def test_a_folder_in_two_places_is_no_circle(tmp_path: Path) -> None:
    tree(tmp_path, "dog/old/1.png", "dog/z/2.png")
    (tmp_path / "dog" / "young").symlink_to(tmp_path / "dog" / "old")
    rows, bad = read(folder.examples, data(tmp_path))
    assert [row.id for row in rows] == ["dog/old/1.png", "dog/young/1.png", "dog/z/2.png"] and not bad


def test_folder_of_parts(tmp_path: Path) -> None:
    tree(tmp_path, "train/yes/1.png", "val/no/1.png", "test/yes/1.png", "train/loose.png")
    rows, bad = read(folder.examples, data(tmp_path))
    assert [(row.id, row.part, row.suffix) for row in rows] == [
        ("test/yes/1.png", "test", "yes"),
        ("train/yes/1.png", "train", "yes"),
        ("val/no/1.png", "valid", "no"),
    ]
    assert [one.place for one in bad] == [str(tmp_path / "train/loose.png")]
    tree(tmp_path, "other/1.png")
    rows, _ = read(folder.examples, data(tmp_path))
    assert {(row.part, row.suffix) for row in rows} == {("", "train"), ("", "val"), ("", "test"), ("", "other")}


def test_folder_faults(tmp_path: Path) -> None:
    tree(tmp_path, "dog/Thumbs.db", "dog/a.png", "loose.jpg")
    (tmp_path / "empty").mkdir()
    (tmp_path / "dog" / "z").symlink_to(tmp_path / "dog")
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/dog/\xff.png")).touch()
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xfe")).mkdir()
    rows, bad = read(folder.examples, data(tmp_path))
    assert [row.id for row in rows] == ["dog/a.png"]
    assert {(one.place.removeprefix(f"{tmp_path}/"), one.reason) for one in bad} == {
        ("loose.jpg", "an image that lies in no class folder"),
        ("dog/Thumbs.db", "no image by its name"),
        ("dog/z", "a folder that leads back to one that it lies in"),
        ("dog/\ufffd.png", "its name is not UTF-8"),
        ("empty", "a class without any image"),
        ("\ufffd", "the folder's name cannot be a class: it is empty or not UTF-8"),
    }


def test_folder_roots(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no class folders"):
        read(folder.examples, data(tmp_path))
    with pytest.raises(UserError, match="nowhere: cannot be read"):
        read(folder.examples, data(tmp_path / "nowhere"))
    deep = tmp_path.joinpath("dog", *["d"] * 400)
    deep.mkdir(parents=True)
    tree(deep, "x.png")
    assert len(read(folder.examples, data(tmp_path))[0]) == 1


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
        Example("1", "", "Add.", "3", [], {"instruction": "Add.", "input": "1 and 2"}, group="1"),
        Example("2", "", "名前は?", "OpenCALM", [], {"instruction": "名前は?", "input": ""}, group="2"),
        Example("3", "", "Say hi.", "hi", [], {"category": "qa", "instruction": "Say hi.", "input": ""}, group="3"),
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
    assert [(row.id, row.prefix, row.suffix, row.group, row.image) for row in rows] == [
        ("one-1", "q", "a", "one", ""),
        ("2-1", "q1", "a1", "2", ""),
        ("2-2", "q2", "a2", "2", ""),
    ]
    assert rows[2].facts == {**said("sbe brief", "uq1", "aa1", "uq2"), "instruction": "q2", "input": ""}


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"instruction": "x"}, "field output: is missing"),
        ({"instruction": " ", "output": "y"}, "field instruction: is empty"),
        ({"instruction": "x", "output": ""}, "field output: is empty"),
        ({"instruction": "x", "output": "y", "input": 3}, "field input: must be text, got 3"),
        ({"instruction": "x", "output": "y", "id": []}, "field id: must be text or a number"),
        ({"messages": "x"}, "a list of messages is needed"),
        ({"messages": []}, "the last message must be an answer"),
        ({"messages": ["x"]}, "message 1: an object with a text `content`"),
        (
            {"messages": [{"role": "tool", "content": "x"}]},
            "message 1: role system or user or assistant expected, got 'tool'",
        ),
        (said("aa"), "message 1 answers, but none of the user"),
        (said("uq", "aa", "ab"), "message 3 answers, but none of the user"),
        (said("uq", "aa", "uq"), "the last message must be an answer"),
        (said("uq", "a "), "field messages: is empty"),
    ],
)
def test_instruction_faults(tmp_path: Path, record: Any, reason: str) -> None:
    path = write(tmp_path / "data.json", [ALPACA[0], record, ALPACA[1]])
    rows, bad = read(instructions.examples, data(tmp_path))
    assert [row.id for row in rows] == ["1", "3"]
    assert [one.place for one in bad] == [f"{path}: record 2"] and reason in bad[0].reason


def test_instruction_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"neither data\.jsonl nor data\.json lies there"):
        read(instructions.examples, data(tmp_path))
    write(tmp_path / "data.json", {"a": 1})
    with pytest.raises(UserError, match=r"data\.json:1: a list of records is needed"):
        read(instructions.examples, data(tmp_path))
    write(tmp_path / "data.jsonl", "")
    with pytest.raises(UserError, match=r"both data\.jsonl and data\.json lie there"):
        read(instructions.examples, data(tmp_path))
