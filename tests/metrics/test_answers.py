"""Counts of cut, empty, repeated and almost valid answers."""

from __future__ import annotations

import pytest

from ftlib.metrics.answers import answer_remarks, count_answers


def test_counts_and_remarks() -> None:
    texts = ["Cat.", "cat", "", "dog", "bird", "so so so so so so", "a b c d"]
    records = [{"prediction": text, "finish_reason": "length" if len(text) > 4 else "stop"} for text in texts]
    found = count_answers(records, ["cat", "dog"])
    assert found == {"cut_off": 2, "empty": 1, "repeated": 1, "almost_labels": 1}
    told = "\n".join(answer_remarks(found, 7, 8))
    for part in ("2 of 7 answers were cut off at the maximum length (max_new_tokens 8)", "1 of 7 answers are empty"):
        assert part in told
    assert "repeat the same text" in told and "labels but for case or a full stop" in told


def test_without_reasons_it_is_unknown_how_many_were_cut() -> None:
    found = count_answers([{"prediction": "x"}, {"prediction": "y", "finish_reason": "stop"}])
    assert found["cut_off"] is None and answer_remarks(found, 2) == []


@pytest.mark.parametrize("text", ["1000000", "2222", "hahaha", "no no", "the cat and the dog and the owl"])
def test_short_repetitions_are_none(text: str) -> None:
    assert count_answers([{"prediction": text}])["repeated"] == 0
