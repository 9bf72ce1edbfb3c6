"""Near-duplicate images, such as resized or recompressed copies, found with a perceptual hash.

The hash is the difference hash of N. Krawetz, "Kind of Like That" (2013), in both directions: which of two neighbours
in an image of 9 × 9 grey pixels is brighter, 128 bits. Two images are near-duplicates if at most
`MAX_HAMMING_DISTANCE` bits differ.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL.Image import Image

PerceptualHash = tuple[int, int]
"""The hash; (0, 0) for images without contrast, which match nothing."""

MAX_HAMMING_DISTANCE = 6
_LEAST_CONTRAST = 16
"""Minimum contrast, of 255: below it, noise decides which pixel is brighter."""

_SIDE = 8
_BITS = 2 * _SIDE * _SIDE
_WINDOW = 8
"""Number of neighbours in a sorted list of hashes that are compared."""


def perceptual_hash(image: Image) -> PerceptualHash:
    """Return the perceptual hash of an image."""
    from PIL.Image import Resampling

    small = image.convert("L").resize((_SIDE + 1, _SIDE + 1), Resampling.LANCZOS)
    grey = np.asarray(small, dtype=np.int16)
    if int(grey.max()) - int(grey.min()) < _LEAST_CONTRAST:
        return 0, 0
    right = grey[:-1, 1:] > grey[:-1, :-1]
    down = grey[1:, :-1] > grey[:-1, :-1]
    first, second = (int.from_bytes(np.packbits(bits).tobytes(), "big") for bits in (right, down))
    return first, second


@dataclass(frozen=True)
class NearDuplicates:
    """Near-duplicate images of a dataset; identical files do not count.

    Attributes:
        groups: each image's group number, from 1; 0 for images without near-duplicates, shape (n,).
        pairs: indices of some near-duplicate pairs.
    """

    groups: NDArray[np.uint64]
    pairs: list[tuple[int, int]]


def near_duplicates(hashes: NDArray[np.uint64], digests: NDArray[np.void]) -> NearDuplicates:
    """Group near-duplicate images.

    Two hashes of 128 bits that differ in at most 6 bits agree in at least one of 8 pieces of 16 bits. So the hashes are
    sorted by each piece in turn, and neighbours are compared; if many images share a piece, some pairs may be missed.

    Args:
        hashes: see `perceptual_hash`, shape (n, 2).
        digests: of their files, shape (n,).
    """
    known = np.flatnonzero(hashes.any(axis=1))
    bits = np.unpackbits(hashes[known].astype(">u8").view(np.uint8).reshape(len(known), _BITS // 8), axis=1)
    pieces = hashes[known].astype(">u8").view(">u2").reshape(len(known), 8)
    found = [np.empty((0, 2), dtype=np.int64)]
    for piece in range(pieces.shape[1]):
        order = np.lexsort([*pieces.T[::-1], pieces[:, piece]])
        for step in range(1, min(_WINDOW, len(order) - 1) + 1):
            left, right = order[:-step], order[step:]
            near = (bits[left] != bits[right]).sum(axis=1) <= MAX_HAMMING_DISTANCE
            found.append(np.stack([left[near], right[near]], axis=1))
    pairs = known[np.unique(np.sort(np.concatenate(found), axis=1), axis=0)]
    pairs = pairs[digests[pairs[:, 0]] != digests[pairs[:, 1]]]
    names = np.arange(1, len(hashes) + 1, dtype=np.uint64)
    while len(pairs):
        before = names.copy()
        least = np.minimum(names[pairs[:, 0]], names[pairs[:, 1]])
        np.minimum.at(names, pairs[:, 0], least)
        np.minimum.at(names, pairs[:, 1], least)
        if (names == before).all():
            break
    groups = np.zeros(len(hashes), dtype=np.uint64)
    groups[pairs] = names[pairs]
    return NearDuplicates(groups, [(int(a), int(b)) for a, b in pairs])
