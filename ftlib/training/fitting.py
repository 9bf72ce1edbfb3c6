"""Which rows fit the model: a row longer than its positions is dropped, truncated or refused, and always counted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from ftlib.data.examples import Example, raise_faults
from ftlib.data.prompts import Templates, prompt_of
from ftlib.errors import UserError
from ftlib.models.families import Inputs

_CHUNK = 1000
"""Rows that are tokenized together."""


@dataclass(frozen=True)
class Fitted:
    """Which examples are learned from.

    Attributes:
        kept: their places, in order.
        limit: tokens that a row may have; None: nothing was looked at.
        dropped, truncated: how many were too long.
    """

    kept: Sequence[int]
    limit: int | None = None
    dropped: int = 0
    truncated: int = 0

    @property
    def sentence(self) -> str:
        """What to tell the user; empty if every row fits."""
        if not (self.dropped or self.truncated):
            return ""
        total = len(self.kept) + self.dropped
        fates = [(self.dropped, "dropped"), (self.truncated, "truncated")]
        shown = " and ".join(f"{count:,} {fate}" for count, fate in fates if count)
        return f"of {total:,} training rows, those of more than {self.limit:,} tokens were too long: {shown}"


def fit_rows(
    examples: Sequence[Example],
    templates: Templates,
    inputs: Inputs,
    too_long: Literal["drop", "truncate", "stop"],
) -> Fitted:
    """Compare every row's length with what the model takes.

    A row whose answer would be cut off wholly is dropped even where others are truncated: nothing would be left to
    learn.

    Raises:
        UserError: rows that are too long, for `stop`; no row fits.
    """
    if inputs.limit is None:
        return Fitted(range(len(examples)))
    kept: list[int] = []
    faults: list[str] = []
    truncated = 0
    for place, (prompt, answer) in enumerate(_lengths(examples, templates, inputs)):
        excess = prompt + answer > inputs.limit
        if excess:
            faults.append(f"row {examples[place].id}: {prompt + answer:,} tokens, the model takes {inputs.limit:,}")
        if not excess or (too_long == "truncate" and prompt < inputs.limit):
            truncated += excess
            kept.append(place)
    if too_long == "stop":
        raise_faults(faults, "Shorten them, or set model.too_long: drop or truncate.")
    if not kept:
        raise UserError(f"none of {len(examples):,} training rows fits into {inputs.limit:,} tokens", faults[0])
    return Fitted(kept, inputs.limit, len(examples) - len(kept), truncated)


def _lengths(examples: Sequence[Example], templates: Templates, inputs: Inputs) -> Iterator[tuple[int, int]]:
    for start in range(0, len(examples), _CHUNK):
        chunk = examples[start : start + _CHUNK]
        yield from inputs.lengths([prompt_of(row, templates) for row in chunk], [row.suffix for row in chunk])
