"""Datasets to try the readers of data with: small, right in the beginning, then spoilt in a few places.

A case is a config's data section and the files that it reads. Records are spoilt as values (fields dropped, renamed,
repeated, of other types), texts are written in other encodings and line ends, and files are damaged byte by byte.
"""

from __future__ import annotations

import csv
import io
import json
import pickle
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from hypothesis.configuration import set_hypothesis_home_dir

from tests.data.sources.records import (
    CATEGORIES,
    POISON,
    SAME_KEY,
    TWICE,
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
    vqa_questions,
)
from tests.data.sources.releases import docvqa_question, vqa_annotation

set_hypothesis_home_dir(Path.home() / ".hypothesis")  # not into the working folder; tests have a home of their own

ROOT = "@root@"
"""Stands for the dataset's folder in configs and in texts of records."""

_SPLITS = ("train", "valid", "test")
_VALUES: list[Any] = [
    *POISON, TWICE, 10**400, 2**63, "a\x00b", "\ufeffa", "a\r\nb", "\u2028", f"{ROOT}/1.png", "./1.png", "a//1.png",
    "loop", "1.png", "k1", "1", 1, 1.0, "nan", "train", "valid", "test", "testA", "holdout", "<image>",
    "<loc0001>" * 4 + " a",
    [["q", "a"]], [["q"]], {"size": [2, 2], "counts": [4]}, [0, 0, 1, 1], [1, 1, -1, 5], [0.5] * 4, [1e308] * 4,
    {"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 0},
    [{"type": "text", "text": "a"}],
]  # fmt: skip
_ENCODINGS = ("utf-8-sig", "utf-16", "utf-16-le", "utf-32", "shift_jis", "cp1252", "latin-1", "euc_jp")


@dataclass(frozen=True)
class Link:
    """A symbolic link."""

    target: str


@dataclass
class Case:
    """A dataset.

    Attributes:
        kind: of `KINDS`.
        data: the config's data section, without its root; of scores the names of the files, by option.
        files: path below the root → content.
        reordered: the same with the records in another order, where that is possible; else none.
        records: how many there are in files of tables that are not damaged.
    """

    kind: str
    task: str
    data: dict[str, Any]
    files: dict[str, bytes | Link]
    reordered: dict[str, bytes | Link] = field(default_factory=dict)
    records: int | None = None


class Draw:
    """Small choices; what is simplest comes first."""

    def __init__(self, draw: Callable[[st.SearchStrategy[Any]], Any]) -> None:
        self._draw = draw

    def number(self, least: int, most: int) -> int:
        """A number, bounds included."""
        found: int = self._draw(st.integers(least, most))
        return found

    def chance(self, percent: int) -> bool:
        """True in so many of 100 cases, roughly."""
        return self.number(0, 99) >= 100 - percent

    def one(self, values: Sequence[Any]) -> Any:
        """One of some values."""
        return values[self.number(0, len(values) - 1)]

    def value(self) -> Any:
        """What may stand in a file of JSON."""
        kind = self.number(0, 9)
        if kind < 7:
            return self.one(_VALUES)
        if kind == 7:
            return self._draw(_TEXT)
        return self._draw(st.integers() if kind == 8 else st.floats())

    def spoilt(self, value: Any) -> Any:
        """A value with one thing in it changed."""
        if isinstance(value, dict) and value and not self.chance(10):
            key = self.one(list(value))
            change = self.number(0, 9)
            if change == 0:
                return {name: one for name, one in value.items() if name != key}
            if change == 1:
                name = self.one([f"{key}x", f"{SAME_KEY}{self.one(list(value))}", "part", "split", "images", "context"])
                return {(name if one == key else one): inner for one, inner in value.items()}
            if change == 2:
                return {**value, self.one(["part", "split", "system", "tools", "weight", "x\x00"]): self.value()}
            return {**value, key: self.spoilt(value[key])}
        if isinstance(value, list) and value and not self.chance(15):
            place = self.number(0, len(value) - 1)
            change = self.number(0, 9)
            if change == 0:
                return [*value[:place], *value[place + 1 :]]
            if change == 1:
                return [*value[:place], value[place], *value[place:]]
            return [*value[:place], self.spoilt(value[place]), *value[place + 1 :]]
        return self.alike(value) if self.chance(50) else self.value()

    def alike(self, value: Any) -> Any:
        """Another value of the same type, or the same one written in another way."""
        if isinstance(value, bool):
            return not value
        if isinstance(value, int):
            return self.one((0, 1, 2, 999, -1, 17, str(value), float(value) if abs(value) < 1 << 60 else value))
        if isinstance(value, str):
            return self.one(("", " ", "1", f" {value} ", value.upper(), f"{value}x", "assistant", value * 2))
        if isinstance(value, list):
            return self.one(([], value * 2, [value], value[:1]))
        return self.value()

    def spoilt_often(self, value: Any) -> Any:
        """A value with up to four things in it changed."""
        for _ in range(self.one((0, 1, 1, 2, 4))):
            value = self.spoilt(value)
        return value

    def spoilt_records(self, records: list[Any]) -> list[Any]:
        """A list of which up to four records are changed, taken out or repeated."""
        records = list(records)
        for _ in range(self.one((0, 1, 1, 2, 4))):
            place, change = self.number(0, len(records)), self.number(0, 11)
            if place == len(records) or change == 10:
                records.insert(place, records[place - 1] if records and change > 5 else self.value())
            elif change == 11:
                del records[place]
            else:
                records[place] = self.spoilt(records[place])
        return records

    def text(self, text: str) -> tuple[bytes, str]:
        """A text in bytes, mostly in UTF-8, and its encoding."""
        if self.chance(15):
            text = text.replace("\n", "\r\n")
        encoding = self.one(_ENCODINGS) if self.chance(15) else "utf-8"
        return text.encode(encoding, "surrogatepass" if encoding.startswith("utf") else "replace"), encoding

    def damaged(self, content: bytes, percent: int = 20) -> bytes:
        """Bytes of which some are replaced, taken out or put in, in some cases."""
        if not self.chance(percent):
            return content
        for _ in range(self.number(1, 3)):
            place = len(content) * self.number(0, 9999) // 10000
            change = self.number(0, 4)
            if change == 0:
                content = content[:place]
            elif change == 1:
                content = content[:place] + bytes([self.number(0, 255)]) + content[place + 1 :]
            elif change == 2:
                content = content[:place] + content[place + self.number(1, 20) :]
            elif change == 3:
                content = content[:place] + self.one(_PIECES) + content[place:]
            else:
                other = len(content) * self.number(0, 9999) // 10000
                content = content[:place] + content[other : other + self.number(1, 200)] + content[place:]
        return content


_TEXT = st.text(max_size=6)
_PIECES = (b'"', b"{", b"}", b"[", b"]", b",", b":", b"\\", b"\\ud800", b"\n", b"\r", b"\x00", b"\xff", b"\xef\xbb\xbf",
           b"NaN", b"-", b"1e999", b";", b"\t", b'""', b"[" * 2000, "é犬".encode())  # fmt: skip


def _png(number: int) -> bytes:
    """A picture of one grey pixel beside another."""
    parts = {b"IHDR": struct.pack(">IIBBBBB", 2, 1, 8, 0, 0, 0, 0), b"IDAT": zlib.compress(bytes([0, number, 255]))}
    chunks = [(name, content) for name, content in (parts | {b"IEND": b""}).items()]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        for name, content in chunks
    )


