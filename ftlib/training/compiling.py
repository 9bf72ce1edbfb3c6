"""torch.compile: one program for each of a few shapes, and a plain end where torch would go on uncompiled.

Dynamo keeps at most 8 programs of a function. Beyond that it runs the function as it is, with a warning at most: a job
that was sized for compiled speed then takes its time several times over. So as many programs are allowed as can be
needed, and one more is an error.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

from ftlib.config import Config
from ftlib.errors import UserError
from ftlib.models.attention import own_name

_SIZES = 4
"""Rows at once: a micro-batch, the rest of an epoch, the one row of a rank that has none left, what halving leaves."""

_SPARE = 2
"""Programs for each shape; one is needed, another where something that a program relies on has changed."""

_ANY_SHAPE = 32
"""Programs where torch makes them for any shape: after the second shape, but anew for one row or one sequence."""


Setting = Callable[[], AbstractContextManager[Any]]
"""Makes a context in which dynamo compiles as it is told here."""


def prepare_to_compile(config: Config, lengths: int | None) -> Setting:
    """How dynamo compiles a model's training steps; programs of earlier models are forgotten.

    It is for training steps alone: questions have any length and number, and flex attention is compiled for them too.

    Args:
        lengths: how many row lengths batches can have, each to be compiled by itself; None: any, in programs that serve
            them all.
    """
    import torch._dynamo

    torch._dynamo.reset()
    halvings = config.micro_batch.bit_length() if config.batch.auto else 1
    programs = _SPARE * lengths * _SIZES * halvings if lengths else _ANY_SHAPE
    chosen = {
        "automatic_dynamic_shapes": lengths is None,
        own_name("recompile_limit", "cache_size_limit"): programs,
        own_name("accumulated_recompile_limit", "accumulated_cache_size_limit"): max(256, programs),
        own_name("fail_on_recompile_limit_hit", "fail_on_cache_limit_hit"): True,
    }
    return partial(torch._dynamo.config.patch, chosen)


@contextlib.contextmanager
def few_programs() -> Iterator[None]:
    """
    Raises:
        UserError: what is compiled inside needs more programs than `prepare_to_compile` allowed.
    """
    try:
        yield
    except Exception as error:
        if type(error).__name__ not in ("FailOnRecompileLimitHit", "FailOnCacheLimitHit"):  # the second before 2.7
            raise
        problem = "training.torch_compile: torch compiled one function again and again, and would go on uncompiled"
        remedy = (
            "Set TORCH_LOGS=recompiles in the job's environment and start it again (it resumes): torch then says why. "
            "Or train without training.torch_compile; that is another run."
        )
        raise UserError(problem, remedy) from error
