"""Fixtures: run folders at several stages, and their pages."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from ftlib.core.paths import Site
from ftlib.reports.run_report import render
from ftlib.runs.run import Run
from tests.reports.fake_runs import AFTER_ROWS, BEFORE_ROWS, CONFIG, PNG, evaluate, finish, new_run, record_of, train


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    """A store with two pictures; the environment names it."""
    monkeypatch.setenv("FTLIB_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("FTLIB_RUNS", str(tmp_path / "runs"))
    images = tmp_path / "store" / "datasets" / "pets" / "images"
    images.mkdir(parents=True)
    for name in ("a.png", "b.png"):
        (images / name).write_bytes(PNG)
    return Site(store=tmp_path / "store", runs=tmp_path / "runs")


@pytest.fixture
def run(site: Site, tmp_path: Path) -> Run:
    """A run that has a config and nothing else."""
    return new_run(site, tmp_path, CONFIG)


@pytest.fixture
def page(site: Site) -> Callable[[Run], str]:
    """Makes the page of a run."""
    return lambda run: render(record_of(run, site), made=0.0)


@pytest.fixture
def finished(run: Run) -> Run:
    """Trained, resumed once, and evaluated before and after."""
    train(run, resumed_at=20)
    finish(run)
    evaluate(run, "valid", "before", BEFORE_ROWS)
    evaluate(run, "valid", "after", AFTER_ROWS)
    return run
