"""What must hold of whatever is read from a case of `fuzz_cases`.

Nothing but UserError comes out, and soon. Every record is a row, is reported, or is counted as left out: what is in the
files is counted here with plain json and csv. Ids are there and occur once, every row is in one split. Reading again
gives the same, and the order of records changes no row's split.
"""

from __future__ import annotations

import contextlib
import csv
import importlib
import io
import json
import os
import pickle
import re
import resource
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from pydantic import ValidationError

from ftlib.config.schema import CHAT, Config, Data
from ftlib.core import registry
from ftlib.core.paths import Site
from ftlib.data.example import Example, InvalidRecord
from ftlib.data.scan import ScannedDataset, scan_source
from ftlib.data.sources import coco_detection, hf_datasets, refcoco
from ftlib.data.sources.imagefolder import IMAGES
from ftlib.data.sources.registry import iter_examples, skipped_counts
from ftlib.data.splits import SPLITS
from ftlib.errors import UserError
from ftlib.metrics import captions
from ftlib.metrics.meteor_spice import MetricUnavailable
from ftlib.metrics.summary import summary
from ftlib.tasks.registry import load_task
from ftlib.tasks.score_files import SCORERS
from tests.data.fuzz_cases import ROOT, Case, Link
from tests.data.preparing import prepare
from tests.limits import time_limit

SECONDS = 30
"""A case takes some hundredths."""

MEMORY = 4 << 30
"""Bytes that a case may take; threads and pools of memory reserve more than they use."""

_MODEL = {"family": "paligemma", "base": "ftlib/tiny-paligemma"}
_CAUSAL = {"family": "causal", "base": "ftlib/tiny-neox"}
_FULL = {"method": "full"}
Rows = list[Example]
Bads = list[InvalidRecord]


def check(case: Case, whole: bool = False) -> str:
    """Read a case in a folder of its own, and require what must hold.

    Args:
        whole: prepare it, too, which takes ten times as long.

    Returns:
        What became of it: "rows", "scores", or what the UserError says.
    """
    quiet = contextlib.redirect_stderr(io.StringIO())
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name, _bounded(), quiet:
        place = Path(name)
        root = place / "data" / "root"  # links to what lies above must not lead to what is written meanwhile
        root.mkdir(parents=True)
        _write(case, root)
        try:
            if case.kind.startswith("score"):
                _check_scores(case, root)
                return "scores"
            return _check_rows(case, root, place, whole)
        except UserError as error:
            _require_words(str(error))
            return error.problem


@contextlib.contextmanager
def _bounded() -> Iterator[None]:
    """A case takes little time and memory: beyond, it fails, and not the machine."""

    limits = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, limits[1]))
    try:
        with time_limit(SECONDS):
            yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def _write(case: Case, root: Path, files: dict[str, bytes | Link] | None = None) -> None:
    for name, content in (case.files if files is None else files).items():
        path = root / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, Link):
                path.symlink_to(content.target.replace(ROOT, str(root)))
            else:
                path.write_bytes(content.replace(ROOT.encode(), os.fsencode(root)))
        except OSError:  # a file where a folder of this name lies, or the other way round
            continue


def _require_words(text: str) -> None:
    """A message that can be printed, stored, and read."""
    text.encode()
    assert text.strip() and len(text) < 20_000 and "Traceback" not in text


def _data(case: Case, root: Path) -> Data | None:
    """The data section; None if the config would be refused."""
    section = json.loads(json.dumps(case.data).replace(ROOT, str(root)))
    try:
        return Data(root=str(root), **section)
    except ValidationError:
        return None


def _check_rows(case: Case, root: Path, place: Path, whole: bool) -> str:
    data = _data(case, root)
    if data is None:
        return "config"
    if data.source == "hub":
        hf_datasets.fetch(data)
    found = list(iter_examples(data, case.task))
    assert repr(found) == repr(list(iter_examples(data, case.task)))
    rows = [one for one in found if isinstance(one, Example)]
    bads = [one for one in found if isinstance(one, InvalidRecord)]
    for bad in bads:
        _require_words(f"{bad.location}: {bad.reason}")
    if count := _COUNTS.get(data.source if case.kind != "karpathy" else case.kind):
        count(case, data, rows, bads)
    intake = scan_source(data, place / "rows.arrow", load_task(case.task))
    assert len(intake.rows) + intake.invalid.count == len(found)
    assert intake.invalid.count >= len(bads)
    names = _ids(intake)
    assert all(names) and len(set(names)) == len(names)
    _check_order(case, data, intake, place)
    if whole:
        _check_prepared(case, data, intake, place)
    return "rows"


def _ids(intake: ScannedDataset) -> list[str]:
    again = intake.duplicate_numbers()
    return [f"{row.id}-{again[n]}" if n in again else row.id for n, row in enumerate(intake.rows)]