_PNGS = [_png(number) for number in range(12)]


def _pictures(count: int, folder: str = "", ending: str = "png") -> dict[str, bytes | Link]:
    """Their names are those that the records of releases have."""
    return {f"{folder}{number}.{ending}": _PNGS[number % len(_PNGS)] for number in range(count)}


def _rule(draw: Draw) -> dict[str, Any]:
    rule: dict[str, Any] = {"valid": 1, "test": draw.one((0, 1))}
    if draw.chance(25):
        rule["official"] = False
    if draw.chance(10):
        rule |= draw.one(({"max_train": 1}, {"stratify_by": "suffix"}, {"folds": 2}, {"sets": 2, "set": 2}))
    return rule


def _common(draw: Draw) -> dict[str, Any]:
    return {"on_bad": draw.one(("skip", "skip", "skip", "stop")), "split": _rule(draw)}


def _with_parts(draw: Draw, records: list[Any]) -> None:
    """Give records the names of splits, in some cases."""
    if draw.chance(25):
        name = draw.one(("part", "split", "Split", "part", "subset"))
        names = draw.one(
            (_SPLITS, _SPLITS, ("train", "dev", "testA"), ("train", "eval", "holdout"), ("train", "b", ""))
        )
        for number, record in enumerate(records):
            record[name] = names[number % 3]


