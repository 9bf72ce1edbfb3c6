"""How sure an answer is, and answers that are not what they seem: cut off at the maximum length, empty, repeating
themselves, almost a label."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

LENGTH, STOP = "length", "stop"
"""`finish_reason` of a generated answer: cut off at max_new_tokens, or ended by the model itself."""

_LONGEST_CHECKED = 2_000
_REPEATED = re.compile(r"(.{2,80}?)\1{3,}.{0,80}$", re.DOTALL)
"""The same two or more characters four times in a row, at the end."""


def answer_confidence(logprobs: Sequence[float]) -> dict[str, Any]:
    """Fields of a generated answer in predictions.jsonl and `predict --json`.

    Args:
        logprobs: of its tokens, the end token included if the model ended the answer.

    Returns:
        mean_logprob, min_logprob and answer_tokens; the answer's probability is exp(mean_logprob · answer_tokens).
        Empty for an answer without tokens.
    """
    if not logprobs:
        return {}
    mean, least = sum(logprobs) / len(logprobs), min(logprobs)
    return {"mean_logprob": round(mean, 6), "min_logprob": round(least, 6), "answer_tokens": len(logprobs)}


def add_answer_counts(
    scores: dict[str, Any],
    records: Sequence[Mapping[str, Any]],
    labels: Sequence[str] = (),
    max_new_tokens: int | None = None,
) -> None:
    """Add the counts of such answers to scores, as `answers`, and remarks about them.

    Args:
        scores: see `summary.summary`; changed.
        records, labels: see `count_answers`.
        max_new_tokens: see `answer_remarks`.
    """
    scores["answers"] = count_answers(records, labels)
    scores["remarks"] += answer_remarks(scores["answers"], len(records), max_new_tokens)


def count_answers(records: Sequence[Mapping[str, Any]], labels: Sequence[str] = ()) -> dict[str, int | None]:
    """Count such answers.

    Args:
        records: lines of predictions.jsonl.
        labels: the closed set of answers, if there is one.

    Returns:
        cut_off (None if unknown: old files, and files of other programs), empty, repeated and almost_labels: no labels,
        but for case or a final full stop.
    """
    texts = [str(record["prediction"]).strip() for record in records]
    reasons = [record.get("finish_reason") for record in records]
    plain = {_plain(label) for label in labels}
    known = set(labels)
    return {
        "cut_off": None if None in reasons else reasons.count(LENGTH),
        "empty": texts.count(""),
        "repeated": sum(_REPEATED.search(text[-_LONGEST_CHECKED:]) is not None for text in texts),
        "almost_labels": sum(text not in known and _plain(text) in plain for text in texts) if labels else 0,
    }


def answer_remarks(counts: Mapping[str, int | None], n: int, max_new_tokens: int | None = None) -> list[str]:
    """Warnings about such answers.

    Args:
        max_new_tokens: of the evaluation, if answers were generated.
    """
    told = []
    if counts["cut_off"]:
        limit = f" (max_new_tokens {max_new_tokens})" if max_new_tokens else ""
        told.append(
            f"{counts['cut_off']} of {n} answers were cut off at the maximum length{limit}; raise "
            "evaluation.max_new_tokens if they should be longer."
        )
    if counts["empty"]:
        told.append(f"{counts['empty']} of {n} answers are empty.")
    if counts["repeated"]:
        told.append(f"{counts['repeated']} of {n} answers repeat the same text at their end.")
    if counts["almost_labels"]:
        told.append(
            f"{counts['almost_labels']} of {n} answers are labels but for case or a full stop; they count as invalid."
        )
    return told


def _plain(text: str) -> str:
    return text.strip().rstrip(".").strip().casefold()