def _splits(data: Data, intake: ScannedDataset) -> dict[str, int]:
    """Id → split, by names of images and by texts."""
    contents = np.where(intake.images != 0, intake.images, intake.texts)
    codes = intake.assign_splits(data.split, intake.keys.groups, contents, np.zeros(len(contents), dtype=np.int8))
    assert codes.shape == (len(intake.rows),) and codes.max() < len(SPLITS)
    return dict(zip(_ids(intake), codes.tolist(), strict=True))


def _check_order(case: Case, data: Data, intake: ScannedDataset, place: Path) -> None:
    """The order of records changes no row's split."""
    splits = _splits(data, intake)
    if not case.reordered or intake.invalid.count:
        return
    other = place / "reordered"
    other.mkdir()
    _write(case, other, case.reordered)
    moved = _data(case, other)
    assert moved
    assert splits == _splits(moved, scan_source(moved, place / "reordered.arrow", load_task(case.task)))


def _check_prepared(case: Case, data: Data, intake: ScannedDataset, place: Path) -> None:
    """Every row is in one split, or counted as left out."""
    model = _CAUSAL if data.prompt == CHAT else _MODEL
    config = Config.model_validate({"name": "fuzz", "task": case.task, "model": model, "adapter": _FULL, "data": data})
    prepared = prepare(config, Site(store=place / "store", runs=place / "runs"))
    rows = [row for split in SPLITS for row in prepared.rows(split)]
    names = [row.id for row in rows]
    assert all(names) and len(set(names)) == len(names)
    assert set(names) <= set(_ids(intake))
    dropped = prepared.metadata["left_out"]
    reasons = ("beyond max_train or max_eval", "asked in another split", "unreadable image", "animated image")
    assert len(rows) + sum(dropped.get(reason, 0) for reason in reasons) == len(intake.rows)
    assert [prepared.metadata["splits"][split]["rows"] for split in SPLITS] == [len(prepared.rows(s)) for s in SPLITS]
    before = dict(zip(_ids(intake), intake.rows, strict=True))
    assert all((row.prefix, row.suffix, row.image) == _asked(before[row.id]) for row in rows)


def _asked(row: Example) -> tuple[str, str, str]:
    return row.prefix, row.suffix, row.image