def _made(draw: Draw, record: Callable[[int], Any], fields: Sequence[str] = ()) -> list[Any]:
    """Records, some spoilt.

    Args:
        fields: that all may lack.
    """
    records = [record(number) for number in range(draw.number(4, 8))]
    _with_parts(draw, records)
    for name in fields:
        if draw.chance(30):
            for one in records:
                one.pop(name)
    return draw.spoilt_records(records)


def _table(draw: Draw, source: str, name: str, records: list[Any], write: Callable[[list[Any]], str]) -> Case:
    """A case of one file of rows."""
    data: dict[str, Any] = _common(draw) | {"source": source}
    if name not in ("data.jsonl", "data.json", "data.csv"):
        data["file"] = name
    content, encoding = draw.text(write(records))
    whole = draw.damaged(content)
    if encoding not in ("utf-8", "utf-8-sig") and draw.chance(80):
        data["encoding"] = encoding
    case = Case(source, "classify", data, {name: whole})
    if whole == content:
        case.records = len(records)
        other = write(records[::-1])
        case.reordered = {name: other.encode(encoding, "surrogatepass" if encoding.startswith("utf") else "replace")}
    return case


def _json_lines(records: list[Any]) -> str:
    return "".join(dumped(record) + "\n" for record in records)


def _json_writer(draw: Draw) -> Callable[[list[Any]], str]:
    return dumped if draw.chance(30) else _json_lines


def _renamed(draw: Draw, records: list[Any], names: dict[str, str]) -> dict[str, str]:
    """`data.columns`, with the fields of records renamed; or not, or some of them."""
    if not draw.chance(25):
        return {}
    columns = {name: other for name, other in names.items() if draw.chance(60)}
    for place, record in enumerate(records):
        if isinstance(record, dict) and not draw.chance(5):
            records[place] = {columns.get(name, name): value for name, value in record.items()}
    return columns


_LACKING = ("id", "references", "more")


def jsonl(draw: Draw) -> Case:
    """Rows with images."""
    answer = draw.one(("a", "<loc0000><loc0001><loc0700><loc1023> a"))
    records = _made(draw, lambda number: row(number) | {"suffix": answer, "references": [answer] * 3}, _LACKING)
    columns = _renamed(draw, records, {"suffix": "label", "image": "path", "id": "key", "prefix": "question"})
    name = draw.one(("data.jsonl", "data.jsonl", "rows.txt", "sub/rows.json"))
    case = _table(draw, "jsonl", name, records, _json_writer(draw))
    case.data["columns"] = columns
    case.task = draw.one(("classify", "instruct", "caption", "vqa", "detect", "refer"))
    case.data["prompt"] = draw.one(("{prefix}", "{prefix}", "{more}", "a {id} {part}"))
    return _with_files(case, _pictures(8))


def _with_files(case: Case, files: dict[str, bytes | Link]) -> Case:
    case.files = files | {"loop": Link(".")} | case.files
    if case.reordered:
        case.reordered = files | case.reordered
    return case


