"""Suspicious labels: one class under two names, or a placeholder for a missing value that became a class."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial

from ftlib.core.text import normalize
from ftlib.data.example import MAX_ERRORS_SHOWN

_NULL_WORDS = frozenset({"nan", "none", "null", "nil", "na", "n/a", "<na>", "#n/a", "nat", "undefined"})
_NUMBER = re.compile(r"[+-]?\d{1,15}(\.\d{1,15})?", re.ASCII)


def suspicious_labels(counts: Mapping[str, int]) -> list[str]:
    """Return messages about suspicious labels of a closed set: the first ones, and the number of further ones.

    Args:
        counts: label → number of rows.
    """
    told = [
        f"{_shown(label, counts)} may stand for a missing label"
        for label in sorted(counts)
        if label.strip().casefold() in _NULL_WORDS
    ]
    told += [f"{_shown(label, counts)} is the only label" for label in counts if len(counts) == 1]
    alike: dict[str, list[str]] = {}
    for label in sorted(counts):
        alike.setdefault(_simplest(label), []).append(label)
    for labels in alike.values():
        if len(labels) > 1:
            told.append(f"{' and '.join(_shown(label, counts) for label in labels)} differ only in {_why(labels)}")
    return (
        told
        if len(told) <= MAX_ERRORS_SHOWN
        else [*told[:MAX_ERRORS_SHOWN], f"… and {len(told) - MAX_ERRORS_SHOWN} more"]
    )


def labels_missing_in_train(labels: Mapping[str, Collection[str]]) -> list[str]:
    """Return messages about labels of valid and test that train lacks, such as a placeholder in a test split.

    Args:
        labels: split → its labels.
    """
    told = []
    for split in labels:
        if split != "train" and (unknown := sorted(set(labels[split]) - set(labels["train"]))):
            shown = ", ".join(f"{label!r:.60}" for label in unknown[:MAX_ERRORS_SHOWN])
            told.append(f"in {split}, but not in train: {shown}{', …' * (len(unknown) > MAX_ERRORS_SHOWN)}")
    return told


def _visible(label: str) -> str:
    """Return a label without invisible characters: zero-width spaces, byte order and direction marks."""
    return "".join(character for character in label if unicodedata.category(character) != "Cf")


def _folded(label: str) -> str:
    return _visible(" ".join(normalize("NFKC", label).casefold().split()))


def _simplest(label: str) -> str:
    text = _folded(label)
    return str(float(text)) if _NUMBER.fullmatch(text) else text


_FORMS: Sequence[tuple[str, Callable[[str], str]]] = (
    ("space", lambda text: " ".join(text.split())),
    ("invisible characters", _visible),
    ("how accents are written (composed or not, Unicode's NFC and NFD)", partial(normalize, "NFC")),
    ("upper and lower case", str.casefold),
    ("case, space or the form of characters", _folded),
    ("how a number is written", _simplest),
)
"""Differences between labels, and the function that removes each."""


def _why(labels: Sequence[str]) -> str:
    return next(name for name, form in _FORMS if len({form(label) for label in labels}) == 1)


def _shown(label: str, counts: Mapping[str, int]) -> str:
    return f"{label!r:.60} ({counts[label]:,} {'row' if counts[label] == 1 else 'rows'})"
