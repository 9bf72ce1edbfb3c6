"""The formulas of merging written out on whole float64 arrays, entry by entry where that is plainest."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Array = np.ndarray


def largest(update: Array, keep: int) -> Array:
    """The `keep` entries of largest magnitude, the first ones of equals; zeros elsewhere."""
    flat = update.ravel()
    order = np.argsort(-np.abs(flat), kind="stable")[:keep]
    result = np.zeros_like(flat)
    result[order] = flat[order]
    return result.reshape(update.shape)


def agreeing(updates: Sequence[Array], weights: Sequence[float], normalize: str, scale: float) -> Array:
    """mergekit 0.1: the sign of the weighted sum, + for zero; the agreeing ones summed and divided."""
    result = np.zeros_like(updates[0])
    for place in np.ndindex(result.shape):
        entries = [weight * update[place] for weight, update in zip(weights, updates, strict=True)]
        sign = 1 if sum(entries) >= 0 else -1
        taking = [number for number, entry in enumerate(entries) if np.sign(entry) == sign]
        total = sum(entries[number] for number in taking)
        divisor = {"weights": sum(weights[number] for number in taking), "count": len(taking), "none": 1}[normalize]
        result[place] = scale * total / (divisor or 1)
    return result


def summed(updates: Sequence[Array], weights: Sequence[float], normalize: str, scale: float) -> Array:
    """Task arithmetic."""
    divisor = {"weights": sum(weights), "count": len(weights), "none": 1}[normalize]
    return scale * sum(weight * update for weight, update in zip(weights, updates, strict=True)) / divisor


def ties_of_the_authors(updates: Sequence[dict[str, Array]], density: float, scale: float) -> dict[str, Array]:
    """The authors' program with its mean over what agrees: a vector and a threshold a model, zero signs by majority."""
    names = sorted(updates[0])
    vectors = np.stack([np.concatenate([update[name].ravel() for name in names]) for update in updates])
    n = vectors.shape[1]
    for vector in vectors:
        rank_from_below = n - int(n * density)  # counted from 1
        threshold = np.sort(np.abs(vector))[rank_from_below - 1]
        vector[np.abs(vector) < threshold] = 0
    signs = np.sign(vectors.sum(axis=0))
    signs[signs == 0] = np.sign(signs.sum())
    agree = np.where(signs > 0, vectors > 0, vectors < 0)
    chosen = vectors * agree
    mean = chosen.sum(axis=0) / np.maximum((chosen != 0).sum(axis=0), 1)
    result, start = {}, 0
    for name in names:
        shape = updates[0][name].shape
        size = int(np.prod(shape))
        result[name] = scale * mean[start : start + size].reshape(shape)
        start += size
    return result


def on_the_arc(a: Array, b: Array, share: float) -> Array:
    """Shoemake's slerp of two tensors as vectors, straight where they hardly differ in direction."""
    x, y = a.ravel() / np.linalg.norm(a), b.ravel() / np.linalg.norm(b)
    angle = np.arccos(np.clip(x @ y, -1, 1))
    if abs(np.cos(angle)) > 0.9995:
        return (1 - share) * a + share * b
    return np.sin((1 - share) * angle) / np.sin(angle) * a + np.sin(share * angle) / np.sin(angle) * b