def csv_table(draw: Draw) -> Case:
    """Rows with images, in a spreadsheet."""
    records = _made(
        draw, lambda number: {name: value for name, value in row(number).items() if name != "more"}, ("id",)
    )
    records = [record for record in records if isinstance(record, dict)]
    delimiter = draw.one((",", ";", "\t"))
    header = list(dict.fromkeys(name.removeprefix(SAME_KEY) for record in records for name in record)) or ["image"]

    def write(rows: list[Any]) -> str:
        text = io.StringIO()
        writer = csv.writer(text, delimiter=delimiter, lineterminator="\n")
        writer.writerow(header)
        writer.writerows([[_cell(record.get(name, "")) for name in header] for record in rows])
        return text.getvalue()

    case = _table(draw, "csv", "data.csv", records, write)
    if draw.chance(15):
        case.data["columns"] = {"prefix": "prefix"}
    case.task = draw.one(("classify", "instruct", "vqa"))
    return _with_files(case, _pictures(8))


def _cell(value: Any) -> str:
    return json.dumps(value) if isinstance(value, list) else str(value)


def instructions(draw: Draw) -> Case:
    """Texts only."""
    kind = draw.one((alpaca, chat, sharegpt))
    several = draw.chance(40)

    def record(number: int) -> dict[str, Any]:
        made = kind(number)
        if several:
            for name in ("messages", "conversations"):
                made.update({name: made[name] * 2} if name in made else {})
        return made

    records = _made(draw, record, ("id",))
    columns = _renamed(draw, records, {"suffix": "answer", "prefix": "question"}) if kind is alpaca else {}
    case = _table(draw, "instructions", draw.one(("data.jsonl", "data.json")), records, _json_writer(draw))
    case.task = "instruct"
    case.data |= {"columns": columns, "prompt": draw.one(("alpaca", "chat", "{input}{prefix}"))}
    return case


def split_files(draw: Draw) -> Case:
    """A file for each split."""
    kind = draw.one((jsonl, instructions, csv_table))
    cases = {split: kind(draw) for split in _SPLITS[: draw.number(1, 3)]}
    data = next(iter(cases.values())).data
    data.pop("file", None)
    data["files"] = {split: [f"{split}/{name}" for name, _ in _tables(case)] for split, case in cases.items()}
    case = Case("files", next(iter(cases.values())).task, data, {})
    counts = [one.records for one in cases.values()]
    if None not in counts and len({one.data.get("encoding") for one in cases.values()}) == 1:
        case.records = sum(count or 0 for count in counts)
    folder = draw.one(("", "train/"))
    for split, one in cases.items():
        case.files |= {f"{split}/{name}": content for name, content in _tables(one)}
        case.files |= {f"{folder}{name}": content for name, content in one.files.items() if name.endswith(".png")}
    return case


def _tables(case: Case) -> list[tuple[str, bytes | Link]]:
    return [(name, content) for name, content in case.files.items() if not name.endswith(".png") and name != "loop"]


def mixture(draw: Draw) -> Case:
    """Two datasets in one."""
    case = Case("mixture", "instruct", _common(draw) | {"source": "mixture", "parts": []}, {})
    counts = []
    for number in range(draw.number(1, 3)):
        one = draw.one((jsonl, instructions, csv_table, folder))(draw)
        name, root = draw.one(("a", "b", "train", "test")) + draw.one((str(number), "")), draw.one((f"p{number}", "p"))
        known = ("source", "file", "columns", "encoding", "files")
        part = {key: value for key, value in one.data.items() if key in known}
        case.data["parts"].append({"name": name, "root": root} | part)
        case.files |= {f"{root}/{path}": content for path, content in one.files.items()}
        counts.append(one.records)
    return case


