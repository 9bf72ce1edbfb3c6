"""ANLS, average normalised Levenshtein similarity, of answers read from documents (DocVQA and its like).

Paper: Biten et al., Scene Text Visual Question Answering, ICCV 2019. Two versions are in use and differ by a point:

- `anls` is the score of the Robust Reading Competition's program for document questions (challenge 17). Texts are
  compared in lower case with white space collapsed, but the distance is divided by the length of the original texts
  in upper case (so that ß counts twice); a similarity of exactly one half counts.
- `anls_strict` is the paper's formula, as in the package `anls`: the distance is divided by the length of the compared
  texts, and exactly one half no longer counts.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence

import numpy as np
from rapidfuzz.distance import Levenshtein

from ftlib.metrics.base import GroupedSums, MetricResult, add_breakdown

RULE = "anls/rrc-ch17"
THRESHOLD = 0.5


def anls(prediction: str, answers: Sequence[str]) -> float:
    """Similarity to the nearest answer by the challenge's rule, 0 or at least one half.

    Args:
        answers: at least one.
    """
    compared = _plain(prediction)
    best = max(
        _similarity(compared, _plain(answer), max(len(answer.upper()), len(prediction.upper()))) for answer in answers
    )
    return best if best >= THRESHOLD else 0.0


def anls_strict(prediction: str, answers: Sequence[str]) -> float:
    """Similarity to the nearest answer by the paper's rule, 0 or more than one half.

    Args:
        answers: at least one.
    """
    compared = _plain(prediction)
    best = max(_similarity(compared, plain, max(len(plain), len(compared))) for plain in map(_plain, answers))
    return best if best > THRESHOLD else 0.0


def measure(
    predictions: Sequence[str],
    answers: Sequence[Sequence[str]],
    documents: Sequence[Hashable],
    kinds: Mapping[str, Sequence[Collection[str]]] | None = None,
) -> MetricResult:
    """Both versions of ANLS as fractions, resampled by document.

    Args:
        predictions: shape (n,).
        answers: the accepted answers to each question, at least one, shape (n, any).
        documents: the document of each question, shape (n,).
        kinds: name of a breakdown → each question's kinds, none, one or several, shape (n,); a breakdown of `anls`.
    """
    pairs = list(zip(predictions, answers, strict=True))
    rows = [anls(prediction, accepted) for prediction, accepted in pairs]
    sums = GroupedSums(documents)
    sums.add_ratio("anls", rows)
    sums.add_ratio("anls_strict", [anls_strict(prediction, accepted) for prediction, accepted in pairs])
    for name, labels in (kinds or {}).items():
        add_breakdown(sums, name, labels, np.array(rows))
    return MetricResult(RULE, "anls", "fraction", sums, len(rows), rows)


def _plain(text: str) -> str:
    return " ".join(text.strip().lower().split())


def _similarity(compared: str, plain: str, length: int) -> float:
    """1 − distance / length; values below one half are not exact.

    Only distances up to half the length are computed, so that much longer texts, such as endless answers, cost nothing.
    """
    return 1 - Levenshtein.distance(compared, plain, score_cutoff=length // 2) / length if length else 1.0
