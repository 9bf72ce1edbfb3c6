"""Rows of the evaluated split with picture, answer and expected answer: worst, changed by training, best."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftlib.data.images import image_path, open_image
from ftlib.data.location_tokens import Box, parse_objects
from ftlib.errors import UserError
from ftlib.reports.html import Context
from ftlib.reports.run_record import RunRecord, SplitRecord

if TYPE_CHECKING:
    from PIL.Image import Image


MAX_WRONG, MAX_CHANGED, MAX_RIGHT = 24, 12, 12
GRADED = ("caption", "instruct", "segment")
"""Tasks whose answers are better or worse, but hardly ever just right."""

PredictionRow = dict[str, Any]


class Gallery:
    """Chooses rows and describes a card for each; no row is shown twice.

    Args:
        graded: rows are told by their scores, not as right or wrong.
        images, text: whether those of the data are shown.
    """

    def __init__(self, split: SplitRecord, root: Path, graded: bool, images: bool, text: bool) -> None:
        self.graded = graded
        self.images = images
        self.text = text
        self.higher_is_better = split.latest.higher_is_better
        self.rows = split.latest.predictions
        self.root = root
        self.before = {row["id"]: row for row in split.before.predictions} if split.before and split.after else {}
        self.prompts = list(dict.fromkeys(row["prompt"] for row in self.rows))
        self._shown: set[str] = set()

    def groups(self) -> list[Context]:
        """The parts of the gallery that have rows."""
        return [part for part in (self._by_score() if self.graded else self._by_verdict()) if part]

    def _by_score(self) -> list[Context | None]:
        rows = sorted(self.rows, key=self._sort_key)
        worst = rows[: min(MAX_WRONG, (len(rows) + 1) // 2)]
        again = [row for row in rows if row["id"] in self.before]
        change = {row["id"]: self._sort_key(row) - self._sort_key(self.before[row["id"]]) for row in again}
        titles = ["Lowest scores", "Highest scores"][:: 1 if self.higher_is_better else -1]
        moved = sorted((row for row in rows if change.get(row["id"])), key=lambda row: change[row["id"]])
        worse, better = [[row for row in moved if sign * change[row["id"]] > 0] for sign in (-1, 1)]
        return [
            self._group(titles[0], rows, worst),
            self._group("Most improved by training", better, better[::-1][:MAX_CHANGED]),
            self._group("Most worsened by training", worse, worse[:MAX_CHANGED]),
            self._group(titles[1], rows, self._not_shown(rows[::-1])[:MAX_RIGHT]),
        ]

    def _by_verdict(self) -> list[Context | None]:
        wrong = sorted((row for row in self.rows if not self._right(row)), key=self._sort_key)
        right = [row for row in self.rows if self._right(row)]
        learned = [row for row in right if row["id"] in self.before and not self._right(self.before[row["id"]])]
        lost = [row for row in wrong if row["id"] in self.before and self._right(self.before[row["id"]])]
        return [
            self._group("Wrong answers", wrong, wrong[:MAX_WRONG]),
            self._group("Wrong before training, right after", learned, evenly_spaced(learned, MAX_CHANGED)),
            self._group("Right before training, wrong after", lost, evenly_spaced(lost, MAX_CHANGED)),
            self._group("Right answers", right, evenly_spaced(self._not_shown(right), MAX_RIGHT)),
        ]

    def _right(self, row: PredictionRow) -> bool:
        """A partial score is not right, nor is an answer without one."""
        if row.get("score") is None:
            return False
        return _score(row) >= 1 if self.higher_is_better else _score(row) <= 0

    def _sort_key(self, row: PredictionRow) -> float:
        return _score(row) if self.higher_is_better else -_score(row)

    def _not_shown(self, rows: Sequence[PredictionRow]) -> list[PredictionRow]:
        return [row for row in rows if row["id"] not in self._shown]

    def _group(self, title: str, rows: Sequence[PredictionRow], chosen: Sequence[PredictionRow]) -> Context | None:
        if not rows:
            return None
        new = self._not_shown(chosen)
        self._shown.update(row["id"] for row in new)
        return {
            "title": title,
            "count": _count(len(rows), len(new)),
            "images": self.images and any(row.get("image") for row in new),
            "cards": [self._card(row) for row in new],
        }

    def _card(self, row: PredictionRow) -> Context:
        right = self._right(row)
        lines = self._texts(row, right) if self.text else [_line("score", f"{_score(row):.2f}")]
        drawn = overlay(row) if self.text else []
        return {
            "verdict": "graded" if self.graded else "right" if right else "wrong",
            "twice": self.text and bool(row.get("without_context")),
            "picture": picture(self.root, row["image"], drawn) if self.images and row.get("image") else None,
            "lines": [*lines, _line("id", str(row["id"]))],
        }

    def _texts(self, row: PredictionRow, right: bool) -> list[Context]:
        """What was asked, answered and expected."""
        without_context, lines = row.get("without_context"), []
        if without_context:
            lines.append(_line("without context", _answer(without_context["prediction"]), self._mark(without_context)))
        name = "with context" if without_context else "answer"
        lines.append(_line(name, _answer(row["prediction"]), self._mark(row), main=True))
        if self.graded or not right:
            lines.append(_line("expected", _expected(row)))
        if not self.graded and not right and _score(row) > 0:
            lines.append(_line("score", f"{_score(row):.2f}"))
        if row["id"] in self.before:
            earlier = self.before[row["id"]]
            lines.append(_line("before", _answer(earlier["prediction"]), self._mark(earlier)))
        if len(self.prompts) > 1:
            lines.append(_line("prompt", row["prompt"]))
        return lines

    def _mark(self, row: PredictionRow) -> str:
        """What stands behind an answer: its score, or the verdict."""
        return f"\u00a0({_score(row):.2f})" if self.graded else f"\u00a0{'✓' if self._right(row) else '✗'}"


def answers_context(record: RunRecord) -> Context | None:
    """Pictures and answers of the first evaluated split; None before the first evaluation."""
    if not record.splits:
        return None
    split = record.splits[0]
    root, graded = Path(record.config.data.root), record.config.task in GRADED
    gallery = Gallery(split, root, graded, record.images, record.text)
    source, remarks = f"From the {split.split} split, {split.latest.when} training.", []
    if not record.text:
        source += " Prompts, answers and labels are left out."
    elif record.images and any(overlay(row) for row in gallery.rows):
        remarks.append("Full lines: answered. Dashed lines: expected.")
    if record.text and any("without_context" in row for row in gallery.rows):
        remarks.append("Rows with a context were asked twice; the score is that of the answer with it.")
    same = record.text and len(gallery.prompts) == 1
    return {
        "source": source,
        "prompt": gallery.prompts[0] if same else None,
        "remarks": remarks,
        "groups": gallery.groups(),
    }


def evenly_spaced(rows: Sequence[PredictionRow], count: int) -> list[PredictionRow]:
    """At most `count` rows, evenly spaced over all of them: the same ones each time."""
    if len(rows) <= count:
        return list(rows)
    return [rows[number * len(rows) // count] for number in range(count)]


def _score(row: PredictionRow) -> float:
    """Metrics of a whole corpus give no row its own."""
    return float(row.get("score") or 0.0)


def _count(total: int, shown: int) -> str:
    if shown == total:
        return str(total)
    return f"{shown} of {total}" if shown else f"{total}, shown above"


def _line(name: str, text: str, mark: str = "", main: bool = False) -> Context:
    """A line of a card; no text stands for an empty answer."""
    return {"name": name, "text": text, "mark": mark, "main": main}


def _expected(row: PredictionRow) -> str:
    texts = [located_labels(reference) or reference or "(empty)" for reference in row["references"]]
    return ", ".join(dict.fromkeys(texts))


def _answer(text: str) -> str:
    """Location tokens are drawn, not written."""
    return (located_labels(text) or text) if text.strip() else ""


# Image files as data: addresses that carry their own bytes, or the reason why there is no picture to show.
#
# Every image is encoded anew, since files carry more than the picture: where and by whom it was taken, with what.

EMBED_BYTES = 32 * 1024
SHRUNK_PIXELS = 320


def picture(root: Path, name: str, over: Sequence[Context] = ()) -> Context:
    """The image `name` of the dataset in `root`, with the shapes of a drawing laid over it, or why it is missing."""
    missing, source = "", ""
    try:
        mime, content = _load(image_path(root, name))
        source = f"data:{mime};base64,{base64.b64encode(content).decode()}"
    except FileNotFoundError:
        missing = f"{name}: this image file is missing"
    except (UserError, OSError) as error:
        missing = f"left out: {error}"
    except ImportError:
        missing = f"{name}: left out: Pillow is not installed; make the report in the container, by jobs/run.sh"
    return {"name": name, "source": source, "missing": missing, "overlay": over}


def _load(path: Path) -> tuple[str, bytes]:
    """MIME type and bytes of what to show: without loss if it is small, else shrunk.

    Raises:
        FileNotFoundError, OSError: as the file system says.
        ImportError: Pillow would be needed.
        UserError: no image that can be read.
    """
    path.stat()
    image = open_image(path, max_pixels=(2 * SHRUNK_PIXELS) ** 2)
    if max(image.size) <= SHRUNK_PIXELS and len(content := _encoded(image, "PNG", optimize=True)) <= EMBED_BYTES:
        return "image/png", content
    image.thumbnail((SHRUNK_PIXELS, SHRUNK_PIXELS))
    return "image/jpeg", _encoded(image, "JPEG", quality=82)


def _encoded(image: Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


# Boxes and masks over a picture: what was answered in full lines, what was expected in dashed ones.

_GRID = 128
"""Run lengths are drawn on at most so many columns and rows."""


def overlay(row: dict[str, Any]) -> list[Context]:
    """The shapes that a line of predictions.jsonl locates, to be laid over its picture."""
    return [*_masks(row), *_boxes(row)]


def located_labels(text: str) -> str | None:
    """The labels that an answer locates; None for an answer without location tokens."""
    objects = parse_objects(text).objects
    return ", ".join(one.label or "(no label)" for one in objects) if objects else None


def _boxes(row: dict[str, Any]) -> Iterator[Context]:
    """A row of its own reference box each; `objects` hold a detection's."""
    for reference in row["references"]:
        yield from (_rectangle(one.box, one.label, "expected") for one in parse_objects(reference).objects)
    yield from (_rectangle(one.box, one.label, "answered") for one in parse_objects(row["prediction"]).objects)


