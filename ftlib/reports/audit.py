"""Audit of a dataset: likely wrong labels, by models that did not see them in training, and near-duplicate images.

The models are the runs of a cross-validation (`data.split.folds`), or a single run. Of every run the rows that it was
not trained on count: those of valid, and of test, where the probabilities of several runs are averaged. Out come a
page with pictures, a CSV file to correct, and one of near-duplicates. `corrected_rows` applies a corrected CSV.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftlib import __version__
from ftlib.config.loader import load_experiment
from ftlib.config.schema import Config
from ftlib.core import files, jsonl, log
from ftlib.core.log import escape_control_characters
from ftlib.core.paths import Site
from ftlib.core.redaction import redact
from ftlib.data.dataset import PreparedDataset, open_prepared
from ftlib.data.example import Example, ImageFile, raise_all
from ftlib.data.images import image_path, open_image
from ftlib.data.splits import SPLITS
from ftlib.errors import UserError
from ftlib.reports.gallery import picture
from ftlib.reports.html import Context, render_page
from ftlib.runs.run import Run

COLUMNS = ("id", "split", "given", "suggested", "p_given", "p_suggested", "label", "drop", "image")
"""Columns of the CSV. `label` (a corrected label) and `drop` (anything: leave the row out) are empty at first."""

MAX_SHOWN = 300
MAX_PAIRS = 60


@dataclass(frozen=True)
class LabelSuspect:
    """A label that is likely wrong.

    Attributes:
        split: where the row is evaluated: `fold 3`, `valid` or `test`.
        given, suggested: labels; p_given, p_suggested: their probabilities.
    """

    id: str
    split: str
    image: str
    prompt: str
    given: str
    suggested: str
    p_given: float
    p_suggested: float


@dataclass(frozen=True)
class NearDuplicatePair:
    """Two near-duplicate images in different splits or folds; for each of both the split, row ID, label and image."""

    rows: tuple[tuple[str, str, str, str], tuple[str, str, str, str]]


@dataclass(frozen=True)
class Audit:
    """The result.

    Attributes:
        config: of the first run.
        suspects: the most likely wrong label first.
        audited, rows: how many rows have a probability, and how many there are.
        wrong: estimated number of wrong labels.
        pairs: None if there are no images, or they were not compared.
    """

    name: str
    config: Config
    runs: int
    suspects: list[LabelSuspect]
    audited: int
    rows: int
    wrong: float
    pairs: list[NearDuplicatePair] | None


def audit_runs(runs: Sequence[Run], site: Site, near_duplicates: bool = True) -> Audit:
    """Audit the data of runs by their evaluations.

    Args:
        near_duplicates: whether to compare images.

    Raises:
        UserError: a run has no probabilities of labels, the runs have different labels, or the data are a mixture.
    """
    import numpy as np

    from ftlib.metrics.confident_learning import find_label_issues

    configs = [load_experiment(run.config_file, [], site).config for run in runs]
    if configs[0].data.parts:
        raise UserError(f"{configs[0].name}: the data are a mixture of datasets", "Audit a run of each dataset.")
    shares: dict[str, list[dict[str, float]]] = {}
    records: dict[str, dict[str, Any]] = {}
    places: dict[str, str] = {}
    for run, config in zip(runs, configs, strict=True):
        for split, rows in _evaluations(run, config):
            for record in rows:
                shares.setdefault(record["id"], []).append(record["probabilities"])
                records[record["id"]] = record
                places.setdefault(record["id"], _place(split, config))
    labels = sorted(next(iter(shares.values()))[0])
    ids = sorted(records)
    if any(sorted(one) != labels for each in shares.values() for one in each):
        raise UserError(f"{configs[0].name}: these runs have different labels", "Audit runs on one dataset.")
    probabilities = np.array(
        [np.mean([[one[label] for label in labels] for one in shares[name]], axis=0) for name in ids]
    )
    given = [records[name]["references"][0].strip() for name in ids]
    unknown = sorted(set(given) - set(labels))
    if unknown:
        raise UserError(f"{configs[0].name}: {unknown[0]!r} is the label of a row, but none of the model's")
    codes = np.array([labels.index(label) for label in given])
    found = find_label_issues(probabilities, codes)
    suspects = [
        LabelSuspect(
            ids[row],
            places[ids[row]],
            records[ids[row]]["image"],
            records[ids[row]]["prompt"],
            given[row],
            labels[found.suggested[row]],
            float(probabilities[row, codes[row]]),
            float(probabilities[row, found.suggested[row]]),
        )
        for row in found.rows.tolist()
    ]
    prepared = open_prepared(configs[0], site, runs[0])
    total = sum(len(prepared.rows(split)) for split in SPLITS)
    pairs = (
        _pairs(prepared, places, configs[0])
        if near_duplicates and any(one["image"] for one in records.values())
        else None
    )
    wrong = float(found.joint.sum() - np.trace(found.joint))
    return Audit(configs[0].name, configs[0], len(runs), suspects, len(ids), total, wrong, pairs)


def _evaluations(run: Run, config: Config) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Yield (split, rows of predictions.jsonl) of valid and test, with probabilities.

    Raises:
        UserError: valid has none.
    """
    for split in ("valid", "test"):
        folder = run.folder / "eval" / config.data.source / split
        for place in (folder / "after", *sorted(folder.glob("settings-*/after"))):
            rows = jsonl.read_jsonl_log(place / "predictions.jsonl") if files.is_complete(place) else []
            if rows and all("probabilities" in row for row in rows):
                yield split, rows
                break
        else:
            if split == "valid":
                problem = f"{run.folder}: valid has no evaluation with the probabilities of all labels"
                remedy = f"ftlib evaluate {run.folder} evaluation.decode=choose --split valid --split test"
                raise UserError(problem, remedy)


