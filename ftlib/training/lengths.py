"""Row lengths, and batches of few shapes.

Rows of an effective batch are cut into micro-batches by length, so that little is padded. For `torch_compile`, which
compiles every shape anew, all batches are padded to one of `SHAPES` lengths; with a fixed number of image tokens these
are lengths of text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor
from torch.nn.functional import pad

from ftlib import console
from ftlib.data.examples import Example
from ftlib.data.prompts import Templates, prompt_of
from ftlib.models.families import Inputs
from ftlib.models.rows import IGNORED, Row

SHAPES = 4
_CHUNK = 1000
"""Rows that are tokenized together."""


def measure(
    examples: Sequence[Example], places: Sequence[int], templates: Templates, inputs: Inputs
) -> Iterator[tuple[int, int]]:
    """Tokens of prompt and answer of the examples at some places; all of them are tokenized."""
    with console.progress("measuring rows", len(places)) as update:
        for start in range(0, len(places), _CHUNK):
            chunk = [examples[place] for place in places[start : start + _CHUNK]]
            yield from inputs.lengths([prompt_of(row, templates) for row in chunk], [row.suffix for row in chunk])
            update(start + len(chunk), "")


def row_lengths(
    examples: Sequence[Example], kept: Sequence[int], templates: Templates, inputs: Inputs
) -> list[tuple[int, int]]:
    """(tokens, of them answer) of the examples at the places `kept`, as `Inputs.train_row` cuts them."""
    found = []
    for prompt, answer in measure(examples, kept, templates, inputs):
        tokens = min(prompt + answer, inputs.limit or prompt + answer)
        found.append((tokens, tokens - prompt))
    return found


class FewShapes:
    """Collates rows into batches of one of a few lengths, with as many columns of labels as that length may need.

    Args:
        lengths: (tokens, of them labelled) of every row that can come.
    """

    def __init__(self, inputs: Inputs, lengths: Sequence[tuple[int, int]]) -> None:
        self.inputs = inputs
        ordered = sorted(tokens for tokens, _ in lengths)
        ends = [-(-len(ordered) * part // SHAPES) - 1 for part in range(1, SHAPES + 1)]
        self.shapes = {
            length: max(labelled for tokens, labelled in lengths if tokens <= length)
            for length in sorted({ordered[end] for end in ends})
        }
        """Row length → width of the labels; each length is a quantile, so that equally many rows have it."""

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """`Inputs.batch`, padded on the left to the next length; labels are cut to their last columns."""
        batch = self.inputs.batch(rows)
        longest = batch["input_ids"].shape[1]
        length = next(length for length in self.shapes if length >= longest)
        fillers = {"input_ids": self.inputs.pad_id, "labels": IGNORED}
        padded = {
            name: pad(tensor, (length - longest, 0), value=fillers.get(name, 0)) if tensor.dim() == 2 else tensor
            for name, tensor in batch.items()
        }
        return {**padded, "labels": padded["labels"][:, -self.shapes[length] :]}
