"""JSON files read piece by piece: the same as read at once, whatever the pieces, and every fault named."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from ftlib.data.sources import json_stream
from ftlib.data.sources.json_stream import InvalidJson, parse_json, stream_list, stream_lists, stream_members
from ftlib.errors import UserError


def random_value(chance: random.Random, depth: int = 0) -> Any:
    if depth < 3 and chance.random() < 0.5:
        values = [random_value(chance, depth + 1) for _ in range(chance.randrange(4))]
        return values if chance.random() < 0.5 else {f"k{n}": value for n, value in enumerate(values)}
    return chance.choice([None, True, -3, 12345678901, 0.125, -1e-7, "", 'a"b\\', "naïve 犬 😀", "]},:[{"])


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 64])
def test_any_piece_gives_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(json_stream, "CHUNK", chunk)
    chance = random.Random(chunk)
    for number in range(20):
        values = [random_value(chance) for _ in range(6)]
        content = {"info": {"x": [1]}, "skipped": values[:3], "rows": values, "n": 12, "more": [7]}
        path = tmp_path / f"{number}.json"
        text = json.dumps(content, ensure_ascii=number % 2 == 0, indent=number % 3 or None)
        path.write_text(text, encoding="utf-8-sig" if number % 2 else "utf-8")
        found = list(stream_lists(path, ["more", "rows"]))
        assert found == [("rows", n, value) for n, value in enumerate(values, 1)] + [("more", 1, 7)]
        assert list(stream_members(path)) == list(content.items())
        path.write_text(json.dumps(values))
        assert list(stream_list(path)) == list(enumerate(values, 1))


def test_a_number_at_the_end_of_a_piece_is_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_stream, "CHUNK", 4)
    (tmp_path / "x.json").write_text("[123456789]")
    assert list(stream_list(tmp_path / "x.json")) == [(1, 123456789)]


def test_keys_that_stand_twice_come_twice(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"a": 1, "a": 2}')
    assert list(stream_members(tmp_path / "x.json")) == [("a", 1), ("a", 2)]


FAULTS = {
    b"": r"x\.json:1: must be a list of records",
    b"{}": r"x\.json:1: must be a list of records",
    b"[1,\n 2": r"x\.json:2: ',' expected",
    b"[1,\n 2,]": r"x\.json:2: not valid JSON",
    b"[1 2]": r"x\.json:1: ',' expected",
    b'[1,\n"abc]': r"x\.json:2: not valid JSON: Unterminated",
    b"[1, tru]": r"x\.json:1: not valid JSON",
    b"[1]\n[2]": r"x\.json:2: not valid JSON: unexpected content",
    b'["\xff"]': r"x\.json: not UTF-8",
    b"[" * 100_000: r"x\.json:1: nested more than 64 deep",
}


@pytest.mark.parametrize("content", FAULTS, ids=range(len(FAULTS)))
def test_faults(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(UserError, match=FAULTS[content]):
        list(stream_list(tmp_path / "x.json"))


def test_lines_are_counted_over_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_stream, "CHUNK", 8)
    (tmp_path / "x.json").write_text("[\n" + "1,\n" * 200 + "]")
    with pytest.raises(UserError, match=r"x\.json:202: not valid JSON"):
        list(stream_list(tmp_path / "x.json"))


def test_records_before_a_fault_are_read(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('[1, 2, {"a": ]}]')
    rows = stream_list(tmp_path / "x.json")
    assert [next(rows), next(rows)] == [(1, 1), (2, 2)]
    with pytest.raises(UserError):
        next(rows)


def test_what_is_no_object_or_lacks_the_list(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"a": [1], "b": {"c": []}}')
    with pytest.raises(UserError, match=r"x\.json: has no list `b`"):
        list(stream_lists(tmp_path / "x.json", ["a", "b"]))
    (tmp_path / "x.json").write_text("[3]")
    with pytest.raises(UserError, match="must be a JSON object"):
        list(stream_members(tmp_path / "x.json"))
    with pytest.raises(UserError, match=r"none\.json: cannot be read"):
        list(stream_members(tmp_path / "none.json"))
    (tmp_path / "x.json").write_text("{3: 4}")
    with pytest.raises(UserError, match="a key in quotes"):
        list(stream_members(tmp_path / "x.json"))


@pytest.mark.parametrize("text", ['"\\ud800"', '{"\\uDBFF x": 1}', "[" * 65 + "]" * 65, '{"a": ' * 65 + "1" + "}" * 65])
def test_what_could_not_be_written_again(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(f"[{text}, 5]")
    (_, first), (_, second) = stream_list(tmp_path / "x.json")
    assert isinstance(first, InvalidJson) and second == 5
    with pytest.raises(ValueError, match=first.reason):
        parse_json(text)


@pytest.mark.parametrize("text", ['"\\ud83d\\ude00 \\\\ud800"', "[" * 64 + "]" * 64, "[" + "[]," * 100 + "1]"])
def test_what_can_be_written_again(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(f"[{text}]")
    assert [value for _, value in stream_list(tmp_path / "x.json")] == [json.loads(text)] == [parse_json(text)]


def test_numbers_beyond_measure(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(f"[{'9' * 5000}, -{'9' * 400}, {'9' * 99}]")
    assert [value for _, value in stream_list(tmp_path / "x.json")] == [float("inf"), float("-inf"), int("9" * 99)]


def test_a_torn_string_does_not_make_the_reader_take_the_whole_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fault in the first record is found before the last is read: the rest is not even UTF-8."""
    monkeypatch.setattr(json_stream, "CHUNK", 1000)
    (tmp_path / "x.json").write_bytes(b'[{"a": nul}, ' + b"1, " * 100_000 + b"\xff]")
    with pytest.raises(UserError, match="not valid JSON: Expecting value"):
        list(stream_list(tmp_path / "x.json"))


def test_a_key_that_stands_twice_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a record, wherever it is cut off while it is read; of the file's object; in one line."""
    records = [{"a": number, "b": {"c": "x" * 30}} for number in range(50)]
    text = (
        json.dumps({"rows": records})
        .replace('{"a": 7,', '{"a": 70, "a": 7,')
        .replace('"a": 9, "b": {', '"a": 9, "b": {"c": 1, ')
    )
    path = tmp_path / "x.json"
    for chunk in (1 << 20, 37, 1):
        path.write_text(text)
        monkeypatch.setattr(json_stream, "CHUNK", chunk)
        found = list(stream_lists(path, ["rows"]))
        assert [number for _, number, one in found if isinstance(one, InvalidJson)] == [8, 10]
        assert [one for _, number, one in found if number not in (8, 10)] == [*records[:7], records[8], *records[10:]]
        assert "duplicate key 'a' in an object: {'a': 7" in str(found[7][2])
    path.write_text('{"rows": [1], "rows": [2]}')
    with pytest.raises(UserError, match="duplicate key 'rows'"):
        list(stream_lists(path, ["rows"]))
    with pytest.raises(ValueError, match="duplicate key 'a'"):
        parse_json('{"b": [{"a": 1, "a": 1}]}')