def _place(split: str, config: Config) -> str:
    rule = config.data.split
    return f"fold {rule.fold}" if split == "valid" and rule.folds else split


# Near-duplicates.


def _pairs(prepared: PreparedDataset, places: Mapping[str, str], config: Config) -> list[NearDuplicatePair]:
    """Return pairs of near-duplicate images in different splits or folds; identical files are always in one split."""
    import numpy as np

    from ftlib.data.near_duplicates import near_duplicates, perceptual_hash

    first: dict[ImageFile, tuple[str, Example]] = {}
    for split in SPLITS:
        for row in prepared.rows(split):
            for file in row.image_files:
                first.setdefault(file, (places.get(row.id, split), row))
    hashes = []
    for name, frame, digest in log.track(list(first), "comparing images"):
        image = open_image(image_path(prepared.root, name), frame, digest, config.data.max_pixels)
        hashes.append(perceptual_hash(image))
    alike = near_duplicates(
        np.array(hashes, dtype=np.uint64).reshape(-1, 2),
        np.array([bytes.fromhex(digest) for _, _, digest in first], dtype="V32"),
    )
    ordered = list(first.items())
    found = []
    for pair in alike.pairs:
        ((left_name, _, _), (one, left)), ((right_name, _, _), (other, right)) = (ordered[index] for index in pair)
        if one != other:
            rows = ((one, left.id, left.suffix, left_name), (other, right.id, right.suffix, right_name))
            found.append(NearDuplicatePair(rows))
    return found


# The page and the files beside it.


def write_audit(audit: Audit, page: Path) -> tuple[Path, Path | None]:
    """Write the page, `labels.csv` and `near-duplicates.csv` beside it, named like the page.

    Returns:
        The CSV files; the second is None without near-duplicates.
    """
    labels = page.with_name(f"{page.stem}-labels.csv")
    files.write_text(labels, _csv([COLUMNS, *(_cells(one) for one in audit.suspects)]), urls=False)
    pairs = page.with_name(f"{page.stem}-near-duplicates.csv") if audit.pairs else None
    if pairs:
        names = [f"{name}_{side}" for side in (1, 2) for name in ("split", "id", "label", "image")]
        listed = _csv([names, *([*one.rows[0], *one.rows[1]] for one in audit.pairs or [])])
        files.write_text(pairs, listed, urls=False)
    files.write_text(page, render_audit(audit, labels.name))
    return labels, pairs


def _cells(one: LabelSuspect) -> list[str]:
    shares = [f"{one.p_given:.4f}", f"{one.p_suggested:.4f}"]
    return [one.id, one.split, one.given, one.suggested, *shares, "", "", one.image]


def _csv(rows: Sequence[Sequence[str]]) -> str:
    out = io.StringIO()
    csv.writer(out).writerows([_csv_cell(cell) for cell in row] for row in rows)
    return out.getvalue()


def _csv_cell(text: str) -> str:
    """Return a text as the CSV has it: URLs whole, so that IDs and labels are those of the rows."""
    return redact(escape_control_characters(text), urls=False)


def headline(audit: Audit) -> str:
    """Return the result in one sentence."""
    return f"{len(audit.suspects):,} of {audit.audited:,} labels are likely wrong"


def render_audit(audit: Audit, labels_file: str) -> str:
    """Return the page."""
    shown = audit.suspects[:MAX_SHOWN] if audit.config.privacy.text else []
    root, images = Path(audit.config.data.root), audit.config.privacy.images
    return render_page(
        f"Audit of {audit.name}: {headline(audit)}",
        "audit.html.j2",
        name=audit.name,
        headline=headline(audit),
        remarks=list(_remarks(audit, labels_file)),
        count=f"{len(shown)} of {len(audit.suspects)}" if len(shown) < len(audit.suspects) else str(len(shown)),
        cards=[_card(one, root, images) for one in shown],
        pairs=None if audit.pairs is None else _pair_cards(audit, root, images),
        footer=f"Made by ftlib {__version__}",
    )


def _remarks(audit: Audit, labels_file: str) -> Iterator[str]:
    models = "a model" if audit.runs == 1 else f"{audit.runs} models"
    yield (
        f"Estimated by {models} on rows outside of the training data (confident learning, Northcutt et al. 2021): "
        f"about {audit.wrong:.0f} wrong labels. Listed are those whose label is least probable; some are errors of the "
        "model."
    )
    if audit.audited < audit.rows:
        yield (
            f"{audit.rows - audit.audited:,} of {audit.rows:,} rows are not audited, because every model was trained "
            "on them. Cross-validation audits all: ftlib audit CONFIG --executor debug."
        )
    yield f"Correct {labels_file}: write the right label into the column label, or anything into drop."
    if not audit.config.privacy.text:
        yield "Rows are hidden (privacy.text)."


