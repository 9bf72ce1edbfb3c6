"""Split rows into train, valid and test: seeded, stratified, grouped, independent of the order of rows.

Only hashes of group and stratum are needed, so ten million rows fit into memory.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ftlib.config.schema import SplitRule
from ftlib.errors import UserError

SPLITS = ("train", "valid", "test")
LEFT_OUT = -1
LEAKED = -2
UNREADABLE = -3
ANIMATED = -4
NO_OFFICIAL_SPLIT = 3

Codes = NDArray[np.int8]
Hashes = NDArray[np.uint64]


@dataclass(frozen=True)
class SplitKeys:
    """Keys that a split depends on, one entry for each row, shape (n,).

    Attributes:
        rows: hash of the row's ID.
        groups: hash of the group (image, document), which stays in one split.
        strata: hash of the stratum, whose share is kept in each split; constant without stratification.
        official_splits: the official split: 0, 1, 2 for train, valid and test, 3 for none.
    """

    rows: Hashes
    groups: Hashes
    strata: Hashes
    official_splits: Codes

    def select(self, indices: NDArray[np.int64]) -> SplitKeys:
        """Return the keys of some rows."""
        return SplitKeys(self.rows[indices], self.groups[indices], self.strata[indices], self.official_splits[indices])


def hash_text(text: str) -> int:
    """Return 64 bits of a text's SHA-256."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big")


def assign_splits(keys: SplitKeys, rule: SplitRule, alone: bool = True) -> Codes:
    """Return the split of each row: 0 train, 1 valid, 2 test, LEFT_OUT none.

    Rows of a group stay together, so that no image is both trained on and evaluated. Groups are sorted by a keyed hash:
    the same seed gives the same split for any order of rows. Within each stratum valid and test get their share,
    rounded by largest remainder over all strata. Official splits are kept: without an official test split, the official
    validation split becomes test, and valid is drawn from train.

    Args:
        alone: False for a dataset of a mixture, which may have no training rows.

    Raises:
        UserError: no rows are left to train on, or a split would be empty.
    """
    only_asked = rule.official and bool(np.isin(keys.official_splits, (1, 2)).all())
    if only_asked and alone:
        problem = "data.split: all rows are in the official valid or test split, so none are left to train on"
        raise UserError(problem, "Set data.split.official: false to split all rows by data.split.")
    if only_asked:
        codes = (
            keys.official_splits.copy()
            if len(np.unique(keys.official_splits)) == 2
            else np.full_like(keys.official_splits, 2)
        )
    elif rule.official and (keys.official_splits != NO_OFFICIAL_SPLIT).any():
        codes = _official(keys, rule)
    else:
        codes = _split_by_rule(keys, rule, np.arange(len(keys.groups)), rule.test)
    for code, limit in ((0, rule.max_train), (1, rule.max_eval), (2, rule.max_eval)):
        if limit is not None:
            _limit_split(codes, code, limit, keys, rule)
    for code, split in enumerate(SPLITS) if not only_asked else ():
        if not (codes == code).any() and not (split == "test" and rule.test == 0):
            groups = f"{len(np.unique(keys.groups)):,} groups"
            raise UserError(f"data.split: {len(codes):,} rows ({groups}) are too few; {split} would be empty")
    return codes


def merge_groups(groups: Hashes, *others: Hashes) -> Hashes:
    """Merge groups whose rows share another key; the merged group gets the smallest name of its members.

    Args:
        groups: group of each row, shape (n,).
        others: further keys of the same shape; 0 means no key.
    """
    members = [(key == 0, *np.unique(key, return_inverse=True)) for key in (groups, *others)]
    names = groups
    while True:
        before = names
        for none, values, member in members:
            least = np.full(len(values), np.iinfo(np.uint64).max, dtype=np.uint64)
            np.minimum.at(least, member, names)
            names = np.where(none, names, least[member])
        if (names == before).all():
            return names


