"""Instructions asked with and without their context: which rows are, and how both are scored."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from ftlib.config.schema import Evaluation
from ftlib.data.example import Example
from ftlib.data.prompts import render_prompt
from ftlib.evaluation.evaluate import _scores, add_without_context_predictions, without_context_rows

ROWS = [
    Example("1", "", "reverse", "cba", facts={"input": "abc"}),
    Example("2", "", "reverse abc", "cba", facts={"input": " "}),
    Example("3", "", "greet", "hello", facts={}),
]


@pytest.mark.parametrize("template", ["alpaca", "chat", "{prefix}: {input}"])
def test_only_rows_with_a_context_are_asked_twice(template: str) -> None:
    rows = ROWS[:2]
    (bare,) = without_context_rows(rows, template)
    alone = Example("", "", "reverse", "", facts={"input": ""})
    assert bare.id not in {row.id for row in rows} and bare.suffix == "cba"
    assert render_prompt(bare, template) == render_prompt(alone, template) != render_prompt(rows[0], template)


def test_a_prompt_that_shows_no_context_asks_nothing_twice() -> None:
    assert list(without_context_rows(ROWS, "{prefix}")) == []


def test_both_answers_are_scored_over_the_same_rows() -> None:
    said = {"1": "cba", "2": "wrong", "3": "hello"}
    records: list[dict[str, Any]] = [
        {"id": row.id, "image": "", "prediction": said[row.id], "references": [row.suffix]} for row in ROWS
    ]
    (bare,) = without_context_rows(ROWS[:1], "alpaca")
    add_without_context_predictions(records, [{"id": bare.id, "text": " no idea\n"}])
    config = SimpleNamespace(task="instruct", plugins=(), evaluation=Evaluation())
    asked: Any = SimpleNamespace(config=config, prepared=SimpleNamespace(labels=None), without_context=True)
    scores = _scores(asked, records, {"split": "test"}, None)
    parts = scores["parts"]
    assert {name: (part["n"], part["metrics"]["token F1"]["value"]) for name, part in parts.items()} == {
        "with context": (1, 100.0),
        "without context": (1, 0.0),
    }
    assert scores["n"] == 3 and scores["metrics"]["token F1"]["value"] == pytest.approx(200 / 3)
    assert [record["score"] for record in records] == [1.0, 0.0, 1.0]
    assert records[0]["without_context"] == {"prediction": "no idea", "score": 0.0}
    assert not any("without_context" in record for record in records[1:])
