"""Ids, places and files of a release."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ftlib.data.example import Example, InvalidRecord
from ftlib.data.sources.base import IdSet, NumberedFile, RowReader
from ftlib.data.sources.json_stream import InvalidJson
from ftlib.data.sources.release_files import find, find_release_files, image_dir, image_name
from ftlib.errors import UserError
from tests.data.sources.releases import data, write


def test_ids_against_a_dictionary() -> None:
    chance, ids, known = random.Random(0), IdSet(), dict[str, int]()
    for number in range(1, 20_000):
        key = str(chance.randrange(12_000))
        assert ids.add(key, number) == known.get(key, 0)
        known.setdefault(key, number)


def test_ids_whose_hashes_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neighbouring hashes go to neighbouring places, also round the end of the table; a hash of 0 is one, too."""

    class Key(str):
        def __hash__(self) -> int:
            return int(self)

    ids = IdSet()
    keys = [Key(text) for text in ("1023", "2047", "3071", "0", "1", "-5")]
    assert [ids.add(key, number) for number, key in enumerate(keys[:4], 1)] == [0, 0, 0, 0]
    assert [ids.add(key, 9) for key in keys[:4]] == [1, 2, 3, 4]
    assert ids.add(keys[5], 6) == 0
    assert ids.add(keys[5], 7) == 6


def example(record: dict[str, Any], number: int) -> list[Example]:
    if "key" not in record:
        raise ValueError("no key")
    return [Example(record["key"], "x.png", "", "y")]


def test_reading_tells_the_first_place_of_an_id() -> None:
    reading = RowReader()
    first = list(reading.rows(NumberedFile(Path("a.jsonl"), "line"), [(1, {"key": "x"}), (3, {"key": "x"})], example))
    second = list(reading.rows(NumberedFile(Path("b.json")), [(1, {"key": "y"}), (2, {"key": "x"})], example))
    assert [one.id if isinstance(one, Example) else one for one in first + second] == [
        "x",
        InvalidRecord("a.jsonl:3", "field id: duplicate of 'x' in line 1"),
        "y",
        InvalidRecord("b.json: record 2", "field id: duplicate of 'x' in line 1 of a.jsonl"),
    ]


def test_reading_goes_on_after_faults() -> None:
    records = [(1, 3), (2, InvalidJson("torn")), (3, {}), (4, {"key": "z"})]
    rows = list(RowReader().rows(NumberedFile(Path("a"), "row"), records, example))
    assert rows[:3] == [
        InvalidRecord("a: row 1", "not a JSON object"),
        InvalidRecord("a: row 2", "torn"),
        InvalidRecord("a: row 3", "no key"),
    ]
    assert len(rows) == 4


def test_reading_streams() -> None:
    def endless() -> Iterator[tuple[int, Any]]:
        number = 0
        while True:
            number += 1
            yield number, {"key": str(number)}

    rows = RowReader().rows(NumberedFile(Path("a")), endless(), example)
    assert [next(rows).id for _ in range(3)] == ["1", "2", "3"]  # type: ignore[union-attr]


def test_find(tmp_path: Path) -> None:
    write(tmp_path / "zip [1]" / "refs(unc).p", b"")
    assert find(tmp_path, "refs(unc).p") == tmp_path / "zip [1]" / "refs(unc).p"
    assert find(tmp_path, "zip [1]/refs(unc).p") == tmp_path / "zip [1]" / "refs(unc).p"
    assert find(tmp_path, "refs[unc].p") is None
    write(tmp_path / "x" / "refs[unc].p", b"")
    assert find(tmp_path, "refs[unc].p") == tmp_path / "x" / "refs[unc].p"
    assert find(tmp_path, "none") is None
    assert image_dir(tmp_path, "none", "zip [1]") == "zip [1]"
    assert image_dir(tmp_path, "none", "nothing") == "none"
    assert image_name(".", "a/../b.png") == "b.png"


def test_choose(tmp_path: Path) -> None:
    old: Any = {"train": "old_train", "valid": "old_valid"}
    new: Any = {"train": "new_train", "valid": "new_valid"}
    best: Any = {"": "best"}
    ranks = [[best], [old, new]]
    with pytest.raises(UserError, match="looked for best, old_train, old_valid, new_train, new_valid"):
        find_release_files(data(tmp_path), ranks)
    write(tmp_path / "x" / "old_train", b"")
    write(tmp_path / "x" / "old_valid", b"")
    write(tmp_path / "new_valid", b"")
    with pytest.raises(UserError, match="several releases"):
        find_release_files(data(tmp_path), ranks)
    assert find_release_files(data(tmp_path, file="new_valid"), ranks) == {"valid": tmp_path / "new_valid"}
    for file in ("old_valid", "x/old_train"):
        assert list(find_release_files(data(tmp_path, file=file), ranks)) == ["train", "valid"]
    with pytest.raises(UserError, match="new_train: no such file"):
        find_release_files(data(tmp_path, file="new_train"), ranks)
    with pytest.raises(UserError, match="other is not a file of the release"):
        find_release_files(data(tmp_path, file="other"), ranks)
    write(tmp_path / "best", b"")
    assert find_release_files(data(tmp_path), ranks) == {"": tmp_path / "best"}
    assert find_release_files(data(tmp_path), [[best]], [[new]]) == {
        "": tmp_path / "best",
        "valid": tmp_path / "new_valid",
    }