def drop_leaked_contents(codes: Codes, contents: Hashes, rows: NDArray[np.int64]) -> None:
    """Leave out, in place, rows of train and valid whose content occurs in test, and rows of train that occur in valid.

    This is needed because the datasets of a mixture are split separately, and official splits may share images.

    Args:
        contents: hashes of images and texts, shape (m,).
        rows: the row of each, shape (m,); a row has a content for each of its images.
    """
    for code in (2, 1):
        asked = np.unique(contents[codes[rows] == code])
        leaked = rows[np.isin(contents, asked)]
        codes[leaked[(codes[leaked] >= 0) & (codes[leaked] < code)]] = LEAKED


def _official(keys: SplitKeys, rule: SplitRule) -> Codes:
    parts = np.where(keys.official_splits == NO_OFFICIAL_SPLIT, 0, keys.official_splits).astype(np.int8)
    if (parts == 2).any() and (parts == 1).any():
        return parts
    tested = np.where(parts > 0, 2, 0).astype(np.int8)
    rows = np.flatnonzero(tested == 0)
    tested[rows] = _split_by_rule(keys, rule, rows, 0 if (tested == 2).any() else rule.test)
    return tested


def _split_by_rule(keys: SplitKeys, rule: SplitRule, rows: NDArray[np.int64], test: float) -> Codes:
    """Return the codes of some rows: in each stratum the first groups are test, the next ones (or a fold) valid."""
    names, member = np.unique(keys.groups[rows], return_inverse=True)
    stratum_of = np.full(len(names), np.iinfo(np.uint64).max, dtype=np.uint64)
    np.minimum.at(stratum_of, member, keys.strata[rows])  # a group with several strata counts in one of them
    strata, stratum = np.unique(stratum_of, return_inverse=True)
    counts = np.bincount(stratum, minlength=len(strata))
    tests = _sizes(counts, test, counts)
    left = counts - tests
    if rule.folds:
        start, end = tests + left * (rule.fold - 1) // rule.folds, tests + left * rule.fold // rule.folds
    else:
        start, end = tests, tests + _sizes(counts, rule.valid, left)
    if (tests + end - start).sum() >= len(names):
        raise UserError("data.split: valid and test together leave no rows to train on")
    ranks = _ranks(names, stratum, counts, rule)
    codes = np.zeros(len(names), dtype=np.int8)
    codes[ranks < tests[stratum]] = 2
    codes[(ranks >= start[stratum]) & (ranks < end[stratum])] = 1
    return codes[member]


def _ranks(names: Hashes, stratum: NDArray[np.int64], counts: NDArray[np.int64], rule: SplitRule) -> NDArray[np.int64]:
    """Return each group's rank within its stratum, in the order of a keyed hash."""
    order = np.lexsort((_keyed(names, rule), stratum))
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
    ranks = np.empty(len(names), dtype=np.int64)
    ranks[order] = np.arange(len(names)) - starts[stratum[order]]
    return ranks


def _keyed(names: Hashes, rule: SplitRule) -> Hashes:
    """Return keyed hashes, which depend on the seed and on the set."""
    key = hash_text(f"{rule.seed} {rule.set}")
    mixed = names ^ np.uint64(key)
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):  # the finalizer of MurmurHash3 (Appleby, public domain)
        mixed = (mixed ^ (mixed >> np.uint64(33))) * np.uint64(factor)
    return mixed ^ (mixed >> np.uint64(33))


def _sizes(counts: NDArray[np.int64], amount: float, available: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return how many groups each stratum gives, by largest remainder (Hamilton), at most what is `available`.

    `amount` is a share (below 1) or a total number.
    """
    total = round(amount * counts.sum()) if amount < 1 else int(amount)
    exact = total * counts / counts.sum()
    sizes = np.minimum(exact.astype(np.int64), available)
    for index in np.argsort(sizes - exact, kind="stable"):
        if sizes.sum() >= total:
            break
        sizes[index] += sizes[index] < available[index]
    return sizes


def _limit_split(codes: Codes, code: int, limit: int, keys: SplitKeys, rule: SplitRule) -> None:
    """Leave out all but `limit` rows of a split, in place, in the order of the keyed hash of their rows."""
    rows = np.flatnonzero(codes == code)
    order = np.argsort(_keyed(keys.rows[rows], rule), kind="stable")
    codes[rows[order[limit:]]] = LEFT_OUT
