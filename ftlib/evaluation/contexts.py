"""Instructions asked a second time without their context: what the model knows by itself, beside what it reads.

A line of predictions.jsonl gets `without_context`, the bare answer and its score; scores.json gets two `parts`, the
scores with and without, over the rows that have a context.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from ftlib.data.examples import Example
from ftlib.data.instruct import context_of
from ftlib.data.prompts import Templates, prompt_of
from ftlib.evaluation.asking import Answer
from ftlib.tasks import Record

WITH, WITHOUT = "with context", "without context"
FIELD = "without_context"


def bare_rows(rows: Sequence[Example], templates: Templates) -> Iterator[Example]:
    """The rows whose prompt shows a context, without it and under an id of their own."""
    for row in rows:
        bare = replace(row, id=_bare_id(row.id), facts={**row.facts, "input": ""})
        if context_of(row) and prompt_of(bare, templates) != prompt_of(row, templates):
            yield bare


def add_bare_answers(records: Sequence[Record], answers: Sequence[Answer]) -> None:
    """Put the answers to `bare_rows` beside those to the rows themselves."""
    texts = {answer["id"]: answer["text"].strip() for answer in answers}
    for record in records:
        if (text := texts.get(_bare_id(record["id"]))) is not None:
            record[FIELD] = {"prediction": text}


def paired(records: Sequence[Record]) -> dict[str, list[Record]]:
    """The records that were asked both ways, as they are and with the bare answer; nothing if there are none."""
    both = [record for record in records if FIELD in record]
    bare = [{**record, **record[FIELD]} for record in both]
    return {WITH: both, WITHOUT: bare} if both else {}


def _bare_id(name: str) -> str:
    return f"{WITHOUT}: {name}"
