"""Instructions: generated texts with one or several accepted references."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from ftlib.core.registry import register_task
from ftlib.data.sources.records import read_text_predictions, read_text_references, single_file
from ftlib.errors import UserError
from ftlib.metrics import text as metrics_text
from ftlib.metrics.base import MetricResult
from ftlib.tasks.base import PredictionRecord, Task, image_of, predictions_of, references_of


def score(references: Sequence[Path], predictions: Path, tokenize: str = "auto") -> MetricResult:
    """Exact match, token F1 and BLEU.

    Args:
        references: one JSONL file.
        tokenize: BLEU's tokenizer, one of `text.TOKENIZERS`, or "auto": by the script of the references.

        Raises:
            UserError: malformed files, different ids in both, no such tokenizer or its package is not installed.
    """
    rows = read_text_references(single_file(references, "text"))
    answers = read_text_predictions(predictions, rows)
    groups = [row.group for row in rows]
    found = _measure(predictions_of(answers), [row.expected for row in rows], groups, tokenize, "--tokenize")
    return replace(found, answers=answers)


def _measure(
    predictions: list[str], references: Sequence[Sequence[str]], groups: Sequence[Hashable], tokenize: str, where: str
) -> MetricResult:
    """See `metrics.text.measure`.

    Args:
        where: the option that names the tokenizer, for messages.

    Raises:
        UserError: no such tokenizer, or its package is not installed.
    """
    known = ("auto", *metrics_text.TOKENIZERS)
    if tokenize not in known:
        raise UserError(f"{where} {tokenize}: no such tokenizer", f"Available: {', '.join(known)}")
    try:
        return metrics_text.measure(predictions, references, groups, tokenize)
    except RuntimeError as error:  # raised by sacrebleu for a missing package
        if tokenize not in ("ja-mecab", "ko-mecab"):
            raise
        remedy = f"pip install 'sacrebleu[{tokenize[:2]}]', or choose char."
        raise UserError(f"the tokenizer {tokenize} cannot be used here: {error}".splitlines()[0], remedy) from None


# Tasks.


def _instruct(
    records: Sequence[PredictionRecord], labels: Sequence[str], positive: str | None, tokenize: str = "auto"
) -> MetricResult:
    groups = [image_of(record) for record in records]
    return _measure(predictions_of(records), references_of(records), groups, tokenize, "evaluation.tokenize")


@register_task(name="instruct")
def make_task() -> Task:
    return Task(
        score=_instruct,
        with_tokenizer=lambda tokenize: partial(_instruct, tokenize=tokenize),
        keeps_whitespace=True,
    )
