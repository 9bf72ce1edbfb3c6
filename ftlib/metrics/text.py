"""Metrics of generated text against references: SQuAD's exact match and token F1, sacrebleu's BLEU."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from ftlib.metrics.base import Array, GroupedSums, MetricResult, divide

RULE = "squad-2.0"

TOKENIZERS = ("13a", "char", "intl", "none", "zh", "ja-mecab", "ko-mecab")
"""sacrebleu's tokenizers that download nothing; the last two need extras (sacrebleu[ja], sacrebleu[ko])."""

_ORDER = 4
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")


def measure(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    groups: Sequence[Hashable] | None = None,
    tokenize: str = "13a",
) -> MetricResult:
    """Score texts.

    Args:
        predictions: one per row.
        references: the accepted texts of every row, at least one; their number may differ from row to row.
        groups: the image of each row; default: every row is its own group.
        tokenize: one of TOKENIZERS, for BLEU. "13a" separates words at spaces: for Japanese or Chinese text choose
            "char", "zh" or "ja-mecab".

    Returns:
        exact match, token F1 and BLEU in percent; rows are the token F1s as fractions. The rule and the table `BLEU`
        name sacrebleu's signature.
    """
    sums = GroupedSums(range(len(predictions)) if groups is None else groups, scale=100.0)
    pairs = list(zip(predictions, references, strict=True))
    f1s = [max(token_f1(prediction, one) for one in accepted) for prediction, accepted in pairs]
    sums.add_ratio("exact match", [any(normalize(p) == normalize(one) for one in accepted) for p, accepted in pairs])
    sums.add_ratio("token F1", f1s)
    signature = _add_bleu(sums, predictions, references, tokenize)
    rule = f"{RULE}, BLEU {signature}"
    return MetricResult(
        rule, "exact match", "percent", sums, len(pairs), f1s, tables={"BLEU": {"signature": signature}}
    )


def normalize(text: str) -> str:
    """SQuAD's normal form: lower case, without ASCII punctuation and the articles a, an and the, single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def token_f1(prediction: str, reference: str) -> float:
    """F1 of the words of two texts in normal form, 0…1 (SQuAD 2.0: if one has no words, 1 if neither has any)."""
    found, wanted = normalize(prediction).split(), normalize(reference).split()
    if not found or not wanted:
        return float(found == wanted)
    shared = sum((Counter(found) & Counter(wanted)).values())
    return 2 * shared / (len(found) + len(wanted))


def _add_bleu(sums: GroupedSums, predictions: Sequence[str], references: Sequence[Sequence[str]], tokenize: str) -> str:
    """Add corpus BLEU to a sample; returns its signature."""
    from sacrebleu.metrics.bleu import BLEU

    # Effective order changes only the scores of sentences; only their counts are used here.
    counter = BLEU(tokenize=tokenize, effective_order=True)
    counts = [
        counter.sentence_score(text, list(accepted)) for text, accepted in zip(predictions, references, strict=True)
    ]
    statistics = [[one.sys_len, one.ref_len, *one.counts, *one.totals] for one in counts]
    columns = [sums.add_column(column) for column in zip(*statistics, strict=True)]
    sums.add_derived(lambda sums: {"BLEU": _bleu(sums[:, columns])})
    return _signature(BLEU(tokenize=tokenize), references)


def _bleu(statistics: Array) -> Array:
    """Corpus BLEU in percent from its summed statistics (Papineni 2002, with sacrebleu's smoothing "exp").

    Args:
        statistics: length of the predictions, length of the closest references, matching n-grams and all n-grams of
            the predictions for n = 1…4, shape (R, 10).

    Returns:
        Shape (R,).
    """
    length, wanted = statistics[:, 0], statistics[:, 1]
    found, there = statistics[:, 2 : 2 + _ORDER], statistics[:, 2 + _ORDER :]
    halvings = np.cumsum(found == 0, axis=1)
    smoothed = np.where(found > 0, found, 0.5**halvings)
    with np.errstate(divide="ignore"):
        precision = np.log(np.nan_to_num(divide(smoothed, there))).mean(axis=1)
    brevity = np.minimum(0.0, 1 - divide(wanted, length))
    return np.where(found.any(axis=1), 100 * np.exp(brevity + precision), 0.0)


def _signature(bleu: Any, references: Sequence[Sequence[str]]) -> str:
    """sacrebleu's signature. It contains the number of references, so the fewest and the most are passed."""
    fewest, most = min(references, key=len), max(references, key=len)
    padded = [[*fewest, *[None] * (len(most) - len(fewest))], most]
    bleu.corpus_score(["", ""], [list(stream) for stream in zip(*padded, strict=True)])
    return str(bleu.get_signature())
