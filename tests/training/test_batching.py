"""The order of rows."""

from ftlib.training.batching import EffectiveBatches


def epoch(micro: int, number: int = 0, rows: int = 23, drop_last: bool = False, seed: int = 0) -> list[list[int]]:
    batches = EffectiveBatches(rows, effective=8, micro=micro, seed=seed, drop_last=drop_last)
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
