"""Instructions: generated texts with one or several accepted references."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from ftlib.core.registry import register_task
from ftlib.data.sources.records import read_text_predictions, read_text_references, single_file
from ftlib.errors import UserError
from ftlib.metrics import text as metrics_text
from ftlib.metrics.base import MetricResult
from ftlib.tasks.base import PredictionRecord, Task, predictions_of, references_of


def score(references: Sequence[Path], predictions: Path, tokenize: str = "13a") -> MetricResult:
    """Exact match, token F1 and BLEU.

    Args:
        references: one JSONL file.
        tokenize: BLEU's tokenizer, one of `text.TOKENIZERS`.

        Raises:
            UserError: malformed files, different ids in both, no such tokenizer or its package is not installed.
    """
    rows = read_text_references(single_file(references, "text"))
    answers = read_text_predictions(predictions, rows)
    if tokenize not in metrics_text.TOKENIZERS:
        raise UserError(f"{tokenize}: no such tokenizer", f"Available: {', '.join(metrics_text.TOKENIZERS)}")
    try:
        return metrics_text.measure(answers, [row.expected for row in rows], [row.group for row in rows], tokenize)
    except RuntimeError as error:  # raised by sacrebleu for a missing package
        if tokenize not in ("ja-mecab", "ko-mecab"):
            raise
        remedy = f"pip install 'sacrebleu[{tokenize[:2]}]', or choose char."
        raise UserError(f"the tokenizer {tokenize} cannot be used here: {error}".splitlines()[0], remedy) from None


# Tasks.

_UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]")
"""Thai, Lao, Burmese, Khmer, kana and Han."""


def _instruct(records: Sequence[PredictionRecord], labels: Sequence[str], positive: str | None) -> MetricResult:
    """Use character BLEU for scripts without spaces between words."""
    references = references_of(records)
    written = "".join(one for accepted in references for one in accepted)
    unspaced = sum(bool(_UNSPACED.match(character)) for character in written)
    tokenize = "char" if 2 * unspaced > len(written) else "13a"
    return metrics_text.measure(
        predictions_of(records), references, [record["image"] or record["id"] for record in records], tokenize
    )


@register_task(name="instruct")
def make_task() -> Task:
    return Task(
        score=_instruct,
        keeps_whitespace=True,
    )
