"""Bytes that an optimizer keeps for the trainable parameters, by TrainingArguments' names."""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import Tensor

_BLOCK = 256
"""Elements that share a float32 scale in bitsandbytes' 8-bit states (Dettmers et al. 2021, arXiv:2110.02861)."""

_SMALLEST_8BIT = 4096
"""Smaller tensors keep 32-bit states there."""

MOMENTS = {
    "adamw_torch": 2,
    "adamw_torch_fused": 2,
    "adamax": 2,
    "radam": 2,
    "nadam": 2,
    "rmsprop": 1,
    "adagrad": 1,
    "sgd": 0,
}
"""torch's optimizers: tensors of the parameter's own shape and type."""

MOMENTS_32BIT = {
    "paged_adamw": 2,
    "paged_adamw_32bit": 2,
    "lion": 1,
    "lion_32bit": 1,
    "paged_lion": 1,
    "paged_lion_32bit": 1,
}
MOMENTS_8BIT = {"adamw_8bit": 2, "adamw_bnb_8bit": 2, "paged_adamw_8bit": 2, "lion_8bit": 1, "paged_lion_8bit": 1}
"""bitsandbytes'; paged states can move to the host's memory when the GPU's is short, here they count in full."""


def known(name: str) -> bool:
    """Whether `state_bytes` knows this optimizer; any other is taken for Adam."""
    return name == "adafactor" or name in MOMENTS | MOMENTS_32BIT | MOMENTS_8BIT


def state_bytes(name: str, arguments: str, parameters: Iterable[Tensor]) -> int:
    """Bytes of the states of all parameters.

    Args:
        name: TrainingArguments' `optim`.
        arguments: its `optim_args`, such as "momentum=0.9".
    """
    momentum = 1 if name == "sgd" and "momentum" in arguments else 0
    return sum(_bytes_of(name, momentum, parameter) for parameter in parameters)


def _bytes_of(name: str, momentum: int, parameter: Tensor) -> int:
    count = parameter.numel()
    if name in MOMENTS_8BIT:
        if count < _SMALLEST_8BIT:
            return MOMENTS_8BIT[name] * 4 * count
        return MOMENTS_8BIT[name] * (count + 4 * math.ceil(count / _BLOCK))
    if name in MOMENTS_32BIT:
        return MOMENTS_32BIT[name] * 4 * count
    if name == "adafactor":  # sums over rows and over columns (Shazeer & Stern 2018, arXiv:1804.04235)
        rows = parameter.shape[-1] if parameter.dim() > 1 else 0
        return 4 * (count // rows + count // parameter.shape[-2]) if rows else 4 * count
    return (MOMENTS.get(name, 2) + momentum) * count * parameter.element_size()
