"""Merged models beside their base and their parents, as `ftlib report` shows them."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ftlib.config.loader import load_experiment
from ftlib.core import files
from ftlib.core.paths import Site
from ftlib.reports.sweep_stats import trained_groups
from ftlib.runs.run import Run, create_run
from tests.reports.fake_runs import CONFIG, evaluate, finish, record_of, row, train

Ftlib = Callable[..., tuple[int, str, str]]
EVIL = "<script>alert(1)</script>"


def _answers(right: int) -> list[dict[str, object]]:
    return [row(n, "cat" if n < right else "dog", "cat") for n in range(10)]


def _asked(site: Site, folder: Path, name: str, base: object, right: int, *overrides: str) -> Run:
    """A run whose untrained model gave so many right answers of ten, of that name's own data."""
    path = folder / "experiment.yaml"
    path.write_text(CONFIG.replace("name: pets", f"name: {name}").replace("/pets", f"/{name}"), encoding="utf-8")
    run = create_run(load_experiment(path, [f"model.base={base}", *overrides], site), site)
    run.log_event("evaluating", command="evaluate")
    settings = {"fingerprint": f"rows of {name}", "loaded": {"model": overrides}}  # of the model, not of the question
    evaluate(run, "valid", "before", _answers(right), settings=settings)
    run.log_event("evaluated", command="evaluate")
    return run


def _parent(site: Site, folder: Path, name: str, before: int, after: int) -> Run:
    run = _asked(site, folder, name, "ftlib/tiny-paligemma", before)
    train(run)
    finish(run)
    evaluate(run, "valid", "after", _answers(after), settings={"fingerprint": f"rows of {name}"})
    return run


def _merge(folder: Path, name: str) -> Path:
    """What `ftlib merge` leaves for a report."""
    models = [{"model": "cats", "weight": 0.5}, {"model": "dogs", "weight": 1}]
    record = {"recipe": {"method": "ties", "models": models}, "formula": f"base + λ · Σ wΔ {EVIL}"}
    files.write_json(folder / name / "merge.json", record)
    return folder / name


@pytest.fixture
def merged(site: Site, tmp_path: Path) -> list[Run]:
    """Two parents, and two merges of them asked about both parents' data; the first parent about the other's, too."""
    parents = [_parent(site, tmp_path, "cats", 1, 9), _parent(site, tmp_path, "dogs", 2, 8)]
    evaluate(parents[0], "valid", "after", _answers(3), dataset="dogs", settings={"fingerprint": "rows of dogs"})
    scores = {"half": (5, 6), "third": (7, 4)}
    asked = [
        _asked(site, tmp_path, name, _merge(tmp_path, merge), right)
        for merge, pair in scores.items()
        for name, right in zip(("cats", "dogs"), pair, strict=True)
    ]
    return [*parents, *asked]


def test_one_table_of_base_parents_and_merges(merged: list[Run], ftlib: Ftlib, tmp_path: Path) -> None:
    page = tmp_path / "p.html"
    code, _, error = ftlib("report", "cats", "dogs", "-o", page)
    assert code == 0, error
    text = re.sub(r"\\(.)", r"\1", page.with_suffix(".md").read_text())
    table = text.partition("## Models side by side")[2].partition("##")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("|")]
    assert rows[0] == ["model", "cats valid, accuracy", "dogs valid, accuracy", "made by"]
    assert [row[:3] for row in rows[2:]] == [
        ["ftlib/tiny-paligemma", "0.100", "0.200"],
        ["cats", "0.900", "0.300"],
        ["dogs", "–", "0.800"],
        [str(tmp_path / "half"), "0.500", "0.600"],
        [str(tmp_path / "third"), "0.700", "0.400"],
    ]
    assert rows[2][3] == "base model" and rows[3][3] == "lora training of ftlib/tiny-paligemma"
    assert rows[5][3] == f"ties of cats (weight 0.5), dogs (weight 1): base + λ · Σ wΔ {EVIL}"
    assert "2 runs: 2 done; 4 only evaluated, without training; 0.00 GPU-hours" in text
    assert "# Best on valid: cats – accuracy 0.900 · dogs – accuracy 0.800" in text
    assert text.count("## Leaderboard, accuracy on ") == 2 and page.read_text().count("Save as config.yaml") == 2
    assert "Effect of" not in text and "Not ranked" not in text and "not started" not in text
    assert "Models side by side" in page.read_text() and "<script" not in page.read_text()
    assert len(page.with_suffix(".csv").read_text().splitlines()) > 6  # every score, those of merges too