def _check_scores(case: Case, root: Path) -> None:
    given = dict(case.data)
    references, predictions = [root / name for name in given.pop("references")], root / given.pop("predictions")
    options = {name: root / value if name == "choices" else value for name, value in given.items()}
    module = importlib.import_module(SCORERS[case.task])
    with patch.multiple(captions, add_meteor=_no_java, add_spice=_no_java):
        first, second = (summary(module.score(references, predictions, **options), {}) for _ in range(2))
    assert json.dumps(first, sort_keys=True) == json.dumps(second, sort_keys=True)
    answers = _json(predictions)
    if answers is None:
        answers = [line for line in predictions.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
    elif isinstance(answers, dict):
        answers = [answers]
    if case.task not in ("detect", "gqa"):  # there an image has any number of records; not all questions are judged
        assert first["n"] == len(answers)


def _no_java(*_: object) -> None:
    raise MetricUnavailable("starts too slowly to be fuzzed, and reads no files")


def _json(path: Path) -> Any:
    """The content of a JSON file, as plain json has it; None if it is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"), parse_int=lambda digits: int(digits[:100]))
    except (ValueError, RecursionError):
        return None


def _listed(path: Path, name: str) -> list[Any]:
    """A list of a JSON file's object; if the name stands there several times, the last."""
    content = _json(path)
    assert content is not None, f"{path}: read although it is no JSON"
    found: list[Any] = content[name]
    return found


def _places(unit: str, rows: Rows, bads: Bads) -> int:
    """How many records of a kind are rows or are reported."""
    pattern = re.compile(rf"{unit} \d+$" if unit else r"(:|: record |: line )\d+$", re.DOTALL)
    return len({one.location for one in [*rows, *bads] if pattern.search(one.location)})


def _count_tables(case: Case, data: Data, rows: Rows, bads: Bads) -> None:
    """Every line or record is a row (or those of a chat), is reported or left out."""
    module = importlib.import_module(registry.SOURCES[data.source].module)
    counts = [(_csv_records if data.source == "csv" else _json_records)(path, data) for path in module.files(data)]
    if None not in counts:
        assert case.records in (None, sum(len(found or ()) for found in counts))
        assert _places("", rows, bads) + sum(skipped_counts(data).values()) == sum(len(found or ()) for found in counts)
    if data.source == "instructions":
        _count_answers({place: record for found in counts for place, record in (found or {}).items()}, rows, bads)
    else:
        assert len(rows) + len(bads) == _places("", rows, bads)


def _count_answers(records: dict[str, Any], rows: Rows, bads: Bads) -> None:
    """Each answer of a conversation that gives any row is one, is reported, or is marked as not to be learned.

    Args:
        records: where each stands → the record.
    """
    by_place: dict[str, Rows] = {}
    for row in rows:
        by_place.setdefault(row.location, []).append(row)
    reported = Counter(bad.location for bad in bads)
    for place, found in by_place.items():
        chat = _chat(records.get(place))
        if chat is not None:
            answers = [turn for turn in chat if turn.get("role", turn.get("from")) not in _ASKERS]
            marked = sum(any(turn.get(name) in (0, False) for name in _WEIGHTS if name in turn) for turn in answers)
            assert len(found) + reported[place] == len(answers) - marked
            assert sum(row.unlabelled_turns for row in found) == marked or reported[place]


_WEIGHTS = ("weight", "train", "training", "loss", "loss_weight")
_ASKERS = ("user", "human", "system")


def _chat(record: Any) -> list[Any] | None:
    chats = [record.get(name) for name in ("messages", "conversations")] if isinstance(record, dict) else []
    return next((chat for chat in chats if isinstance(chat, list)), None)


def _json_records(path: Path, data: Data) -> dict[str, Any] | None:
    """The records of a file of rows, by their places; None where they cannot be told with plain json."""
    raw = path.read_bytes()
    try:
        text = raw.decode(data.encoding or "utf-8-sig")
        whole = json.loads(text.strip(" \t\r\n\ufeff"), parse_int=lambda digits: int(digits[:100]))
    except (ValueError, RecursionError):
        whole = None
    if isinstance(whole, list):
        return {f"{path}: record {number}": record for number, record in enumerate(whole, 1)}
    if data.encoding:
        try:
            raw = raw.decode(data.encoding).encode()
        except ValueError:
            return None
    lines = raw.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    if next(filter(bytes.strip, lines), b"").strip(b" \t\r\n").startswith(b"["):  # a damaged list, or lists in lines
        return None
    return {f"{path}:{number}": _loaded(line) for number, line in enumerate(lines, 1) if line.strip()}


def _loaded(line: bytes) -> Any:
    try:
        return json.loads(line, parse_int=lambda digits: int(digits[:100]))
    except (ValueError, RecursionError):
        return None


def _csv_records(path: Path, data: Data) -> dict[str, Any] | None:
    """The records below the header; None where they cannot be told with plain csv."""
    try:
        text = path.read_bytes().decode(data.encoding or "utf-8-sig")
        lines = [f"{line}\n" for line in text.removesuffix("\n").split("\n")]
    except ValueError:
        return None
    for delimiter in ",;\t":
        with contextlib.suppress(csv.Error):
            records = [record for record in csv.reader(lines, strict=True, delimiter=delimiter) if record]
            if len(records[0]) > 1:
                return {f"{path}: {number}": record for number, record in enumerate(records[1:])}
    return None


def _count_folder(case: Case, data: Data, rows: Rows, bads: Bads) -> None:
    """Every image below a folder is a row, is reported or left out."""
    wanted = 0
    for inside, folders, names in os.walk(data.root):
        folders[:] = [name for name in folders if not name.startswith(".") and name.lower() != "__macosx"]
        wanted += sum(Path(name).suffix.lower() in IMAGES and not name.startswith(".") for name in names)
        if any(Path(inside, name).is_symlink() for name in (*folders, *names)):
            return  # what lies behind links counts as often as it is reached
    unreadable = [bad for bad in bads if "name is not a valid class" in bad.reason]
    images = sum(Path(bad.location).suffix.lower() in IMAGES for bad in bads if bad not in unreadable)
    if not unreadable:  # one report stands for all of the folder
        assert len(rows) + images + sum(skipped_counts(data).values()) == wanted


def _count_detection(case: Case, data: Data, rows: Rows, bads: Bads) -> None:
    """Every image is a row, is reported, or has nothing to be asked for; so is every annotation."""
    files = coco_detection.files(data)
    images = sum(len(_listed(path, "images")) for path in files)
    annotations = sum(len(_listed(path, "annotations")) for path in files)
    reported = Counter(bad.location.split(": ")[-1].split()[0] for bad in bads)
    counts = skipped_counts(data)
    assert len(rows) + reported["image"] + counts[coco_detection.IMAGE_WITHOUT_BOXES] == images
    assert _places("image", rows, bads) + counts[coco_detection.IMAGE_WITHOUT_BOXES] == images
    if not bads and not counts[coco_detection.IMAGE_WITHOUT_BOXES]:
        assert sum(len(row.facts["objects"]) for row in rows) == annotations


def _count_captions(case: Case, data: Data, rows: Rows, bads: Bads) -> None:
    """Every image is a row, or those of its captions, or is reported; every caption lies in one or is reported."""
    from ftlib.data.sources.coco_captions import files

    paths = files(data)
    images = sum(len(_listed(path, "images")) for path in paths)
    annotations = sum(len(_listed(path, "annotations")) for path in paths)
    reported = Counter(bad.location.split(": ")[-1].split()[0] for bad in bads)
    asked = {(row.part, row.image, str(row.facts["image_id"])) for row in rows}
    assert len(asked) + reported["image"] >= images
    learned = sum(len(row.references) or 1 for row in rows)
    assert learned + reported["annotation"] <= annotations
    assert _places("image", rows, bads) == images
    if not reported["image"]:
        assert len(asked) == images and learned + reported["annotation"] == annotations


def _count_karpathy(case: Case, data: Data, rows: Rows, bads: Bads) -> None:
    """Every image is a row, or those of its captions, or is reported."""
    images = _listed(Path(data.root) / "dataset_coco.json", "images")
    assert _places("image", rows, bads) == len(images)


def _count_vqav2(case: Case, data: Data, rows: Rows, bads: Bads) -> None:
    """Every annotation is a row or is reported; so is every question."""
    from ftlib.data.sources.vqav2 import files

    paths = files(data)
    annotations = sum(len(_listed(path, "annotations")) for path in paths if "annotations" in path.name)
    questions = sum(len(_listed(path, "questions")) for path in paths if "questions" in path.name)
    assert _places("annotation", rows, bads) == annotations
    assert len(rows) + len(bads) >= questions


def _count_docvqa(case: Case, data: Data, rows: Rows, bads: Bads) -> None:
    """Every question is a row or is reported."""
    from ftlib.data.sources.docvqa import files

    questions = sum(len(_listed(path, "data")) for path in files(data))
    assert len(rows) + len(bads) == _places("question", rows, bads) == questions


def _count_gqa(case: Case, data: Data, rows: Rows, bads: Bads) -> None:
    """Every question is a row, is reported, or left out since it is not balanced, nor follows from one that is."""
    from ftlib.data.sources.gqa import files

    questions = 0
    for path in files(data):
        pairs = _members(path)
        questions += len(pairs)
    assert len(rows) + len(bads) + sum(skipped_counts(data).values()) == questions


def _members(path: Path) -> list[tuple[str, Any]]:
    """The members of a file's object, those of the same name, too."""
    pairs: list[tuple[str, Any]] = []

    def keep(found: list[tuple[str, Any]]) -> Any:
        nonlocal pairs
        pairs = found  # the outermost object ends last
        return dict(found)

    text = path.read_text(encoding="utf-8-sig")
    json.loads(text, object_pairs_hook=keep, parse_int=lambda digits: int(digits[:100]))
    return pairs


def _count_refcoco(case: Case, data: Data, rows: Rows, bads: Bads) -> None:
    """Every expression is a row, is reported or left out."""
    refs = pickle.loads(refcoco.files(data)[0].read_bytes(), encoding="utf-8", errors="surrogateescape")
    sentences = [ref.get("sentences") if isinstance(ref, dict) else None for ref in refs]
    expressions = sum(len(found) if isinstance(found, list) and found else 1 for found in sentences)
    reported = [bad for bad in bads if ": ref " in bad.location]
    assert len(rows) + len(reported) + skipped_counts(data)[refcoco.LEAKED_EXPRESSIONS] == expressions


def _count_hub(case: Case, data: Data, rows: Rows, bads: Bads) -> None:
    """Every row of the tables is one, or those of a chat, is reported or left out."""
    from ftlib.data.sources.hf_tables import load_tables

    total = sum(table.num_rows for table in load_tables(data).values())
    assert len({one.location for one in [*rows, *bads]}) + sum(skipped_counts(data).values()) == total


def _count_mixture(case: Case, data: Data, rows: Rows, bads: Bads) -> None:
    """Every row of a part is one of the mixture."""
    total = 0
    for part in data.datasets.values():
        found = list(iter_examples(part, case.task))
        own = [one for one in found if isinstance(one, Example)]
        _COUNTS[part.source](
            replace(case, records=None), part, own, [one for one in found if isinstance(one, InvalidRecord)]
        )
        total += len(found)
    assert len(rows) + len(bads) == total


_COUNTS: dict[str, Callable[[Case, Data, Rows, Bads], None]] = {
    "jsonl": _count_tables,
    "csv": _count_tables,
    "instructions": _count_tables,
    "mixture": _count_mixture,
    "folder": _count_folder,
    "coco_detection": _count_detection,
    "coco_captions": _count_captions,
    "karpathy": _count_karpathy,
    "vqav2": _count_vqav2,
    "docvqa": _count_docvqa,
    "gqa": _count_gqa,
    "refcoco": _count_refcoco,
    "refcoco+": _count_refcoco,
    "hub": _count_hub,
}
