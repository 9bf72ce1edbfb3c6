"""Sample gallery: rows of the evaluated split with image, answer and expected answer: worst, changed, best."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from ftlib.data.images import image_path, open_image
from ftlib.data.json_boxes import parse_answer
from ftlib.data.location_tokens import Box
from ftlib.errors import UserError
from ftlib.reports.html import Context
from ftlib.reports.run_record import RunRecord, SplitRecord

if TYPE_CHECKING:
    from PIL.Image import Image


MAX_WRONG, MAX_CHANGED, MAX_RIGHT = 24, 12, 12
GRADED = ("caption", "instruct", "segment")
"""Tasks whose answers are graded instead of right or wrong."""

PredictionRow = dict[str, Any]


class Gallery:
    """Chooses rows and returns a card for each; no row is shown twice.

    Args:
        graded: whether rows have scores instead of right or wrong.
        images, text: whether images and texts of the data are shown.
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
        """Return the groups that have rows."""
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
        """Return whether an answer is right; a partial or missing score is not."""
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
            "images": self.images and any(map(_images, new)),
            "cards": [self._card(row) for row in new],
        }

    def _card(self, row: PredictionRow) -> Context:
        right = self._right(row)
        lines = self._texts(row, right) if self.text else [_line("score", f"{_score(row):.2f}")]
        drawn = overlay(row) if self.text else []
        return {
            "verdict": "graded" if self.graded else "right" if right else "wrong",
            "twice": self.text and bool(row.get("without_context")),
            "pictures": [picture(self.root, name, drawn) for name in _images(row)] if self.images else [],
            "lines": [*lines, _line("id", str(row["id"]))],
        }

    def _texts(self, row: PredictionRow, right: bool) -> list[Context]:
        """Return the lines with prompt, answers and expected answer."""
        without_context, lines = row.get("without_context"), []
        if without_context:
            lines.append(_line("without context", _answer(without_context), self._mark(without_context)))
        name = "with context" if without_context else "answer"
        lines.append(_line(name, _answer(row), self._mark(row), main=True))
        if self.graded or not right:
            lines.append(_line("expected", _expected(row)))
        if not self.graded and not right and _score(row) > 0:
            lines.append(_line("score", f"{_score(row):.2f}"))
        if row["id"] in self.before:
            earlier = self.before[row["id"]]
            lines.append(_line("before", _answer(earlier), self._mark(earlier)))
        if len(self.prompts) > 1:
            lines.append(_line("prompt", row["prompt"]))
        return lines

    def _mark(self, row: PredictionRow) -> str:
        """Return the suffix of an answer: its score, or ✓ or ✗."""
        return f"\u00a0({_score(row):.2f})" if self.graded else f"\u00a0{'✓' if self._right(row) else '✗'}"


def answers_context(record: RunRecord) -> Context | None:
    """Return images and answers of the first evaluated split; None before the first evaluation."""
    if not record.splits:
        return None
    split = record.splits[0]
    root, graded = Path(record.config.data.root), record.config.task in GRADED
    gallery = Gallery(split, root, graded, record.images, record.text)
    source, remarks = f"From the {split.split} split, {split.latest.when} training.", []
    if not record.text:
        source += " Prompts, answers and labels are hidden."
    elif record.images and any(overlay(row) for row in gallery.rows):
        remarks.append("Solid lines: answer. Dashed lines: expected.")
    if record.text and any("without_context" in row for row in gallery.rows):
        remarks.append("Rows with a context were evaluated twice; the score is that of the answer with context.")
    same = record.text and len(gallery.prompts) == 1
    return {
        "source": source,
        "prompt": gallery.prompts[0] if same else None,
        "remarks": remarks,
        "groups": gallery.groups(),
    }


