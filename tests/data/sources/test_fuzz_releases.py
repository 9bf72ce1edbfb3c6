"""10,000 malformed records over all loaders: each is loaded rightly or reported with its place; nothing hangs.

In every run two of three records are spoilt in a random place, each in its own way, and the others must come out as
from a clean release. Then whole files are damaged byte by byte.
"""

from __future__ import annotations

import copy
import json
import os
import pickle
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ftlib.data.dataset import RowWriter, SplitRows
from ftlib.data.example import Example, InvalidRecord
from ftlib.data.prompts import prompt_checker, render_prompt
from ftlib.data.sources import (
    coco_captions,
    coco_detection,
    csv_table,
    docvqa,
    gqa,
    hf_datasets,
    imagefolder,
    instructions,
    jsonl,
    refcoco,
    vqav2,
)
from ftlib.errors import UserError
from tests.data.sources import releases
from tests.data.sources.records import (
    CATEGORIES,
    POISON,
    alpaca,
    chat,
    coco_caption,
    coco_image,
    coco_object,
    dumped,
    gqa_record,
    karpathy_image,
    ref_object,
    ref_record,
    row,
    sharegpt,
    vqa_annotations,
    vqa_questions,
)
from tests.data.sources.releases import Examples, data, read, write

RECORDS = 60
RUNS = 15
"""15 targets · 15 runs · 40 spoilt records = 9,000; folders, the hub and damaged bytes are the rest."""


@dataclass(frozen=True)
class Target:
    """A loader with one list of records of its release to spoil.

    Attributes:
        record: number → a clean record.
        make: (folder, records) → writes a release.
        single: every record gives one row or one fault.
    """

    examples: Examples
    record: Callable[[int], Any]
    make: Callable[[Path, list[Any]], object]
    single: bool = True
    fields: tuple[tuple[str, Any], ...] = ()

    def read(self, root: Path) -> tuple[list[Example], list[InvalidRecord]]:
        return read(self.examples, data(root, "refcoco", **dict(self.fields)))


def spoilt(value: Any, chance: random.Random) -> Any:
    """A value with one thing in it changed."""
    if isinstance(value, dict) and value and chance.random() < 0.85:
        key = chance.choice(sorted(value))
        kind = chance.random()
        if kind < 0.15:
            return {name: one for name, one in value.items() if name != key}
        if kind < 0.2:
            return {(name + "x" if name == key else name): one for name, one in value.items()}
        return {**value, key: spoilt(value[key], chance)}
    if isinstance(value, list) and value and chance.random() < 0.7:
        place = chance.randrange(len(value))
        return [*value[:place], spoilt(value[place], chance), *value[place + 1 :]]
    return copy.deepcopy(chance.choice(POISON))


def json_lines(root: Path, records: list[Any]) -> None:
    write(root / "data.jsonl", "".join(dumped(record) + "\n" for record in records))


def in_list(name: str, key: str, **others: Any) -> Callable[[Path, list[Any]], object]:
    """Writes records as a list of a JSON file beside other content."""
    return lambda root, records: write(root / name, dumped({"info": {}, **others, key: records}))


def vqa(spoil: str) -> Callable[[Path, list[Any]], None]:
    """Writes a part of VQAv2 of which one file is spoilt."""

    def make(root: Path, records: list[Any]) -> None:
        clean = {"questions": vqa_questions, "annotations": vqa_annotations}
        for name, record in clean.items():
            rows = records if name == spoil else [record(number) for number in range(RECORDS)]
            kind = "OpenEnded_mscoco" if name == "questions" else "mscoco"
            write(root / f"v2_{kind}_val2014_{name}.json", dumped({name: rows}))

    return make


def gqa_train(root: Path, records: list[Any]) -> None:
    write(root / "train_all_questions" / "0.json", dumped({f"{n:08d}": record for n, record in enumerate(records)}))


def refs(root: Path, records: list[Any]) -> None:
    content = {"images": list(map(coco_image, range(RECORDS))), "annotations": list(map(ref_object, range(RECORDS)))}
    write(root / "refcoco" / "instances.json", content)
    write(root / "refcoco" / "refs(unc).p", pickle.dumps(records, 2))


def instances(root: Path, records: list[Any]) -> None:
    refs(root, list(map(ref_record, range(RECORDS))))
    content = {"images": list(map(coco_image, range(RECORDS))), "annotations": records}
    write(root / "refcoco" / "instances.json", dumped(content))


IMAGES = list(map(coco_image, range(RECORDS)))

