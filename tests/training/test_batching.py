"""The order of rows."""

from collections import Counter

from ftlib.training.batching import Draw, EffectiveBatches


def epoch(micro: int, number: int = 0, rows: int = 23, drop_last: bool = False, seed: int = 0) -> list[list[int]]:
    batches = EffectiveBatches(Draw([rows], [1.0], seed), effective=8, micro=micro, seed=seed, drop_last=drop_last)
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
    draw = Draw([10, 6, 4], [1.0, 0.5, 2.5], seed=0)
    epochs = [Counter(draw.epoch(number).tolist()) for number in range(4)]
    for found in epochs:
        assert found.total() == len(draw) == 10 + 3 + 10
        assert [found[row] for row in range(10)] == [1] * 10
        assert sorted(found[row] for row in range(10, 16)) == [0, 0, 0, 1, 1, 1]
        assert sorted(found[row] for row in range(16, 20)) == [2, 2, 3, 3]
    both = epochs[0] + epochs[1]
    assert [both[row] for row in range(20)] == [2] * 10 + [1] * 6 + [5] * 4
    assert epochs[0] != epochs[2], "the next time in another order"
    assert draw.epoch(3).tolist() == Draw([10, 6, 4], [1.0, 0.5, 2.5], seed=0).epoch(3).tolist()
    assert draw.epoch(0).tolist() != Draw([10, 6, 4], [1.0, 0.5, 2.5], seed=1).epoch(0).tolist()


def test_what_a_weight_draws_does_not_depend_on_how_batches_are_cut() -> None:
    def seen(micro: int) -> list[int]:
        batches = EffectiveBatches(Draw([9, 7], [0.3, 2.2], seed=1), effective=6, micro=micro, seed=1, drop_last=False)
        batches.set_epoch(2)
        return flat(list(batches))

    assert seen(6) == seen(4) == seen(1)
    assert len(seen(6)) == 3 + 15
    assert sorted(seen(6)) != seen(6)