def _rectangle(box: Box, label: str, kind: str) -> Context:
    left, top, right, bottom = box
    place = {"x": left, "y": top, "width": right - left, "height": bottom - top}
    return {"kind": kind, "path": "", "label": label, **{name: f"{value:.4f}" for name, value in place.items()}}


def _masks(row: dict[str, Any]) -> Iterator[Context]:
    for mask, kind in (((row.get("facts") or {}).get("mask"), "expected"), (row.get("mask"), "answered")):
        if isinstance(mask, dict) and (path := _path(mask)):
            yield {"kind": kind, "path": path}


def _path(mask: dict[str, Any]) -> str:
    """A mask as predictions.jsonl has it (`read_mask`) as an SVG path over the unit square."""
    height, width = mask["size"]
    if "polygons" in mask:
        return " ".join(_polygon(points, height, width) for points in mask["polygons"])
    return _columns(mask["counts"], height, width)


def _polygon(points: list[float], height: int, width: int) -> str:
    places = [f"{x / width:.4f},{y / height:.4f}" for x, y in zip(points[::2], points[1::2], strict=True)]
    return f"M{' '.join(places)}Z"


def _columns(counts: str | list[int], height: int, width: int) -> str:
    """Run lengths, thinned to a grid, as upright strips."""
    import numpy as np

    from ftlib.metrics.segmentation import run_lengths

    runs = run_lengths(counts.encode()) if isinstance(counts, str) else np.array(counts)
    inside = np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height)
    columns, rows = min(width, _GRID), min(height, _GRID)
    sampled = inside[np.arange(columns) * width // columns][:, np.arange(rows) * height // rows]
    edges = np.diff(np.pad(sampled, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    starts, ends = np.argwhere(edges == 1), np.argwhere(edges == -1)
    strip = f"h{1 / columns:.4f}"
    return "".join(
        f"M{column / columns:.4f},{top / rows:.4f}{strip}V{bottom / rows:.4f}h-{1 / columns:.4f}Z"
        for (column, top), (_, bottom) in zip(starts, ends, strict=True)
    )
