"""Percentile bootstrap (Efron 1979) of a mean over rows."""

from __future__ import annotations

from collections.abc import Sequence

RESAMPLES = 10_000
LEVEL = 0.95
_BLOCK = 1 << 22


def mean_interval(scores: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """95 % interval of the mean of row scores, from 10,000 seeded resamples of the rows.

    Args:
        scores: shape (n,), n ≥ 1.

    Returns:
        (lower, upper).
    """
    import numpy as np

    values = np.asarray(scores, dtype=np.float64)
    generator = np.random.default_rng(seed)
    block = max(1, _BLOCK // len(values))
    means = []
    for start in range(0, RESAMPLES, block):
        picks = generator.integers(0, len(values), size=(min(block, RESAMPLES - start), len(values)))
        means.append(values[picks].mean(axis=1))
    low, high = np.quantile(np.concatenate(means), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
