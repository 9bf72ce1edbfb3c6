"""Splits: stratified, grouped, seeded, independent of row order, folds and sets, a release's own parts."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from ftlib.config.schema import SplitRule
from ftlib.data.splits import NO_OFFICIAL_SPLIT, SPLITS, SplitKeys, assign_splits, hash_text
from ftlib.errors import UserError

Row = tuple[str, str, str, int]


def rows(n: int, classes: int = 3, per_image: int = 1, part: int = NO_OFFICIAL_SPLIT) -> list[Row]:
    """(id, image, answer, part)"""
    return [(str(i), f"{i // per_image}.png", str(i // per_image % classes), part) for i in range(n)]


def split(made: list[Row], rule: SplitRule, alone: bool = True) -> dict[str, list[Row]]:
    codes = assign_splits(
        SplitKeys(
            np.array([hash_text(row[0]) for row in made], dtype=np.uint64),
            np.array([hash_text(row[1]) for row in made], dtype=np.uint64),
            np.array([hash_text(row[2]) if rule.stratify_by else 0 for row in made], dtype=np.uint64),
            np.array([row[3] for row in made], dtype=np.int8),
        ),
        rule,
        alone,
    )
    return {
        name: [row for row, code in zip(made, codes, strict=True) if code == place] for place, name in enumerate(SPLITS)
    }


def sizes(found: dict[str, list[Row]]) -> list[int]:
    return [len(found[name]) for name in SPLITS]


def test_every_row_is_in_one_split_of_the_right_size() -> None:
    found = split(rows(100), SplitRule(valid=0.15, test=0.2))
    assert sizes(found) == [65, 15, 20]
    assert sorted(row for part in found.values() for row in part) == sorted(rows(100))


def test_numbers_instead_of_shares() -> None:
    assert sizes(split(rows(96), SplitRule(valid=10, test=0))) == [86, 10, 0]
    assert sizes(split(rows(96), SplitRule(valid=10, test=20, stratify_by="suffix"))) == [66, 10, 20]


@pytest.mark.parametrize(("share", "expected"), [(0.1, 10), (0.2, 19), (0.3, 29)])
def test_nine_to_one_eight_to_two_seven_to_three(share: float, expected: int) -> None:
    assert sizes(split(rows(96), SplitRule(valid=share, test=0)))[1] == expected


def test_strata_keep_their_shares() -> None:
    uneven = [(str(i), f"{i}.png", "rare" if i % 10 == 0 else "common", NO_OFFICIAL_SPLIT) for i in range(200)]
    found = split(uneven, SplitRule(valid=0.1, test=0.2, stratify_by="suffix"))
    assert Counter(row[2] for row in found["valid"]) == {"rare": 2, "common": 18}
    assert Counter(row[2] for row in found["test"]) == {"rare": 4, "common": 36}


def test_strata_of_one_row_each_still_fill_every_split() -> None:
    unique = [(str(i), f"{i}.png", str(i), NO_OFFICIAL_SPLIT) for i in range(100)]
    assert sizes(split(unique, SplitRule(valid=0.1, test=0.2, stratify_by="suffix"))) == [70, 10, 20]


def test_rows_of_one_image_stay_together() -> None:
    found = split(rows(90, per_image=3), SplitRule(valid=0.2, test=0.2))
    images = [{row[1] for row in found[name]} for name in SPLITS]
    assert not images[0] & images[1] and not images[0] & images[2] and not images[1] & images[2]
    assert sizes(found) == [54, 18, 18]


@pytest.mark.parametrize("stratify", [None, "suffix"])
def test_the_order_of_rows_does_not_matter_and_the_seed_does(stratify: str | None) -> None:
    made = [(str(i), f"{i % 40}.png", str(i % 7), NO_OFFICIAL_SPLIT) for i in range(120)]
    shuffled = [made[place] for place in np.random.default_rng(1).permutation(120)]
    rule = SplitRule(valid=0.2, test=0.2, stratify_by=stratify)
    one, other = split(made, rule), split(shuffled, rule)
    assert {name: sorted(part) for name, part in one.items()} == {name: sorted(part) for name, part in other.items()}
    assert split(made, rule.model_copy(update={"seed": 1})) != one


def test_several_sets_are_shuffled_anew() -> None:
    found = [split(rows(60), SplitRule(valid=10, test=0, sets=3, set=number)) for number in (1, 2, 3)]
    valid = [frozenset(part["valid"]) for part in found]
    assert len(set(valid)) == 3 and all(len(part) == 10 for part in valid)


def test_folds_cover_everything_once_and_leave_test_alone() -> None:
    rule = SplitRule(test=0.1, folds=5)
    found = [split(rows(103), rule.model_copy(update={"fold": number})) for number in range(1, 6)]
    assert len({tuple(part["test"]) for part in found}) == 1 and len(found[0]["test"]) == 10
    valid = [row for part in found for row in part["valid"]]
    assert len(valid) == 93 == len(set(valid)) and not set(valid) & set(found[0]["test"])
    assert all(len(part["valid"]) in (18, 19) for part in found)


def test_a_release_s_parts_are_kept_apart() -> None:
    train, val, test = rows(60, part=0), rows(70, part=1)[60:], rows(90, part=2)[70:]
    found = split(train + val + test, SplitRule())
    assert (found["train"], found["valid"], found["test"]) == (train, val, test)
    found = split(train + val, SplitRule(valid=0.1))
    assert found["test"] == val and sizes(found) == [54, 6, 10]
    found = split(train + val, SplitRule(valid=0.1, test=0.1, official=False))
    assert sizes(found) == [56, 7, 7] and found["test"] != val


def test_limits_take_a_seeded_part() -> None:
    found = split(rows(100), SplitRule(valid=0.2, test=0.2, max_train=30, max_eval=5))
    assert sizes(found) == [30, 5, 5]
    whole = split(rows(100), SplitRule(valid=0.2, test=0.2))
    assert set(found["train"]) < set(whole["train"]) and found["train"] != whole["train"][:30]


def test_impossible_splits() -> None:
    with pytest.raises(UserError, match="leave no rows to train on"):
        split(rows(10), SplitRule(valid=0.5, test=0.5))
    with pytest.raises(UserError, match="valid would be empty"):
        split(rows(3), SplitRule(valid=0.1, test=0.1))


@pytest.mark.parametrize(("parts", "expected"), [((2,), [0, 0, 10]), ((1,), [0, 0, 10]), ((1, 2), [0, 10, 10])])
def test_a_dataset_that_is_only_asked(parts: tuple[int, ...], expected: list[int]) -> None:
    """Beside others it is fine; by itself it has nothing to train on, and the message says why."""
    made = [row for part in parts for row in rows(10, part=part)]
    with pytest.raises(UserError, match="all rows are in the official valid or test split") as caught:
        split(made, SplitRule())
    assert "official: false" in caught.value.remedy
    assert sizes(split(made, SplitRule(), alone=False)) == expected
    assert sizes(split(made, SplitRule(official=False))) == [8 * len(parts), len(parts), len(parts)]
