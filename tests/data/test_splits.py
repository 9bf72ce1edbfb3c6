"""Splits: stratified, grouped, seeded, independent of row order."""

import random
from collections import Counter

import pytest

from ftlib.config import SplitRule
from ftlib.data.examples import Example
from ftlib.data.splits import SPLITS, split_examples
from ftlib.errors import UserError


def rows(n: int, classes: int = 3, per_image: int = 1) -> list[Example]:
    return [Example(str(i), f"{i // per_image}.png", "", str(i // per_image % classes)) for i in range(n)]


def ids(split: dict[str, list[Example]]) -> dict[str, set[str]]:
    return {name: {row.id for row in split[name]} for name in SPLITS}


def test_every_row_is_in_one_split_of_the_right_size() -> None:
    split = split_examples(rows(100), SplitRule(valid=0.15, test=0.2))
    assert {name: len(split[name]) for name in SPLITS} == {"train": 65, "valid": 15, "test": 20}
    assert set.union(*ids(split).values()) == {row.id for row in rows(100)}


def test_strata_keep_their_shares() -> None:
    uneven = [Example(str(i), f"{i}.png", "", "rare" if i % 10 == 0 else "common") for i in range(200)]
    split = split_examples(uneven, SplitRule(valid=0.1, test=0.2, stratify_by="suffix"))
    assert Counter(row.suffix for row in split["valid"]) == {"rare": 2, "common": 18}
    assert Counter(row.suffix for row in split["test"]) == {"rare": 4, "common": 36}


def test_strata_of_one_row_each_still_fill_every_split() -> None:
    unique = [Example(str(i), f"{i}.png", "", str(i)) for i in range(100)]
    split = split_examples(unique, SplitRule(valid=0.1, test=0.2, stratify_by="suffix"))
    assert {name: len(split[name]) for name in SPLITS} == {"train": 70, "valid": 10, "test": 20}


def test_rows_of_one_image_stay_together() -> None:
    split = split_examples(rows(90, per_image=3), SplitRule(valid=0.2, test=0.2))
    images = [{row.image for row in split[name]} for name in SPLITS]
    assert not images[0] & images[1] and not images[0] & images[2] and not images[1] & images[2]


def test_the_order_of_rows_does_not_matter_and_the_seed_does() -> None:
    shuffled = rows(60)
    random.Random(1).shuffle(shuffled)
    rule = SplitRule(valid=0.2, test=0.2, stratify_by="suffix")
    assert ids(split_examples(shuffled, rule)) == ids(split_examples(rows(60), rule))
    other = rule.model_copy(update={"seed": 1})
    assert ids(split_examples(rows(60), other)) != ids(split_examples(rows(60), rule))


def test_impossible_splits() -> None:
    with pytest.raises(UserError, match="leave no rows to train on"):
        split_examples(rows(10), SplitRule(valid=0.5, test=0.5))
    with pytest.raises(UserError, match="valid would be empty"):
        split_examples(rows(3), SplitRule(valid=0.1, test=0.1))


def test_rows_of_text_stand_alone_or_with_their_group() -> None:
    text = [Example(str(i), "", "", "x", group=f"chat {i // 2}" if i >= 50 else "") for i in range(100)]
    split = split_examples(text, SplitRule(valid=0.2, test=0.2))
    assert all(len(split[name]) >= 15 for name in SPLITS)
    for rows_of_split in split.values():
        groups = Counter(row.group for row in rows_of_split if row.group)
        assert set(groups.values()) <= {2}