def test_merges_compete_with_nobody(merged: list[Run], site: Site) -> None:
    settings = trained_groups([record_of(run, site) for run in merged])
    assert [run.config.name for setting in settings for run in setting.runs] == ["cats", "dogs"]


def test_a_run_that_failed_after_its_base_was_asked_counts(merged: list[Run], site: Site) -> None:
    merged[-1].log_event("start", command="train", step=0, attempt=0)
    merged[-1].log_event("failed", command="train", reason="out of memory")
    assert not record_of(merged[-1], site).evaluated_only and record_of(merged[-2], site).evaluated_only


def test_merges_alone(merged: list[Run], ftlib: Ftlib, tmp_path: Path) -> None:
    folders = [run.folder for run in merged[2:]]
    assert ftlib("report", *folders, "-o", tmp_path / "p.html")[0] == 0
    page = (tmp_path / "p.html").read_text()
    assert "Comparison of models without training" in page and "Leaderboard" not in page
    assert ftlib("report", folders[0], "-o", tmp_path / "one.html")[0] == 0
    one = (tmp_path / "one.html").read_text()
    assert f"Evaluates {tmp_path / 'half'} (ties of cats (weight 0.5), dogs (weight 1)" in one
    assert "no scores after training" not in one


def test_several_runs_tell_one_score_of_their_base(merged: list[Run], site: Site, ftlib: Ftlib, tmp_path: Path) -> None:
    _asked(site, tmp_path, "cats", "ftlib/tiny-paligemma", 1, "seed=1")
    _asked(site, tmp_path, "cats", "ftlib/tiny-paligemma", 3, "model.quantization=nf4")
    assert ftlib("report", "cats", "-o", tmp_path / "p.html")[0] == 0
    text = (tmp_path / "p.md").read_text()
    assert "| ftlib/tiny-paligemma | 0.100 |" in text and "| ftlib/tiny-paligemma, nf4 | 0.300 |" in text


def test_scores_of_a_base_that_was_asked_or_loaded_differently_stand_apart(
    merged: list[Run], site: Site, ftlib: Ftlib, tmp_path: Path
) -> None:
    other = _asked(site, tmp_path, "cats", "ftlib/tiny-paligemma", 3, "seed=1")
    settings = {"fingerprint": "rows of cats", "prompt": "x", "num_beams": 4}
    evaluate(other, "valid", "before", _answers(3), settings=settings)
    _asked(site, tmp_path, "cats", "ftlib/tiny-paligemma", 5, "model.dtype=bfloat16", "model.revision=v2")
    assert ftlib("report", "cats", "-o", tmp_path / "p.html")[0] == 0
    table = (tmp_path / "p.md").read_text().replace("\\", "").partition("## Models side by side")[2]
    assert "cats valid, accuracy (num_beams=4, prompt=x)" in table and "| ftlib/tiny-paligemma | 0.100 | " in table
    assert (
        "| ftlib/tiny-paligemma, revision v2, bfloat16 | 0.500 | – |" in table
        and "±" not in table.partition("Trained")[0]
    )


def test_an_undefined_score_of_a_model_is_none(merged: list[Run], ftlib: Ftlib, tmp_path: Path) -> None:
    undefined: dict[str, Any] = {"value": None, "interval": None, "settings": {"fingerprint": "rows of cats"}}
    evaluate(merged[2], "valid", "before", _answers(5), **undefined)
    assert ftlib("report", "cats", "dogs", "-o", tmp_path / "p.html")[0] == 0
    assert f"{tmp_path / 'half'} | – | 0.600 |" in (tmp_path / "p.md").read_text().replace("\\", "")


def test_equal_names_of_different_rows_are_told_apart(merged: list[Run], ftlib: Ftlib, tmp_path: Path) -> None:
    evaluate(merged[0], "valid", "after", _answers(9), settings={"fingerprint": "other rows"})
    assert ftlib("report", "cats", "-o", tmp_path / "p.html")[0] == 0
    text = (tmp_path / "p.md").read_text()
    assert "cats valid, accuracy (rows of )" in text and "cats valid, accuracy (other ro)" in text
