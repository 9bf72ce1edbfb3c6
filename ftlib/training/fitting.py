"""What is found before the first step: rows that do not fit the model, and images that its processor rejects.

A row longer than the model's positions is dropped, truncated or refused, and always counted and named.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ftlib import console
from ftlib.data.examples import MAX_FAULTS_SHOWN, Example, raise_faults
from ftlib.data.images import image_path, open_image
from ftlib.data.prompts import Templates
from ftlib.errors import UserError
from ftlib.models.families import Inputs
from ftlib.out_of_memory import is_out_of_memory
from ftlib.training.lengths import measure

_CHUNK = 1000
"""Rows that are tokenized, or images that are opened, together."""


@dataclass(frozen=True)
class Fitted:
    """Which examples are learned from.

    Attributes:
        kept: their places, in order.
        limit: tokens that a row may have; None: nothing was looked at.
        dropped, truncated: how many were too long.
        unanswered: how many of the dropped have a prompt that leaves no room for any answer: no label would be left.
        named: the first of the rows that were too long, in words.
        split: which rows, in words.
    """

    kept: Sequence[int]
    limit: int | None = None
    dropped: int = 0
    truncated: int = 0
    unanswered: int = 0
    named: Sequence[str] = ()
    split: str = "training"

    @property
    def sentence(self) -> str:
        """What to tell the user; empty if every row fits."""
        if not (self.dropped or self.truncated):
            return ""
        total = len(self.kept) + self.dropped
        fates = [(self.dropped, "dropped"), (self.truncated, "truncated")]
        shown = " and ".join(f"{count:,} {fate}" for count, fate in fates if count)
        filled = f" (the prompts of {self.unanswered:,} leave no room for an answer)" if self.unanswered else ""
        first = f"of {total:,} {self.split} rows, those of more than {self.limit:,} tokens were too long: {shown}"
        more = self.dropped + self.truncated - len(self.named)
        rest = [f"  … and {more:,} more"] if more else []
        return "\n".join([first + filled, *[f"  {row}" for row in self.named], *rest])


def fit_rows(
    examples: Sequence[Example],
    templates: Templates,
    inputs: Inputs,
    too_long: Literal["drop", "truncate", "stop"],
    split: str = "training",
) -> Fitted:
    """Compare every row's length with what the model takes.

    A row whose answer would be cut off wholly is dropped even where others are truncated: nothing would be left to
    learn.

    Raises:
        UserError: rows that are too long, for `stop`; no row fits.
    """
    if inputs.limit is None:
        return Fitted(range(len(examples)), split=split)
    kept: list[int] = []
    faults: list[str] = []
    truncated = unanswered = 0
    for place, (prompt, answer) in enumerate(measure(examples, range(len(examples)), templates, inputs)):
        excess = prompt + answer > inputs.limit
        if excess:
            faults.append(_fault(examples[place].id, prompt, answer, inputs.limit))
            unanswered += prompt >= inputs.limit
        if not excess or (too_long == "truncate" and prompt < inputs.limit):
            truncated += excess
            kept.append(place)
    if too_long == "stop":
        raise_faults(faults, "Shorten them, or set model.too_long: drop or truncate.")
    if not kept:
        raise UserError(f"none of {len(examples):,} {split} rows fits into {inputs.limit:,} tokens", faults[0])
    dropped = len(examples) - len(kept)
    return Fitted(kept, inputs.limit, dropped, truncated, unanswered, faults[:MAX_FAULTS_SHOWN], split)


def _fault(name: str, prompt: int, answer: int, limit: int) -> str:
    filled = f"; its prompt alone has {prompt:,}: no room for an answer" if prompt >= limit else ""
    return f"row {name}: {prompt + answer:,} tokens, the model takes {limit:,}{filled}"


def try_images(rows: Iterable[Example], root: Path, inputs: Inputs) -> int:
    """Open every image once, as training will, and show it to the model's processor.

    Returns:
        How many there are.

    Raises:
        UserError: images that cannot be used, each with the first row that shows it.
    """
    first: dict[tuple[str, int], str] = {}
    for row in rows:
        if row.image:
            first.setdefault((row.image, row.frame), row.id)
    faults = []

    def look(image: str, frame: int) -> str:
        try:
            inputs.prompt_rows([""], open_image(image_path(root, image), frame))
        except UserError as error:
            return error.problem
        except Exception as error:  # what a processor raises is its own affair
            if is_out_of_memory(error):
                raise
            return f"{image}: the model's processor rejects it: {error}"
        return ""

    shown = list(first)
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool, console.progress("images", len(shown)) as update:
        for start in range(0, len(shown), _CHUNK):
            chunk = shown[start : start + _CHUNK]
            for number, (one, problem) in enumerate(zip(chunk, pool.map(look, *zip(*chunk, strict=True)), strict=True)):
                faults += [f"row {first[one]}: {problem}"] if problem else []
                update(start + number + 1, "")
    raise_faults(faults, "Mend or remove them, then run `ftlib prepare` again.")
    return len(shown)
