"""Divide rows into train, valid and test: seeded, stratified, grouped, independent of the rows' order."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence

from ftlib.config import SplitRule
from ftlib.data.examples import Example
from ftlib.errors import UserError

SPLITS = ("train", "valid", "test")


def split_examples(examples: Sequence[Example], rule: SplitRule) -> dict[str, list[Example]]:
    """Divide rows by a rule.

    Rows that share an image form a group and stay together, so that no picture is both learned and asked. Groups are
    put in the order of a keyed hash of their image's name: the same seed gives the same split for any order of rows.
    Rows that all carry a part of their own stay there, whatever the rule says.
    Within each stratum valid and test get their share, rounded by largest remainder over all strata.

    Returns:
        split name → rows, each split in the rows' original order.

    Raises:
        UserError: shares that leave nothing to train on, or a split that would be empty.
    """
    if rule.valid + rule.test >= 1:
        raise UserError("data.split: valid and test together leave no rows to train on")
    strata: dict[str, list[str]] = defaultdict(list)
    members: dict[str, list[Example]] = defaultdict(list)
    for example in examples:
        if example.image not in members:
            strata[example.suffix if rule.stratify_by else ""].append(example.image)
        members[example.image].append(example)
    where: dict[str, str] = {}
    for name, (n_valid, n_test) in _sizes(strata, rule).items():
        ordered = sorted(strata[name], key=lambda image: _order(rule.seed, image))
        for index, image in enumerate(ordered):
            where[image] = "valid" if index < n_valid else "test" if index < n_valid + n_test else "train"
    if all(example.part for example in examples):
        where = {example.image: example.part for example in examples}
    result = {split: [example for example in examples if where[example.image] == split] for split in SPLITS}
    for split, rows in result.items():
        if not rows:
            raise UserError(f"data.split: {len(examples)} rows are too few; {split} would be empty")
    return result


def _order(seed: int, image: str) -> bytes:
    return hashlib.sha256(f"{seed}\0{image}".encode()).digest()


def _sizes(strata: dict[str, list[str]], rule: SplitRule) -> dict[str, tuple[int, int]]:
    counts = {name: len(images) for name, images in strata.items()}
    valid = _largest_remainder(counts, rule.valid, counts)
    left = {name: count - valid[name] for name, count in counts.items()}
    test = _largest_remainder(counts, rule.test, left)
    return {name: (valid[name], test[name]) for name in sorted(counts)}


def _largest_remainder(counts: dict[str, int], share: float, room: dict[str, int]) -> dict[str, int]:
    """Round share × count per stratum so that the sum is the rounded share of all (Hamilton's method).

    A stratum gives no more than it has `room` for.
    """
    exact = {name: share * count for name, count in counts.items()}
    sizes = {name: min(int(value), room[name]) for name, value in exact.items()}
    left = round(share * sum(counts.values())) - sum(sizes.values())
    with_room = [name for name in counts if room[name] > sizes[name]]
    for name in sorted(with_room, key=lambda key: (sizes[key] - exact[key], key))[:left]:
        sizes[name] += 1
    return sizes