def evenly_spaced(rows: Sequence[PredictionRow], count: int) -> list[PredictionRow]:
    """Return at most `count` rows, evenly spaced, always the same ones."""
    if len(rows) <= count:
        return list(rows)
    return [rows[number * len(rows) // count] for number in range(count)]


def _images(row: PredictionRow) -> list[str]:
    """Return the names of a row's images, in order."""
    return row.get("images") or ([row["image"]] if row.get("image") else [])


def _score(row: PredictionRow) -> float:
    """Return a row's score; 0 for corpus metrics, which have no scores of rows."""
    return float(row.get("score") or 0.0)


def _count(total: int, shown: int) -> str:
    if shown == total:
        return str(total)
    return f"{shown} of {total}" if shown else f"{total}, shown above"


def _line(name: str, text: str, mark: str = "", main: bool = False) -> Context:
    """Return a line of a card; an empty text is an empty answer."""
    return {"name": name, "text": text, "mark": mark, "main": main}


def _expected(row: PredictionRow) -> str:
    facts = row.get("facts") or {}
    texts = [located_labels(reference, facts) or reference.strip() or "(empty)" for reference in row["references"]]
    return ", ".join(dict.fromkeys(texts))


def _answer(row: PredictionRow) -> str:
    """Return a row's answer as text; boxes are drawn instead."""
    text: str = row["prediction"]
    return (located_labels(text, row.get("facts") or {}) or text) if text.strip() else ""


# Images as data: URLs, or the reason why an image is missing.
#
# Every image is encoded again, because files contain metadata: location, author, camera.

EMBED_BYTES = 32 * 1024
SHRUNK_PIXELS = 320


def picture(root: Path, name: str, over: Sequence[Context] = ()) -> Context:
    """Return the image `name` of the dataset in `root` with overlaid shapes, or why it is missing."""
    missing, source = "", ""
    try:
        mime, content = _load(image_path(root, name))
        source = f"data:{mime};base64,{base64.b64encode(content).decode()}"
    except FileNotFoundError:
        missing = f"{name}: this image file is missing"
    except (UserError, OSError) as error:
        missing = f"not shown: {error}"
    except ImportError:
        missing = f"{name}: not shown: Pillow is not installed; run the report in the container with jobs/run.sh"
    return {"name": name, "source": source, "missing": missing, "overlay": over}


def _load(path: Path) -> tuple[str, bytes]:
    """Return MIME type and bytes: lossless for a small image, else downscaled.

    Raises:
        FileNotFoundError, OSError: the file cannot be read.
        ImportError: Pillow is not installed.
        UserError: the image cannot be decoded.
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


# Boxes and masks over an image: answers with solid lines, expected ones with dashed lines.

_GRID = 128
"""Maximum number of columns and rows for drawing run lengths."""


def overlay(row: dict[str, Any]) -> list[Context]:
    """Return the boxes and masks of a line of predictions.jsonl as shapes for an overlay."""
    return [*_masks(row), *_boxes(row)]


def located_labels(text: str, facts: Mapping[str, Any] = MappingProxyType({})) -> str | None:
    """Return the labels of an answer's boxes; None for an answer without any.

    Args:
        facts: of its row.
    """
    objects = parse_answer(text, facts).objects
    return ", ".join(one.label or "(no label)" for one in objects) if objects else None


def _boxes(row: dict[str, Any]) -> Iterator[Context]:
    """Yield the reference boxes of a row: `box`, or the boxes of `objects`."""
    facts = row.get("facts") or {}
    for reference in row["references"]:
        yield from (_rectangle(one.box, one.label, "expected") for one in parse_answer(reference, facts).objects)
    yield from (_rectangle(one.box, one.label, "answered") for one in parse_answer(row["prediction"], facts).objects)


def _rectangle(box: Box, label: str, kind: str) -> Context:
    left, top, right, bottom = box
    place = {"x": left, "y": top, "width": right - left, "height": bottom - top}
    return {"kind": kind, "path": "", "label": label, **{name: f"{value:.4f}" for name, value in place.items()}}


def _masks(row: dict[str, Any]) -> Iterator[Context]:
    for mask, kind in (((row.get("facts") or {}).get("mask"), "expected"), (row.get("mask"), "answered")):
        if isinstance(mask, dict) and (path := _path(mask)):
            yield {"kind": kind, "path": path}


def _path(mask: dict[str, Any]) -> str:
    """Return a mask of predictions.jsonl (see `read_mask`) as an SVG path in the unit square."""
    height, width = mask["size"]
    if "polygons" in mask:
        return " ".join(_polygon(points, height, width) for points in mask["polygons"])
    return _columns(mask["counts"], height, width)


def _polygon(points: list[float], height: int, width: int) -> str:
    places = [f"{x / width:.4f},{y / height:.4f}" for x, y in zip(points[::2], points[1::2], strict=True)]
    return f"M{' '.join(places)}Z"


def _columns(counts: str | list[int], height: int, width: int) -> str:
    """Return run lengths, reduced to a grid, as vertical strips."""
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
