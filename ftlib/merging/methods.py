"""Merge formulas on blocks of float32 updates, independent of files and models.

An update Δ is a model's weights minus the base's. `linear` is the weighted average of the models (Wortsman et al.
2022, arXiv:2203.05482), `task_arithmetic` base + λ Σ wΔ (Ilharco et al. 2023, arXiv:2212.04089), `ties` trims every
update, elects a sign for every weight and averages the updates with that sign (Yadav et al. 2023, arXiv:2306.01708),
DARE drops entries of an update at random and scales the rest by 1/density (Yu et al. 2024, arXiv:2311.03099).
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ftlib.merging.recipe import Normalize

_LOW_BITS = 16
BUCKETS = 1 << _LOW_BITS
"""Number of values of the high bits, and of the low bits, of a magnitude."""

_COLINEAR = 0.9995
"""Cosine above which slerp interpolates linearly, to avoid a division by a sine near 0."""

Blocks = Callable[[], Iterable[Tensor]]
"""Called once for every pass over an update; returns its blocks."""


@dataclass
class MagnitudeTrim:
    """Keeps the entries of an update above a magnitude, and the first `equal` entries equal to it.

    Attributes:
        equal: None keeps all of them.
    """

    threshold: float
    equal: int | None

    def __call__(self, update: Tensor) -> Tensor:
        """Return the next block of the update with dropped entries set to 0; blocks must come in order."""
        kept = torch.nn.functional.hardshrink(update, self._below)  # in one pass, unlike a mask
        if self.equal is None:
            return kept
        same = update.abs() == self.threshold
        order = same.flatten().cumsum(0).view(same.shape)
        kept.masked_fill_(same & (order > self.equal), 0)
        self.equal = max(0, self.equal - int(order.flatten()[-1]))
        return kept

    @functools.cached_property
    def _below(self) -> float:
        """The next smaller number; larger entries are kept."""
        return float(np.nextafter(np.float32(self.threshold), np.float32(0)))


def make_trim(blocks: Blocks, keep: int) -> MagnitudeTrim:
    """Return a trim that keeps exactly the `keep` entries of largest magnitude; of equal entries, the first."""
    return MagnitudeTrim(*kth_magnitude(lambda low: count_blocks(blocks(), low), keep))


def kth_magnitude(count: Callable[[int | None], Tensor], k: int) -> tuple[float, int | None]:
    """Return the k-th largest magnitude without sorting: non-negative float32 sort like the integers of their bits.

    Args:
        count: returns counts of magnitudes by their high bits (None), or by their low bits for given high bits.

    Returns:
        The magnitude, and how many entries equal to it are among the k largest; None: all of them.
    """
    if k == 0:
        return math.inf, 0
    high, left = _bucket(count(None), k)
    counts = count(high)
    low, left = _bucket(counts, left)
    bits = np.array([high << _LOW_BITS | low], dtype=np.int32)
    return float(bits.view(np.float32)[0]), None if left == counts[low] else left


def _bucket(counts: Tensor, k: int) -> tuple[int, int]:
    """Return the bucket of the k-th entry, counted from the top, and the entry's number within the bucket."""
    from_top = counts.flip(0).cumsum(0)
    place = int(torch.searchsorted(from_top, k))
    above = int(from_top[place - 1]) if place else 0
    return len(counts) - 1 - place, k - above


def count_blocks(blocks: Iterable[Tensor], high: int | None) -> Tensor:
    """`count_magnitudes` over many blocks."""
    total = torch.zeros(BUCKETS, dtype=torch.int64)
    for block in blocks:
        total += count_magnitudes(block, high)
    return total


def count_magnitudes(update: Tensor, high: int | None) -> Tensor:
    """Count magnitudes by their high 16 bits, or by their low 16 bits among those with high bits `high`."""
    bits = update.abs().flatten().view(torch.int32)
    upper = bits >> _LOW_BITS
    if high is None:
        return torch.bincount(upper, minlength=BUCKETS)
    return torch.bincount(bits[upper == high] & (BUCKETS - 1), minlength=BUCKETS)


class DareDrop:
    """DARE: drops random entries of an update; seed, model and name determine which, on every machine."""

    def __init__(self, density: float, seed: int, model: int, name: str) -> None:
        digest = hashlib.sha256(f"{seed} {model} {name}".encode()).digest()
        self._random = np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "little")))
        self._density = density

    def __call__(self, update: Tensor) -> Tensor:
        """Return the next block of the update; blocks must come in order."""
        keep = torch.from_numpy(self._random.random(update.numel(), dtype=np.float32) < self._density)
        return update * keep.view(update.shape) / self._density


def weighted_sum(updates: Sequence[Tensor], coefficients: Sequence[float]) -> Tensor:
    """Return Σ c Δ."""
    total = updates[0] * coefficients[0]
    for update, coefficient in zip(updates[1:], coefficients[1:], strict=True):
        total.add_(update, alpha=coefficient)
    return total


def ties_merge(
    updates: Sequence[Tensor], weights: Sequence[float], normalize: Normalize, scale: float, tie: int = 1
) -> Tensor:
    """TIES on trimmed updates: return the sum of the wΔ with the sign of Σ wΔ.

    Args:
        normalize: the divisor of each entry: the sum of the agreeing models' weights, their count, or none.
        tie: the sign, 1 or -1, where Σ wΔ is zero.
    """
    sign = elected_sign(weighted_sum(updates, weights), tie)
    total, divisor = torch.zeros_like(sign), torch.zeros_like(sign)
    for update, weight in zip(updates, weights, strict=True):
        along = (update * sign).mul_(weight).clamp_min_(0)
        total += along
        if normalize != "none":
            divisor.add_(along.sign_(), alpha=weight if normalize == "weights" else 1.0)
    total *= sign
    if normalize != "none":
        total /= divisor.masked_fill_(divisor == 0, 1.0)
    return total.mul_(scale) if scale != 1 else total


def elected_sign(total: Tensor, tie: int) -> Tensor:
    """Return 1 or -1 for every entry."""
    positive = total >= 0 if tie > 0 else total > 0
    return positive.to(torch.float32).mul_(2).sub_(1)


def coefficients(weights: Sequence[float], normalize: Normalize, scale: float) -> list[float]:
    """Return the factor of every update in a sum without sign election."""
    divisor = {"weights": sum(weights), "count": float(len(weights)), "none": 1.0}[normalize]
    return [scale * weight / divisor for weight in weights]


def slerp_coefficients(share: float, dot: float, norm_a: float, norm_b: float) -> tuple[float, float]:
    """Return the factors of two tensors for spherical interpolation at `share` from the first to the second.

    As in mergekit, the angle is that between the whole tensors, and the result is not normalised (Shoemake 1985,
    doi:10.1145/325165.325242).

    Args:
        dot: dot product of the two tensors.
        norm_a, norm_b: their norms.
    """
    cosine = dot / (norm_a * norm_b) if norm_a and norm_b else 1.0
    if abs(cosine) > _COLINEAR:
        return 1 - share, share
    angle = math.acos(cosine)
    return math.sin((1 - share) * angle) / math.sin(angle), math.sin(share * angle) / math.sin(angle)
