"""What the rows that are asked have in common with those that were learned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ftlib.data.examples import Example
from ftlib.data.instruct import context_of


def overlap(rows: Sequence[Example], trained_on: Sequence[Example]) -> dict[str, Any] | None:
    """How many of the rows, and of their images by content, the model has learned from; None for a base model."""
    if not trained_on:
        return None
    images = {row.digest for row in trained_on if row.digest}
    questions = {_content(row) for row in trained_on}
    return {
        "rows": sum(_content(row) in questions for row in rows),
        "rows_with_trained_images": sum(row.digest in images for row in rows),
    }


def _content(row: Example) -> tuple[str, str, str, str]:
    return row.digest, row.prefix, context_of(row), row.suffix