def folder(draw: Draw) -> Case:
    """Images in folders of their classes."""
    names = (
        "cat",
        "dog",
        "train",
        "Test",
        "valid",
        "holdout",
        "cat\udcff",
        "é",
        ".hidden",
        "__MACOSX",
        "loop",
        "a\nb",
        " ",
    )
    ends = (".png", ".png", ".JPG", ".txt", "", ".png.", "\udcff.png", "\n.png")
    files: dict[str, bytes | Link] = {
        f"{name}/{number}.png": _PNGS[number] for number in range(4) for name in names[:2]
    }
    if draw.chance(50):
        files = {}
    for number in range(draw.number(0, 8)):
        depth = draw.number(0, 3)
        path = "/".join([*(draw.one(names) for _ in range(depth)), f"{draw.number(0, 5)}{draw.one(ends)}"])
        files[path] = (
            Link(draw.one(("1.png", ".", "..", "nowhere", ROOT, "/etc"))) if draw.chance(15) else _PNGS[number]
        )
    data = _common(draw) | {"source": "folder"}
    if draw.chance(15):
        data["splits"] = draw.one(({"test": ["holdout"]}, {"left_out": ["holdout"], "valid": ["dog"]}))
    return Case("folder", "classify", data, files)


def _release(
    draw: Draw, kind: str, source: str, task: str, files: dict[str, Any], others: dict[str, bytes | Link] | None = None
) -> Case:
    """Files of a release in JSON, spoilt."""
    data = _common(draw) | {"source": source}
    written: dict[str, bytes | Link] = dict(others or {})
    for name, content in files.items():
        text = dumped(_spoilt_release(draw, content))
        written[name] = draw.damaged(draw.text(text)[0] if draw.chance(5) else text.encode(errors="surrogatepass"), 8)
    return Case(kind, task, data, written)


def _spoilt_release(draw: Draw, content: dict[str, Any]) -> Any:
    """A file of a release with one of its lists, or objects by id, spoilt; or anything else of it."""
    if draw.chance(6):
        return draw.spoilt_often(content)
    name = draw.one(list(content))
    if isinstance(content[name], list):
        return {**content, name: draw.spoilt_records(content[name])}
    keys = list(content)
    changed = zip(keys, draw.spoilt_records(list(content.values())), strict=False)
    return {f"{SAME_KEY}{keys[-1]}": content[name]} | content if draw.chance(4) else dict(changed)


def coco_detection(draw: Draw) -> Case:
    """COCO's instances, under the names of the release or of tools."""
    names = draw.one(
        (
            ("instances_train2017.json", "instances_val2017.json"),
            ("annotations/instances_train2014.json",),
            ("train/_annotations.coco.json", "valid/_annotations.coco.json"),
            ("result.json",),
            ("my.json",),
        )
    )
    count = draw.number(2, 5)
    kinds = [*CATEGORIES, {"id": 18, "name": "dog", "supercategory": "animal"}]
    files = {}
    for name in names:
        objects = [coco_object(number) | {"category_id": 17 + number % 2} for number in range(count)]
        objects.append(objects[0] | {"id": 99, "category_id": 18, "iscrowd": draw.number(0, 1)})
        files[name] = {"images": list(map(coco_image, range(count))), "annotations": objects, "categories": kinds}
    case = _release(draw, "coco_detection", "coco_detection", "detect", files)
    case.data["categories"] = draw.one(("present", "all"))
    if names == ("my.json",):
        case.data |= draw.one(({"file": "my.json"}, {"files": {"train": "my.json"}}))
    return case


def coco_captions(draw: Draw) -> Case:
    """COCO's captions."""
    count = draw.number(2, 5)
    names = draw.one((("captions_train2014.json", "captions_val2014.json"), ("captions_val2017.json",), ("my.json",)))
    captions = [*map(coco_caption, range(count)), coco_caption(0) | {"id": 100}]
    files = {name: {"images": list(map(coco_image, range(count))), "annotations": captions} for name in names}
    if len(names) > 1:  # ids are unique over both parts of the release
        shifted = [coco_image(number + 50) for number in range(count)]
        files[names[1]] = {
            "images": shifted,
            "annotations": [coco_caption(number + 50) for number in range(count)],
        }
    case = _release(draw, "coco_captions", "coco_captions", "caption", files, _pictures(count, "val2017/", "jpg"))
    if names == ("my.json",):
        case.data |= draw.one(({"file": "my.json"}, {"files": {"valid": "my.json"}}))
    return case


