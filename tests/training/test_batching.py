"""The order of rows."""

import math
from pathlib import Path

import pytest

from ftlib.data.examples import Example
from ftlib.models.causal import CausalInputs
from ftlib.models.tiny_neox import tiny_tokenizer
from ftlib.training.batching import EffectiveBatches, TrainingRows


def epoch(
    micro: int, number: int = 0, rows: int = 23, drop_last: bool = False, seed: int = 0, rank: int = 0, world: int = 1
) -> list[list[int]]:
    batches = EffectiveBatches(rows, effective=8, micro=micro, seed=seed, drop_last=drop_last, rank=rank, world=world)
    batches.set_epoch(number)
    result = list(batches)
    assert len(result) == len(batches)
    return result


def flat(batches: list[list[int]]) -> list[int]:
    return [row for batch in batches for row in batch]


def test_every_row_once_and_each_epoch_anew() -> None:
    assert sorted(flat(epoch(4))) == list(range(23))
    assert flat(epoch(4)) != flat(epoch(4, number=1))
    assert flat(epoch(4)) != flat(epoch(4, seed=1))


def test_cutting_does_not_change_what_a_step_sees() -> None:
    for micro in (1, 2, 3, 4, 8):
        assert flat(epoch(micro)) == flat(epoch(8))
    assert [len(batch) for batch in epoch(4)] == [4, 4, 4, 4, 4, 3]
    assert [len(batch) for batch in epoch(3)] == [3, 3, 2, 3, 3, 2, 3, 3, 1]


def test_drop_last_drops_a_different_rest_each_epoch() -> None:
    first, second = epoch(4, drop_last=True), epoch(4, number=1, drop_last=True)
    assert len(flat(first)) == len(flat(second)) == 16
    assert set(flat(first)) != set(flat(second))


@pytest.mark.parametrize("world", [2, 3, 4, 5])
@pytest.mark.parametrize("micro", [1, 2, 3])
def test_ranks_share_every_effective_batch(micro: int, world: int) -> None:
    """17 rows are two effective batches and a single row, which leaves most ranks with a row that is not their own."""
    ranks = [epoch(micro, rows=17, rank=rank, world=world) for rank in range(world)]
    alone = flat(epoch(8, rows=17))
    assert len({len(batches) for batches in ranks}) == 1, "or they would wait for each other for ever"
    steps = math.ceil(math.ceil(8 / world) / micro)
    for number, start in enumerate((0, 8, 16)):
        mine = [flat(batches[number * steps : (number + 1) * steps]) for batches in ranks]
        assert sorted(row for rows in mine for row in rows if row >= 0) == sorted(alone[start : start + 8])
        assert {row for rows in mine for row in rows if row < 0} <= {~alone[start]}


def test_a_place_below_zero_is_a_row_without_labels(tmp_path: Path) -> None:
    rows = TrainingRows([Example("1", "", "ab", "cd")], tmp_path, "{prefix}", CausalInputs(tiny_tokenizer(), 9), [0])
    assert (rows[~0].ids, rows[~0].n_answer, rows[0].n_answer) == (rows[0].ids, 0, 3)
