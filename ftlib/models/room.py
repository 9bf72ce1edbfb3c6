"""Out of GPU memory, told as what the user can do about it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from ftlib.errors import UserError

SMALLER_MODEL = "Set model.quantization: nf4, or take a larger GPU; `ftlib plan CONFIG --gpu SIZE` says what would fit."


@contextlib.contextmanager
def enough_memory(remedy: str = SMALLER_MODEL) -> Iterator[None]:
    """Inside, a GPU's memory may run out.

    Args:
        remedy: what helps; without one, that of a model that does not fit.

    Raises:
        UserError: it did.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(f"out of GPU memory: {str(error).splitlines()[0]}", remedy) from None
