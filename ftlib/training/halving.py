"""Out of memory in mid-training: halve the micro-batch and compute the same step again.

A micro-batch's loss is a sum over its rows, divided by what the whole effective batch counts, so its halves add up to
the same loss and the same gradients.
"""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch
from torch import Tensor

from ftlib.errors import UserError
from ftlib.out_of_memory import is_out_of_memory

Compute = Callable[[dict[str, Tensor]], Tensor]
"""Forward and backward of some rows; gradients are added up, the loss is returned."""


class Halving:
    """Computes the micro-batches of optimizer steps, in smaller pieces once memory was too small.

    Args:
        on_halved: is told the new number of rows at once.
    """

    def __init__(self, on_halved: Callable[[int], None] = lambda size: None) -> None:
        self.size: int | None = None
        self.on_halved = on_halved
        self._step = -1
        self._seen: list[dict[str, Tensor]] = []
        self._random: list[Tensor] = []

    def begin_leg(self) -> None:
        """Steps count from 0 again, and nothing of the leg before is part of its first."""
        self._step = -1

    def run(self, step: int, batch: dict[str, Tensor], compute: Compute, forget: Callable[[], None]) -> Tensor:
        """Compute a micro-batch; when memory runs out, all micro-batches of this step so far, in halves.

        Args:
            step: optimizer steps done; another number means that a new step begins.
            batch: tensors whose first dimension is rows.
            forget: drops the gradients of this step.

        Returns:
            The micro-batch's loss.

        Raises:
            UserError: out of memory with a single row.
        """
        if step != self._step:
            self._step, self._seen, self._random = step, [], _random_states()
        self._seen.append(batch)
        losses = self._attempt([batch], compute)
        while losses is None:
            self._halve()
            forget()
            _restore(self._random)
            losses = self._attempt(self._seen, compute)
        return losses[-1]

    def _attempt(self, batches: list[dict[str, Tensor]], compute: Compute) -> list[Tensor] | None:
        """The losses; None: out of memory. What the failed attempt held is free once this has returned."""
        try:
            return [self._in_pieces(batch, compute) for batch in batches]
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return None

    def _in_pieces(self, batch: dict[str, Tensor], compute: Compute) -> Tensor:
        size = self.size or _rows(batch)
        pieces = zip(*(tensor.split(size) for tensor in batch.values()), strict=True)
        return torch.stack([compute(dict(zip(batch, piece, strict=True))) for piece in pieces]).sum()

    def _halve(self) -> None:
        largest = max(map(_rows, self._seen))
        size = min(self.size or largest, largest)
        if size == 1:
            raise UserError(
                "out of memory with a single row at once",
                "Set training.gradient_checkpointing: true or model.quantization: nf4, or ask for a larger GPU; "
                "`ftlib plan CONFIG --gpu SIZE` says what would fit.",
            )
        self.size = (size + 1) // 2
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.on_halved(self.size)


def _rows(batch: dict[str, Tensor]) -> int:
    return len(next(iter(batch.values())))


def _random_states() -> list[Tensor]:
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [])]


def _restore(states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if states[1:]:
        torch.cuda.set_rng_state_all(states[1:])