TARGETS: dict[str, Target] = {
    "jsonl": Target(jsonl.examples, row, json_lines),
    "alpaca jsonl": Target(instructions.examples, alpaca, json_lines),
    "alpaca json": Target(
        instructions.examples, alpaca, lambda root, records: write(root / "data.json", dumped(records))
    ),
    "chat": Target(instructions.examples, chat, json_lines),
    "sharegpt": Target(instructions.examples, sharegpt, json_lines),
    "vqav2 questions": Target(vqav2.examples, vqa_questions, vqa("questions"), single=False),
    "vqav2 annotations": Target(vqav2.examples, vqa_annotations, vqa("annotations"), single=False),
    "docvqa": Target(
        docvqa.examples,
        lambda number: releases.docvqa_question(number, ["a", "b"], number, "val"),
        in_list("val_v1.0_withQT.json", "data"),
    ),
    "gqa": Target(gqa.examples, gqa_record, gqa_train, fields=(("balanced", False),)),
    "karpathy": Target(coco_captions.examples, karpathy_image, in_list("dataset_coco.json", "images")),
    "captions": Target(
        coco_captions.examples, coco_caption, in_list("captions_val2014.json", "annotations", images=IMAGES), False
    ),
    "captioned images": Target(
        coco_captions.examples,
        coco_image,
        in_list("captions_val2014.json", "images", annotations=list(map(coco_caption, range(RECORDS)))),
        False,
    ),
    "detection": Target(
        coco_detection.examples,
        coco_object,
        in_list("instances_val2017.json", "annotations", images=IMAGES, categories=CATEGORIES),
        False,
    ),
    "detection images": Target(
        coco_detection.examples,
        coco_image,
        in_list(
            "instances_val2017.json",
            "images",
            annotations=list(map(coco_object, range(RECORDS))),
            categories=CATEGORIES,
        ),
        False,
    ),
    "refcoco": Target(refcoco.examples, ref_record, refs),
    "refcoco instances": Target(refcoco.examples, ref_object, instances, False),
}


def require_sound(rows: list[Example], bad: list[InvalidRecord], root: Path) -> None:
    """Rows are what a row must be and survive being written; faults name a file of the release."""
    for one in rows:
        texts = [one.id, one.image, one.prefix, one.suffix, *one.references]
        assert all(isinstance(text, str) for text in texts)
        assert one.suffix.strip()
    for prompt in ("alpaca", "chat", "{prefix} {more}", "{input}"):
        fault = prompt_checker(prompt)
        assert all(isinstance(render_prompt(one, prompt), str) for one in rows if not fault(one))
    named = [one.id for one in rows if one.id]
    assert len(set(named)) == len(named)
    with RowWriter(root / "written.arrow") as writer:
        for one in rows:
            writer.write(one, json.dumps(one.facts, ensure_ascii=False) if one.facts else None)
    unplaced = {"location": "", "part_name": "", "unused": frozenset(), "remarks": frozenset()}
    assert repr([replace(one, references=list(one.references) or (), **unplaced) for one in rows]) == repr(
        list(SplitRows(root / "written.arrow"))
    )
    assert all(one.location.startswith(str(root)) and one.reason and len(one.reason) < 400 for one in bad)


@pytest.mark.parametrize("name", TARGETS)
def test_spoilt_records(tmp_path: Path, name: str) -> None:
    target, chance = TARGETS[name], random.Random(name)
    clean = [target.record(number) for number in range(RECORDS)]
    target.make(tmp_path, clean)
    expected, bad = target.read(tmp_path)
    assert len(expected) == RECORDS and not bad
    for _ in range(RUNS):
        records = [one if number % 3 == 0 else spoilt(one, chance) for number, one in enumerate(clean)]
        target.make(tmp_path, records)
        rows, bad = target.read(tmp_path)
        require_sound(rows, bad, tmp_path)
        untouched = {one.id: one for one in expected[::3]}
        # a spoilt record may claim to be another; only then does one that is in order not come out as it should
        changed = [one for one in rows if one.id in untouched and repr(one) != repr(untouched[one.id])]
        lost = untouched.keys() - {one.id for one in rows}
        assert len(changed) + len(lost) <= sum("already" in one.reason for one in bad) + (not target.single) * len(bad)
        if target.single:
            assert len(rows) + len(bad) == RECORDS
        else:
            assert len(rows) + len(bad) >= RECORDS or name.startswith(("detection", "captioned"))


