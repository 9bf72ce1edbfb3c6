"""The order of rows."""

import math
from collections import Counter
from pathlib import Path

import pytest

from ftlib.data.example import Example
from ftlib.models.causal_lm import CausalProcessor
from ftlib.models.tiny import tiny_tokenizer
from ftlib.training.data import GlobalBatchSampler, MixtureSampler, SupervisedDataset


def epoch(
    micro: int, number: int = 0, rows: int = 23, drop_last: bool = False, seed: int = 0, rank: int = 0, world: int = 1
) -> list[list[int]]:
    draw = MixtureSampler([rows], [1.0], seed)
    batches = GlobalBatchSampler(draw, 8, micro, seed=seed, drop_last=drop_last, rank=rank, world_size=world)
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


def test_weights_decide_how_often_rows_are_drawn() -> None:
    """10 rows of weight 1, 6 of weight 0.5, 4 of weight 2.5: once, every other epoch, and five times in two epochs."""
    draw = MixtureSampler([10, 6, 4], [1.0, 0.5, 2.5], seed=0)
    epochs = [Counter(draw.epoch(number).tolist()) for number in range(4)]
    for found in epochs:
        assert found.total() == len(draw) == 10 + 3 + 10
        assert [found[row] for row in range(10)] == [1] * 10
        assert sorted(found[row] for row in range(10, 16)) == [0, 0, 0, 1, 1, 1]
        assert sorted(found[row] for row in range(16, 20)) == [2, 2, 3, 3]
    both = epochs[0] + epochs[1]
    assert [both[row] for row in range(20)] == [2] * 10 + [1] * 6 + [5] * 4
    assert epochs[0] != epochs[2], "the next time in another order"
    assert draw.epoch(3).tolist() == MixtureSampler([10, 6, 4], [1.0, 0.5, 2.5], seed=0).epoch(3).tolist()
    assert draw.epoch(0).tolist() != MixtureSampler([10, 6, 4], [1.0, 0.5, 2.5], seed=1).epoch(0).tolist()


def test_what_a_weight_draws_does_not_depend_on_how_batches_are_cut() -> None:
    def seen(micro: int) -> list[int]:
        batches = GlobalBatchSampler(
            MixtureSampler([9, 7], [0.3, 2.2], seed=1), batch_size=6, micro_batch_size=micro, seed=1, drop_last=False
        )
        batches.set_epoch(2)
        return flat(list(batches))

    assert seen(6) == seen(4) == seen(1)
    assert len(seen(6)) == 3 + 15
    assert sorted(seen(6)) != seen(6)


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
    inputs, draw = CausalProcessor(tiny_tokenizer(), 9), MixtureSampler([1], [1.0], 0)
    rows = SupervisedDataset([Example("1", "", "ab", "cd")], tmp_path, "{prefix}", inputs, [0], draw)
    assert (rows[~0].input_ids, rows[~0].n_labels, rows[0].n_labels) == (rows[0].input_ids, 0, 3)