def _card(one: LabelSuspect, root: Path, images: bool) -> Context:
    return {
        "picture": picture(root, one.image) if images and one.image else None,
        "lines": [
            ("label", f"{one.given} ({one.p_given:.1%})"),
            ("likely", f"{one.suggested} ({one.p_suggested:.1%})"),
            *([] if one.image else [("prompt", one.prompt)]),
            ("id", one.id),
            ("split", one.split),
        ],
    }


def _pair_cards(audit: Audit, root: Path, images: bool) -> Context:
    pairs = audit.pairs or []
    shown = pairs[:MAX_PAIRS] if audit.config.privacy.text and images else []
    return {
        "count": f"{len(shown)} of {len(pairs)}" if len(shown) < len(pairs) else str(len(pairs)),
        "cards": [
            [
                {"picture": picture(root, image), "lines": [("label", label), ("id", name), ("split", place)]}
                for place, name, label, image in pair.rows
            ]
            for pair in shown
        ],
    }


# A corrected CSV file, applied to the rows.


def corrected_rows(config: Config, site: Site, run: Run, corrected: Path) -> tuple[str, int, int]:
    """Apply a corrected CSV file to the rows of a run's dataset.

    Returns:
        All rows as JSONL for source `jsonl`, and how many labels were changed and rows left out.

    Raises:
        UserError: missing columns, unknown or repeated ids, or rows that JSONL cannot hold.
    """
    changes = _read_corrections(corrected)
    prepared = open_prepared(config, site, run)
    lines, left = [], dict(changes)
    changed = dropped = 0
    labels, faults = set(), []
    for split in SPLITS:
        for row in prepared.rows(split):
            if row.frame:
                raise UserError(f"row {row.id}: frames of animated images cannot be written as JSONL")
            labels.add(row.suffix)
            change = left.pop(_csv_cell(row.id), _NO_CHANGE)
            if (change.label or change.drop) and change.given not in (None, _csv_cell(row.suffix)):
                told = f"its label is {row.suffix!r}, but the column given has {change.given!r}"
                faults.append(f"{corrected}: id {row.id}: {told}: it is of other data, or a spreadsheet changed it")
            changed += bool(change.label) and change.label != row.suffix and not change.drop
            dropped += change.drop
            if not change.drop:
                line = json.dumps(_as_jsonl(row, change.label), ensure_ascii=False) + "\n"
                if redact(line, urls=False) != line:
                    faults.append(f"row {row.id}: contains a secret of this environment, which would be masked")
                lines.append(line)
    faults += [f"{corrected}: id {name}: no such row" for name in left]
    raise_all(faults, "Nothing was written.")
    used = {change.label for change in changes.values() if change.label and not change.drop}
    if new := sorted(used - labels):
        log.warning(f"labels that the data do not have yet: {', '.join(map(repr, new[:10]))}; check their spelling")
    return "".join(lines), changed, dropped


def _as_jsonl(row: Example, label: str) -> dict[str, Any]:
    image = {"images": row.images} if row.other_images else {"image": row.image or None}
    own = {"id": row.id, "prefix": row.prefix, "suffix": label or row.suffix}
    official = {"split": row.part} if row.part else {}
    references = {"references": list(row.references)} if row.references and not label else {}
    return {**row.facts, **image, **{name: value for name, value in own.items() if value}, **references, **official}


@dataclass(frozen=True)
class _Change:
    """A row of a corrected CSV file.

    Attributes:
        given: the label that the audit saw; None: the file has no such column.
        label: the corrected label, or "".
        drop: whether to leave the row out.
    """

    given: str | None = None
    label: str = ""
    drop: bool = False


_NO_CHANGE = _Change()


def _read_corrections(path: Path) -> dict[str, _Change]:
    """Return the changes by ID.

    Raises:
        UserError: the file cannot be read, lacks a column, or has a row with too many cells, or an ID twice.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not UTF-8", "Save it in the spreadsheet as CSV UTF-8.") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    separator = ";" if ";" in text.partition("\n")[0] else ","  # as spreadsheets of some countries write it
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=separator)
    if missing := {"id", "label", "drop"} - set(reader.fieldnames or ()):
        raise UserError(f"{path}: column {sorted(missing)[0]} is missing", "Correct the file that ftlib audit wrote.")
    found: dict[str, _Change] = {}
    faults = []
    for line in reader:
        key = line["id"] or ""
        if None in line:
            faults.append(f"{path}:{reader.line_num}: more cells than columns; quote a text that contains {separator}")
        if key in found:
            faults.append(f"{path}:{reader.line_num}: id {key} occurs twice")
        label, drop = ((line[name] or "").strip() for name in ("label", "drop"))
        found[key] = _Change(line.get("given"), label, bool(drop))
    raise_all(faults, "Nothing was written.")
    return found