@pytest.mark.parametrize("name", TARGETS)
def test_damaged_bytes(tmp_path: Path, name: str) -> None:
    """Some bytes of a file are replaced, taken out or put in, or its end is cut off."""
    target, chance = TARGETS[name], random.Random(name)
    target.make(tmp_path, [target.record(number) for number in range(RECORDS)])
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    for _ in range(40):
        path = chance.choice(files)
        whole = path.read_bytes()
        content = bytearray(whole)
        for _ in range(chance.choice((1, 1, 5, 50))):
            place = chance.randrange(len(content))
            content[place : place + chance.choice((0, 1, 1, 30))] = chance.randbytes(chance.choice((0, 1, 1, 4)))
        path.write_bytes(content[: chance.randrange(len(content))] if chance.random() < 0.3 else content)
        try:
            require_sound(*target.read(tmp_path), tmp_path)
        except UserError as error:
            assert str(tmp_path) in error.problem
        path.write_bytes(whole)


def test_csv(tmp_path: Path) -> None:
    chance = random.Random(0)
    pieces = [b"", b"a", b",", b'"', b'""', b"\n", b"\r", b"\r\n", b"\xff", b"\x00", b" ", "犬".encode(), b"x" * 200]
    for _ in range(20):
        lines = [b"clean%d.png,yes" % number for number in range(30)]
        for place in range(1, 30, 2):
            lines[place] = b"".join(chance.choice(pieces) for _ in range(chance.randrange(8)))
        path = write(tmp_path / "data.csv", b"image,suffix\n" + b"\n".join(lines))
        rows, bad = read(csv_table.examples, data(tmp_path))
        require_sound(rows, bad, tmp_path)
        # a quote may join lines; unless there is one, no line is lost
        if b'"' not in path.read_bytes():
            assert {f"clean{number}.png" for number in range(0, 30, 2)} <= {one.image for one in rows}


def test_folders(tmp_path: Path) -> None:
    chance = random.Random(0)
    pieces = [b"a", b".png", b".", b"\xff", b"\n", "犬".encode(), b" ", b"-", b"\xed\xa0\x80", b".jpg"]
    wanted = 0
    for number in range(300):
        name = b"%d" % number + b"".join(chance.choice(pieces) for _ in range(chance.randrange(4)))
        place = os.fsencode(tmp_path) + b"/" + chance.choice((b"cat", b"dog/x", b"d\xffg")) + b"/" + name
        path = Path(os.fsdecode(place))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        wanted += b"d\xffg" not in place
    rows, bad = read(imagefolder.examples, data(tmp_path))
    require_sound(rows, bad, tmp_path)
    assert len(rows) + len(bad) == wanted + 1


def test_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    chance = random.Random(0)
    texts = [None, "", " ", "\x00", "x", "犬", "../../x", "x" * 10_000]
    content = {
        "id": [chance.choice([None, 1, -(2**62), 5]) for _ in range(300)],
        "image": [chance.choice(texts) for _ in range(300)],
        "suffix": [chance.choice(texts) for _ in range(300)],
        "references": [chance.choice([None, [], [None], ["x", None], ["y"]]) for _ in range(300)],
        "f": [chance.choice([None, float("nan"), 1e300]) for _ in range(300)],
        "deep": [chance.choice([None, {"a": [None, {"b": 1}]}]) for _ in range(300)],
    }
    monkeypatch.setattr(hf_datasets, "load_tables", lambda section: {"train": datasets.Dataset.from_dict(content)})
    rows, bad = read(hf_datasets.examples, data(tmp_path, file=str(tmp_path)))
    require_sound(rows, bad, tmp_path)
    assert len(rows) + len(bad) == 300 and rows and bad


def laughs(depth: int) -> list[Any]:
    """Small in memory, without end when written out."""
    value: list[Any] = ["ha"]
    for _ in range(depth):
        value = [value] * 10
    return value


def test_pickles_with_what_json_cannot_hold(tmp_path: Path) -> None:
    circle: list[Any] = []
    circle.append(circle)
    poison = [
        b"x",
        (1, 2),
        10**6000,
        circle,
        laughs(60),
        np.int64(3),
        np.float32("nan"),
        "\udcff",
        float("nan"),
    ]
    for number, value in enumerate(poison):
        records = [ref_record(number) for number in range(RECORDS)]
        for key in records[0]:
            records[5] = ref_record(5) | {key: value}
            records[7] = ref_record(7) | {"sentences": [{**ref_record(7)["sentences"][0], "sent": value}]}
            records[9] = value
            refs(tmp_path, records)
            rows, bad = read(refcoco.examples, data(tmp_path, "refcoco"))
            require_sound(rows, bad, tmp_path)
            places = {one.location for one in bad}  # one for each of a ref's sentences
            assert len(rows) + len(places) == RECORDS and len(places) >= 2, number
