"""Canvases of digits: tight boxes, no digit in two parts, the same each time."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ftlib.config.schema import Data
from ftlib.data.example import Example
from ftlib.data.location_tokens import parse_objects, to_pixels
from ftlib.data.sources import toy
from ftlib.data.sources.registry import iter_examples
from ftlib.data.sources.toy import (
    CANVAS,
    DIGITS_DETECT_PREFIX,
    GRID,
    MAX_DIGITS,
    SCALE,
    draw_canvas,
    load_digits,
    make_digits_detect,
    split_digits,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits_detect")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy, "DIGITS_DETECT_ROWS", {"train": 60, "valid": 20, "test": 20})
        make_digits_detect(folder)
    return folder


def rows_of(folder: Path) -> list[Example]:
    rows = list(iter_examples(Data(source="digits_detect", root=str(folder))))
    assert all(isinstance(row, Example) for row in rows)
    return rows  # type: ignore[return-value]


def test_no_digit_is_in_two_parts() -> None:
    digits = load_digits()
    parts = split_digits(digits)
    drawings = {part: {picture.tobytes() for picture, _ in members} for part, members in parts.items()}
    assert sum(map(len, parts.values())) == len(digits) == 1797
    assert all(len(members) >= 0.1 * 1797 for members in parts.values())
    assert not drawings["train"] & drawings["test"] | drawings["train"] & drawings["valid"]
    assert not drawings["valid"] & drawings["test"]
    for members in parts.values():
        assert {label for _, label in members} == set("0123456789")


def test_canvases_are_made_of_their_part_alone(folder: Path) -> None:
    """Every box, shrunk to the digit's own pixels, is a digit of the part."""
    parts = split_digits(load_digits())
    seen = set()
    for row in rows_of(folder):
        known = {(trimmed(picture).tobytes(), label) for picture, label in parts[row.part]}  # type: ignore[index]
        pixels = np.asarray(Image.open(folder / row.image))
        for one in row.facts["objects"]:
            left, top, right, bottom = one["box"]
            ink = pixels[top:bottom, left:right]
            own_pixels = np.ascontiguousarray(ink[::SCALE, ::SCALE])
            assert (own_pixels.tobytes(), one["label"]) in known, row.id
            seen.add(row.part)
    assert seen == {"train", "valid", "test"}


def trimmed(picture: np.ndarray) -> np.ndarray:
    rows, columns = np.nonzero(picture)
    return np.ascontiguousarray(picture[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1])


def test_boxes_hold_all_the_ink_and_are_tight(folder: Path) -> None:
    rows = rows_of(folder)
    counts = []
    for row in rows:
        pixels = np.asarray(Image.open(folder / row.image))
        assert pixels.shape == (CANVAS, CANVAS)
        boxes = [one["box"] for one in row.facts["objects"]]
        counts.append(len(boxes))
        for left, top, right, bottom in boxes:
            ink = pixels[top:bottom, left:right]
            assert ink[0].any() and ink[-1].any() and ink[:, 0].any() and ink[:, -1].any()
        rest = pixels.copy()
        for left, top, right, bottom in boxes:
            rest[top:bottom, left:right] = 0
        assert not rest.any()
        assert boxes == sorted(boxes, key=lambda box: (box[1], box[0]))
    assert set(counts) == set(range(1, MAX_DIGITS + 1))


def test_the_answer_says_where_the_digits_are(folder: Path) -> None:
    for row in rows_of(folder):
        parsed = parse_objects(row.suffix)
        assert row.prefix == DIGITS_DETECT_PREFIX and not parsed.unreadable
        assert [one.label for one in parsed.objects] == [one["label"] for one in row.facts["objects"]]
        for one, fact in zip(parsed.objects, row.facts["objects"], strict=True):
            assert to_pixels(one.box, CANVAS, CANVAS) == pytest.approx(fact["box"], abs=CANVAS / 1023)


def test_the_same_each_time_and_parts_stay(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toy, "DIGITS_DETECT_ROWS", {"train": 60, "valid": 20, "test": 20})
    make_digits_detect(tmp_path)
    assert (tmp_path / "data.jsonl").read_bytes() == (folder / "data.jsonl").read_bytes()
    rows = rows_of(folder)
    assert Counter(row.part for row in rows) == {"train": 60, "valid": 20, "test": 20}
    assert all(row.facts["width"] == row.facts["height"] == CANVAS for row in rows)


def test_digits_begin_on_the_grid_and_never_share_a_pixel() -> None:
    digits = [(np.full((8, 8), 255, dtype=np.uint8), "0")]
    draw = random.Random(0)
    for _ in range(200):
        canvas = draw_canvas(draw, digits)
        for (left, top, right, bottom), _ in canvas.objects:
            assert left % GRID == top % GRID == 0 and right - left == bottom - top
        areas = sum((box[2] - box[0]) * (box[3] - box[1]) for box, _ in canvas.objects)
        assert (canvas.pixels > 0).sum() == areas