def karpathy(draw: Draw) -> Case:
    """Karpathy's split of COCO's captions."""
    splits = ("train", "restval", "val", "test")
    images = [karpathy_image(number) | {"split": draw.one(splits)} for number in range(draw.number(3, 7))]
    images[0]["sentences"] = images[0]["sentences"] * 2
    return _release(draw, "karpathy", "coco_captions", "caption", {"dataset_coco.json": {"images": images}})


def _answered(number: int) -> dict[str, Any]:
    return vqa_annotation(number, number, ["a", "b", "b"] * 3 + ["c"])


def vqav2(draw: Draw) -> Case:
    """Questions and annotations."""
    count, version = draw.number(3, 6), draw.one(("v2_", ""))
    files = {}
    for year, first in (("train2014", 0), ("val2014", 50))[: draw.number(1, 2)]:
        numbers = range(first, first + count)
        files[f"{version}OpenEnded_mscoco_{year}_questions.json"] = {"questions": list(map(vqa_questions, numbers))}
        files[f"{version}mscoco_{year}_annotations.json"] = {"annotations": list(map(_answered, numbers))}
    return _release(draw, "vqav2", "vqav2", "vqa", files)


def docvqa(draw: Draw) -> Case:
    """Questions about documents."""
    count = draw.number(4, 8)
    made = [docvqa_question(number, ["a", "b"], number // 2, "train") for number in range(count)]
    files = {"train_v1.0_withQT.json": {"data": made}}
    if draw.chance(50):
        asked = [docvqa_question(number + 50, ["a", "b"], number + 50, "val") for number in range(count)]
        files[draw.one(("val_v1.0_withQT.json", "val_v1.0.json"))] = {"data": asked}
    return _release(draw, "docvqa", "docvqa", "docvqa", files)


def gqa(draw: Draw) -> Case:
    """GQA's questions."""
    count = draw.number(2, 5)
    made = {f"{number:08d}": gqa_record(number) for number in range(count)}
    made[f"{count:08d}"] = gqa_record(count) | {"isBalanced": False}
    more = {f"{number + 50:08d}": gqa_record(number + 50) for number in range(count)}
    more |= {"00000099": gqa_record(99) | {"isBalanced": False}}
    files = {
        draw.one(("train_balanced_questions.json", "train_all_questions/0.json")): made,
        draw.one(("val_all_questions.json", "testdev_balanced_questions.json")): more,
    }
    case = _release(draw, "gqa", "gqa", "gqa", files)
    case.data["balanced"] = draw.one((True, False))
    return case


_PICKLED: list[Any] = [(1, 2), b"x", 10**4000, "\udcff", float("nan"), {1: 2}, None, "x", [], -1, "train", 2**63]


def refcoco(draw: Draw) -> Case:
    """Referring expressions."""
    count = draw.number(2, 5)
    splits = ("train", "val", "testA", "testB")
    refs: Any = [ref_record(number) | {"split": draw.one(splits)} for number in range(count)]
    refs[0]["sentences"] = refs[0]["sentences"] * 2
    if draw.chance(50):
        refs = draw.spoilt(refs) if draw.chance(10) else draw.spoilt_records(refs)
    if draw.chance(20) and isinstance(refs, list) and refs and isinstance(refs[-1], dict):
        refs[-1] = {**refs[-1], draw.one(list(ref_record(0))): draw.one(_PICKLED)}
    source = draw.one(("refcoco", "refcoco+"))
    images = [coco_image(number) for number in range(count)]
    content = {"images": images, "annotations": list(map(ref_object, range(count)))}
    task = draw.one(("refer", "segment"))
    case = _release(draw, "refcoco", source, task, {f"{source}/instances.json": content})
    case.files[f"{source}/refs(unc).p"] = draw.damaged(pickle.dumps(refs, draw.one((0, 2))), 15)
    return case


def parquet(draw: Draw) -> Case:
    """A folder of Parquet, as `source: hub` reads it in place."""
    import pyarrow
    from pyarrow import parquet as format

    text_only = draw.chance(40)
    files: dict[str, bytes | Link] = {} if text_only else _pictures(8)
    names = draw.one((("data.parquet",), ("train.parquet", "test.parquet"), ("train.parquet", "eval.parquet")))
    for name in names:
        records = _made(draw, draw.one((alpaca, chat)) if text_only else row, ("id",))
        records = [record for record in records if isinstance(record, dict)]
        columns = {}
        for key in dict.fromkeys(key for record in records for key in record):
            values = [record.get(key) for record in records]
            try:
                columns[key] = pyarrow.array(values)
                format.write_table(pyarrow.table({key: columns[key]}), io.BytesIO())
            except (pyarrow.ArrowException, OverflowError, UnicodeError, ValueError, TypeError):
                columns[key] = pyarrow.array([None if value is None else repr(value)[:100] for value in values])
        if not text_only and draw.chance(20) and "image" in columns:
            held: list[Any] = [{"bytes": _PNGS[number], "path": None} for number in range(len(records))]
            columns["image"] = pyarrow.array(held if draw.chance(50) else [one["bytes"] for one in held])
        buffer = io.BytesIO()
        format.write_table(pyarrow.table(columns), buffer)
        files[f"tables/{name}"] = draw.damaged(buffer.getvalue(), 15)
    data = _common(draw) | {"source": "hub", "file": f"{ROOT}/tables"}
    data["columns"] = draw.one(({}, {}, {}, {"id": "id"}, {"suffix": "output"}))
    return Case("parquet", "instruct", data, files)


def hub_text(draw: Draw) -> Case:
    """A folder of JSONL, CSV or what `save_to_disk` wrote, as `source: hub` reads it."""
    one = draw.one((jsonl, instructions, csv_table))(draw)
    ((name, content), *_) = _tables(one)
    ending = "csv" if name.endswith("csv") else "jsonl"
    data = {"on_bad": one.data["on_bad"], "split": one.data["split"], "source": "hub", "file": f"{ROOT}/tables"}
    files: dict[str, bytes | Link] = {f"tables/train.{ending}": content}
    if draw.chance(20):
        files |= {"tables/state.json": draw.damaged(b'{"_data_files": []}'), "tables/dataset_info.json": b"{}"}
    return _with_files(Case("hub_text", one.task, data, files), _pictures(8))


def _scored(draw: Draw, task: str, references: dict[str, Any], predictions: list[Any], **options: str) -> Case:
    """Files for `ftlib score`."""
    case = _release(draw, f"score {task}", "", task, references)
    text = _json_writer(draw)(draw.spoilt_records(predictions) if draw.chance(50) else predictions)
    case.data = {"references": list(references), "predictions": "predictions.json"} | options
    case.files["predictions.json"] = draw.damaged(text.encode(errors="surrogatepass"), 12)
    return case


def score_vqa(draw: Draw) -> Case:
    """Questions, annotations, results."""
    count = draw.number(1, 4)
    files = {
        "q.json": {"questions": list(map(vqa_questions, range(count)))},
        "a.json": {"annotations": list(map(_answered, range(count)))},
    }
    return _scored(draw, "vqa", files, [{"question_id": number, "answer": "b"} for number in range(count)])


def score_docvqa(draw: Draw) -> Case:
    """Questions, a submission."""
    count = draw.number(1, 4)
    made = [docvqa_question(number, ["a", "b"], number // 2, "val") for number in range(count)]
    return _scored(
        draw, "docvqa", {"val.json": {"data": made}}, [{"questionId": n, "answer": "a"} for n in range(count)]
    )


def score_gqa(draw: Draw) -> Case:
    """Questions, predictions, and perhaps choices."""
    count = draw.number(1, 4)
    files: dict[str, Any] = {"q.json": {str(number): gqa_record(number) for number in range(count)}}
    answers = [{"questionId": str(number), "prediction": "yes"} for number in range(count)]
    case = _scored(draw, "gqa", files, answers)
    if draw.chance(40):
        content = {str(number): {"valid": ["yes"], "plausible": ["yes", "no"]} for number in range(count)}
        case.data["choices"] = "choices.json"
        case.files["choices.json"] = draw.damaged(dumped(draw.spoilt_often(content)).encode(errors="surrogatepass"))
    return case


def score_caption(draw: Draw) -> Case:
    """Captions."""
    count = draw.number(1, 4)
    content = {"images": list(map(coco_image, range(count))), "annotations": list(map(coco_caption, range(count)))}
    return _scored(
        draw, "caption", {"c.json": content}, [{"image_id": n, "caption": f"Caption {n}"} for n in range(count)]
    )


def score_detect(draw: Draw) -> Case:
    """Boxes, and perhaps masks."""
    count = draw.number(1, 4)
    images = list(map(coco_image, range(count)))
    content = {"images": images, "annotations": list(map(coco_object, range(count))), "categories": CATEGORIES}
    found = [
        {"image_id": number, "category_id": 17, "bbox": [10.0, 20, 30, 40], "score": 0.5} for number in range(count)
    ]
    if draw.chance(40):
        for one in found:
            one["segmentation"] = {"size": [200, 400], "counts": [0, 400, 79600]}
    return _scored(draw, "detect", {"i.json": content}, found)


def score_refer(draw: Draw) -> Case:
    """Boxes of expressions."""
    count = draw.number(1, 4)
    return _lines_scored(draw, "refer", [{"box": [1, 2, 30, 40], "image": f"{n}.jpg"} for n in range(count)])


def score_segment(draw: Draw) -> Case:
    """Masks of expressions."""
    masks = (
        {"size": [4, 5], "counts": [0, 20]},
        {"size": [4, 5], "polygons": [[0, 0, 4, 0, 4, 3]]},
        {"size": [4, 5], "counts": "0d0"},
    )
    return _lines_scored(draw, "segment", [{"mask": draw.one(masks)} for _ in range(draw.number(1, 4))])


def score_texts(draw: Draw) -> Case:
    """Labels, or texts."""
    count, task = draw.number(1, 4), draw.one(("classify", "text"))
    rows = [{"references": ["a b", "a"]} if draw.chance(30) else {"suffix": "a b"} for _ in range(count)]
    case = _lines_scored(draw, task, rows, "prediction")
    if draw.chance(20):
        case.data |= {"positive": "a b"} if task == "classify" else {"tokenize": draw.one(("char", "intl", "x", "zh"))}
    return case


def _lines_scored(draw: Draw, task: str, rows: list[dict[str, Any]], answer: str = "") -> Case:
    """JSONL of both."""
    references = [{"id": f"k{number}"} | made for number, made in enumerate(rows)]
    answers = [{"id": f"k{number}"} | ({answer: "a b"} if answer else made) for number, made in enumerate(rows)]
    case = _scored(draw, task, {}, answers)
    text = _json_writer(draw)(draw.spoilt_records(references) if draw.chance(50) else references)
    case.data["references"] = ["references.jsonl"]
    case.files["references.jsonl"] = draw.damaged(text.encode(errors="surrogatepass"), 12)
    return case


KINDS: dict[str, Callable[[Draw], Case]] = {
    "jsonl": jsonl,
    "csv": csv_table,
    "instructions": instructions,
    "files": split_files,
    "mixture": mixture,
    "folder": folder,
    "coco_detection": coco_detection,
    "coco_captions": coco_captions,
    "karpathy": karpathy,
    "vqav2": vqav2,
    "docvqa": docvqa,
    "gqa": gqa,
    "refcoco": refcoco,
    "parquet": parquet,
    "hub_text": hub_text,
    "score vqa": score_vqa,
    "score docvqa": score_docvqa,
    "score gqa": score_gqa,
    "score caption": score_caption,
    "score detect": score_detect,
    "score refer": score_refer,
    "score segment": score_segment,
    "score texts": score_texts,
}
"""What is read → what makes a case of it."""


@st.composite
def cases(draw: Callable[[st.SearchStrategy[Any]], Any], kind: str = "") -> Case:
    """A case of one kind, or of any."""
    return KINDS[kind or draw(st.sampled_from(list(KINDS)))](Draw(draw))
