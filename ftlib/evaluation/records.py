"""From a model's answers to the lines of predictions.jsonl."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ftlib.config import Config
from ftlib.data.examples import Example
from ftlib.data.prompts import prompt_of
from ftlib.evaluation.asking import Answer
from ftlib.evaluation.choosing import Threshold, choose, choose_threshold, precision_recall, probabilities
from ftlib.tasks import TASKS, Record

CURVE_POINTS = 200


def make_records(
    config: Config,
    labels: Sequence[str],
    rows: Sequence[Example],
    answers: Sequence[Answer],
    split: str,
    threshold: Threshold | None,
) -> tuple[list[Record], dict[str, Any]]:
    """The lines of predictions.jsonl but for their scores, and what scores.json says of a threshold.

    Args:
        labels: the dataset's answers.
        threshold: of a positive label; None: it is chosen here, on `split`.
    """
    evaluation = config.evaluation
    if evaluation.decode == "generate":
        return [_record(row, config, answer["text"], answer) for row, answer in zip(rows, answers, strict=True)], {}
    shares = probabilities([answer["likelihoods"] for answer in answers])
    found: dict[str, Any] = {}
    if evaluation.positive is not None:
        scores = shares[:, labels.index(evaluation.positive)]
        truth = np.array([row.suffix == evaluation.positive for row in rows])
        threshold = threshold or choose_threshold(scores, truth, evaluation.min_precision, split)
        found = {"threshold": threshold.as_json(), "precision_recall": _curve(scores, truth)}
    records = []
    texts = choose(shares, labels, evaluation.positive, threshold)
    for row, text, answer, row_shares in zip(rows, texts, answers, shares, strict=True):
        likely = {label: round(float(share), 12) for label, share in zip(labels, row_shares, strict=True)}
        records.append(_record(row, config, text, answer) | {"probabilities": likely})
    return records, found


def _curve(scores: Any, truth: Any) -> dict[str, list[float]] | None:
    """At most 200 points of the precision/recall curve; none without a row that has the positive label."""
    if not truth.any():
        return None
    columns = precision_recall(scores, truth)
    places = np.unique(np.linspace(0, len(columns[0]) - 1, CURVE_POINTS).round().astype(int))
    names = ("threshold", "precision", "recall")
    return {name: [round(float(x), 6) for x in column[places]] for name, column in zip(names, columns, strict=True)}


def _record(row: Example, config: Config, text: str, answer: Answer) -> Record:
    return {
        "id": row.id,
        "image": row.image,
        "prompt": prompt_of(row, config.data.templates),
        "prediction": TASKS[config.task].parse(text),
        "references": list(row.references) or [row.suffix],
        **({"facts": row.facts} if row.facts else {}),
        **({"dataset": row.dataset} if row.dataset else {}),
        **({"cut": True} if answer.get("cut") else {}),
    }
