"""Metrics of generated text against references: SQuAD's exact match and token F1, a strict match, sacrebleu's BLEU.

SQuAD's rule ignores signs, decimal points and the article "a": -3 matches 3, 1.5 matches 15, and "" matches "A". The
strict match does not. Texts without spaces between words (Japanese, Chinese) are compared by characters.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import replace
from decimal import Decimal
from typing import Any

import numpy as np

from ftlib.metrics.base import Array, GroupedSums, MetricResult, divide
from ftlib.metrics.scripts import choose_tokenizer, is_unspaced, plain_characters

RULE = "squad-2.0+strict-1"

TOKENIZERS = ("13a", "char", "intl", "none", "zh", "ja-mecab", "ko-mecab")
"""sacrebleu's tokenizers that download nothing; the last two need extras (sacrebleu[ja], sacrebleu[ko])."""

_AT_SPACES = ("13a", "intl", "none")
_NUMBER = re.compile(r"[+-]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:(?<=\d)\.?|\.\d+)", re.ASCII)
_ORDER = 4
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")


def measure(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    groups: Sequence[Hashable] | None = None,
    tokenize: str = "auto",
) -> MetricResult:
    """Score texts.

    Args:
        predictions: one per row.
        references: the accepted texts of every row, at least one; their number may differ from row to row.
        groups: the image of each row; default: every row is its own group.
        tokenize: one of TOKENIZERS, for BLEU; "auto" chooses by the script of the references.

    Returns:
        exact match, strict match, token F1 and BLEU in percent; rows are the token F1s as fractions. The rule and the
        table `BLEU` name sacrebleu's signature.
    """
    written = [one for accepted in references for one in accepted]
    by_characters = is_unspaced(written)
    tokens = plain_characters if by_characters else _words
    tokenize = choose_tokenizer(written) if tokenize == "auto" else tokenize
    sums = GroupedSums(range(len(predictions)) if groups is None else groups, scale=100.0)
    pairs = list(zip(predictions, references, strict=True))
    found = [(tokens(prediction), [tokens(one) for one in accepted]) for prediction, accepted in pairs]
    f1s = [max(_f1(own, one) for one in accepted) for own, accepted in found]
    sums.add_ratio("exact match", [own in accepted for own, accepted in found])
    sums.add_ratio("strict match", [strict(p) in map(strict, accepted) for p, accepted in pairs])
    sums.add_ratio("token F1", f1s)
    signature = _add_bleu(sums, predictions, references, tokenize)
    rule = ", ".join([RULE, *["by characters"] * by_characters, f"BLEU {signature}"])
    found_bleu = MetricResult(rule, "exact match", "percent", sums, len(pairs), f1s)
    remarks = _remarks(found_bleu.values(), tokenize, by_characters) + _near_misses(pairs, found)
    return replace(found_bleu, tables={"BLEU": {"signature": signature}}, remarks=remarks)


def _remarks(values: dict[str, float], tokenize: str, by_characters: bool) -> list[str]:
    said = []
    if by_characters:
        said.append("These texts have no spaces between words: exact match and token F1 compare characters.")
    if by_characters and tokenize in _AT_SPACES:
        said.append(f"BLEU: {tokenize} separates words at spaces, which these texts do not have; choose char or auto.")
    if values["BLEU"] == 0 and (values["token F1"] > 0 or values["strict match"] > 0):
        said.append(
            "BLEU is 0 because no four tokens in a row of an answer are in its reference; shorter answers have no four "
            "tokens. It says nothing about short answers."
        )
    return said


def _near_misses(
    pairs: Sequence[tuple[str, Sequence[str]]], tokens: Sequence[tuple[list[str], list[list[str]]]]
) -> list[str]:
    """Remarks about wrong answers that are right but for their form, if there are many."""
    wrong = [(pair, words) for pair, words in zip(pairs, tokens, strict=True) if words[0] not in words[1]]
    longer = sum(any(_contains(own, one) for one in accepted) for _, (own, accepted) in wrong)
    forms = sum(_composed(told) in map(_composed, accepted) for (told, accepted), _ in wrong)
    said = []
    if longer > len(wrong) / 2:
        said.append(
            f"{longer} of {len(pairs)} answers contain a reference among other words; exact match counts them as wrong."
        )
    if forms:
        said.append(
            f"{forms} of {len(pairs)} answers are written with other Unicode characters than an equal reference (NFC, "
            "NFD); exact match counts them as wrong."
        )
    return said


def _contains(words: list[str], part: list[str]) -> bool:
    return bool(part) and f"\0{chr(0).join(part)}\0" in f"\0{chr(0).join(words)}\0"


def _composed(text: str) -> str:
    return normalize(unicodedata.normalize("NFC", text))


def strict(text: str) -> str | Decimal:
    """The form in which the strict match compares: numbers by their value, with sign and decimal point.

    Other texts without case, surrounding white space and a final full stop; punctuation and articles stay.
    """
    plain = " ".join(unicodedata.normalize("NFKC", text).lower().split()).replace("\u2212", "-")
    plain = plain[:-1] if plain[-1:] in (".", "\u3002") else plain
    return Decimal(plain.replace(",", "")) if _NUMBER.fullmatch(plain) else plain


def normalize(text: str) -> str:
    """SQuAD's normal form: lower case, without ASCII punctuation and the articles a, an and the, single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def token_f1(prediction: str, reference: str) -> float:
    """F1 of the words of two texts in normal form, 0…1 (SQuAD 2.0: if one has no words, 1 if neither has any)."""
    return _f1(_words(prediction), _words(reference))


def _words(text: str) -> list[str]:
    return normalize(text).split()


def _f1(found: list[str], wanted: list[str]) -> float:
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
