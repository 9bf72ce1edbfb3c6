"""Labels that may be one class, or none."""

from __future__ import annotations

import pytest

from ftlib.data.labels import labels_missing_in_train, suspicious_labels


@pytest.mark.parametrize(
    ("labels", "why"),
    [
        (["Cat", "cat"], "upper and lower case"),
        (["caf\u00e9", "cafe\u0301"], "how accents are written (composed or not, Unicode's NFC and NFD)"),
        (["1", "1.0"], "how a number is written"),
        (["01", "1"], "how a number is written"),
        (["-0.50", "-0.5"], "how a number is written"),
        (["red car", "red  car"], "space"),
        (["\uff2f\uff2b", "OK"], "case, space or the form of characters"),
        (["CAF\u00c9", "cafe\u0301"], "case, space or the form of characters"),
        (["犬", "犬 "], "space"),
        (["cat", "cat\u200b", "\ufeffcat"], "invisible characters"),
        (["Cat", "cat\u200b"], "case, space or the form of characters"),
    ],
)
def test_labels_that_may_be_one(labels: list[str], why: str) -> None:
    counts = {label: 1 + number for number, label in enumerate(labels)}
    (told,) = suspicious_labels(counts | {"other": 9})
    assert told.endswith(f" differ only in {why}")
    assert all(f"{label!r} ({count} row" in told for label, count in counts.items())


@pytest.mark.parametrize("label", ["nan", "NaN", "None", "NULL", "null", "n/a", "<NA>"])
def test_words_for_nothing(label: str) -> None:
    assert suspicious_labels({label: 1234, "cat": 1}) == [f"{label!r} (1,234 rows) may stand for a missing label"]


def test_labels_that_are_all_right() -> None:
    assert (
        suspicious_labels(dict.fromkeys(["cat", "dog", "1", "2", "1.5", "1_0", "10", "inf", "e", "é", "1e5", ""], 1))
        == []
    )


def test_of_many_the_first_are_told() -> None:
    told = suspicious_labels({f"{form}{number}": 1 for number in range(30) for form in ("cat", "Cat")})
    assert len(told) == 21 and told[-1] == "… and 10 more"


def test_labels_that_cannot_be_learned() -> None:
    """Kaggle's test folders hold a single class, unknown; a folder of images and no classes has the class images."""
    assert suspicious_labels({"images": 12}) == ["'images' (12 rows) is the only label"]
    labels = {"train": {"cat", "dog"}, "valid": {"cat"}, "test": {"unknown", "cat"}}
    assert labels_missing_in_train(labels) == ["in test, but not in train: 'unknown'"]
