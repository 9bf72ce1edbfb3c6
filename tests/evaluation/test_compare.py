"""What training changed: tested only between scores that were asked alike, and shown only beside those."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from ftlib.config.loader import load_experiment
from ftlib.core import registry
from ftlib.core.paths import Site
from ftlib.evaluation.compare import compare_before_after
from ftlib.runs.run import Run
from tests.reports.fake_runs import CONFIG, evaluate, finish, new_run, record_of, row, train

SETTINGS = {
    "model": "base",
    "weights": "0a",
    "task": "classify",
    "prompt": "{prefix}",
    "fingerprint": "feed0002",
    "trained_on": "e3",
    "decode": "generate",
    "num_beams": 1,
    "threshold": None,
}
AS_TRAINED = {"model": "adapter", "weights": "1b", "trained_on": "f4", "threshold": {"value": 0.3}}
WRONG, RIGHT = ([row(n, answer, "cat", image=f"{n}.png") for n in range(40)] for answer in ("dog", "cat"))


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(store=tmp_path / "store", runs=tmp_path / "runs")


@pytest.fixture
def run(site: Site, tmp_path: Path) -> Run:
    made = new_run(site, tmp_path, CONFIG)
    train(made)
    finish(made)
    evaluate(made, "valid", "before", WRONG, settings=SETTINGS)
    evaluate(made, "valid", "after", RIGHT, settings=SETTINGS | AS_TRAINED)
    return made


def _change(run: Run, site: Site) -> dict[str, Any] | None:
    config = load_experiment(run.config_file, [], site).config
    before, after = (run.evaluation_folder("jsonl", "valid", when) for when in ("before", "after"))
    return compare_before_after(config, ["cat", "dog"], before, after)


def test_training_is_what_differs(run: Run, site: Site) -> None:
    change = _change(run, site)
    assert (
        change and change["difference"] == 1 and change["sentence"].startswith("training changed accuracy by +1.0000")
    )
    assert record_of(run, site).splits[0].change is not None


def test_the_sentence_tells_an_error_rate(run: Run, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = registry.TASKS["classify"]
    errors = {**entry.metrics, "accuracy": {"higher_is_better": False}}
    monkeypatch.setitem(registry.TASKS, "classify", dataclasses.replace(entry, metrics=errors))
    change = _change(run, site)
    assert change and change["sentence"].startswith("training changed accuracy (lower is better) by +1.0000")


@pytest.mark.parametrize(
    "other", [{"num_beams": 4}, {"decode": "choose"}, {"prompt": "x"}, {"generation": {"top_p": 1}}]
)
def test_scores_that_were_asked_differently_are_not_compared(run: Run, site: Site, other: dict[str, Any]) -> None:
    evaluate(run, "valid", "before", WRONG, settings=SETTINGS | other)
    assert _change(run, site) is None
    assert all(split.change is None for split in record_of(run, site).splits)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_score_without_a_value_is_not_compared(run: Run, site: Site, when: str) -> None:
    evaluate(run, "valid", when, WRONG, settings=SETTINGS, value=None)
    assert _change(run, site) is None


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_test_of_earlier_evaluations_is_not_shown(run: Run, site: Site, when: str) -> None:
    assert _change(run, site)
    evaluate(run, "valid", when, RIGHT, settings=SETTINGS | {"seen": 4})
    assert record_of(run, site).splits[0].change is None
