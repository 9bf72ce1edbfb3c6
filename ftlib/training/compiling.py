"""torch.compile: one program for each of a few shapes, and a plain end where torch would go on uncompiled.

Dynamo keeps at most 8 programs of a function. Beyond that it runs the function as it is, with a warning at most: a job
that was sized for compiled speed then takes its time several times over. So as many programs are allowed as can be
needed, and one more is an error.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from ftlib.config import Config
from ftlib.errors import UserError

_SIZES = 4
"""Rows at once: a micro-batch, the rest of an epoch, the one row of a rank that has none left, what halving leaves."""

_SPARE = 2
"""Programs for each shape; one is needed, another where something that a program relies on has changed."""

_ANY_SHAPE = 32
"""Programs where torch makes them for any shape: after the second shape, but anew for one row or one sequence."""


def prepare_to_compile(config: Config, lengths: int | None) -> None:
    """Set dynamo up for a model that is about to be compiled; programs of earlier ones are forgotten.

    Args:
        lengths: how many row lengths batches can have, each to be compiled by itself; None: any, in programs that serve
            them all.
    """
    import torch._dynamo

    torch._dynamo.reset()
    halvings = config.micro_batch.bit_length() if config.batch.auto else 1
    programs = _SPARE * lengths * _SIZES * halvings if lengths else _ANY_SHAPE
    _set("automatic_dynamic_shapes", lengths is None)
    _set("recompile_limit", programs, before_2_7="cache_size_limit")
    _set("accumulated_recompile_limit", max(256, programs), before_2_7="accumulated_cache_size_limit")
    _set("fail_on_recompile_limit_hit", True, before_2_7="fail_on_cache_limit_hit")


def _set(name: str, value: bool | int, before_2_7: str = "") -> None:
    settings = torch._dynamo.config
    setattr(settings, name if hasattr(settings, name) else before_2_7, value)


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
