"""The report of a sweep, against values worked out by hand and by scipy."""

from __future__ import annotations

import csv
import io
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import t as student

from ftlib.config.loader import load_experiment
from ftlib.core import files, jsonl
from ftlib.core.paths import Site
from ftlib.metrics.student import student_quantile
from ftlib.reports.run_record import RunRecord
from ftlib.reports.sweep_stats import group_runs, seed_statistics
from ftlib.reports.tables import Table
from ftlib.runs.run import Run, create_run
from tests.reports.fake_runs import CONFIG, evaluate, finish, record_of, row, train

Ftlib = Callable[..., tuple[int, str, str]]
EVIL = "<script>alert(1)</script>"


def _member(site: Site, folder: Path, valid: int | None, test: int, rows: str = "", **fields: object) -> Run:
    """A run with so many right answers out of ten on valid (None: it never finished) and on test, `rows` of them."""
    path = folder / "sweep.yaml"
    path.write_text(CONFIG, encoding="utf-8")
    overrides = [f"{key.replace('__', '.')}={value}" for key, value in fields.items()] + ["guard.restarts=0"]
    run = create_run(load_experiment(path, overrides, site), site)
    train(run)
    if valid is None:
        run.log_event("diverged", reason="step 31: loss nan")
        run.log_event("gave up", command="train")
        return run
    finish(run)
    for split, right in (("valid", valid), ("test", test)):
        answers = [row(n, "cat" if n < right else EVIL, "cat" if n % 2 or n < right else "dog") for n in range(10)]
        evaluate(run, split, "after", answers, settings={"fingerprint": f"{rows}{split}"})
    return run


@pytest.fixture
def sweep(site: Site, tmp_path: Path) -> list[Run]:
    """Two rates × three seeds; the low rate is best on valid, the high one on test; one run diverged."""
    low = [
        _member(site, tmp_path, valid, 5, seed=seed, training__learning_rate=1e-3)
        for seed, valid in enumerate((8, 9, 7))
    ]
    high = [
        _member(site, tmp_path, valid, 10, seed=seed, training__learning_rate=1e-2)
        for seed, valid in enumerate((6, None, 8))
    ]
    return low + high


@pytest.fixture
def records(sweep: list[Run], site: Site) -> list[RunRecord]:
    return [record_of(run, site) for run in sweep]


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 7, 23, 100])
@pytest.mark.parametrize("inside", [0.5, 0.95, 0.99])
def test_the_quantile_of_student(freedom: int, inside: float) -> None:
    assert student_quantile(freedom, inside) == pytest.approx(student.ppf((1 + inside) / 2, freedom), rel=1e-9)


@pytest.mark.parametrize(("freedom", "most"), [(1.3, 0.25), (2.5, 0.04), (8.7, 0.002)])
def test_the_quantile_of_student_between_whole_numbers_is_no_smaller(freedom: float, most: float) -> None:
    exact = student.ppf(0.975, freedom)
    assert exact <= student_quantile(freedom) <= exact * (1 + most)


def test_the_interval_over_seeds_is_scipys() -> None:
    values = [0.61, 0.72, 0.55, 0.7]
    found = seed_statistics(values)
    low, high = student.interval(0.95, 3, statistics.mean(values), statistics.stdev(values) / 2)
    assert (found.mean, found.sd) == (pytest.approx(statistics.mean(values)), pytest.approx(statistics.stdev(values)))
    assert found.interval == (pytest.approx(low), pytest.approx(high))
    assert seed_statistics([0.4]).interval is None
    assert seed_statistics([0.4, 0.4]).interval is None


def test_the_interval_over_seeds_stays_in_the_range_of_the_metric() -> None:
    assert seed_statistics([0.485, 0.589]).interval == pytest.approx((-0.1237, 1.1977), abs=1e-3)
    assert seed_statistics([0.485, 0.589], 1.0).interval == (0.0, 1.0)
    assert seed_statistics([48.5, 58.9], 100.0).interval == (0.0, 100.0)


def test_settings_are_ranked_by_valid_alone(records: list[RunRecord]) -> None:
    best, other = group_runs(list(reversed(records)))
    assert best.values == {"training.learning_rate": "0.001"}
    assert [run.config.seed for run in best.runs] == [0, 1, 2]
    chosen, reported = best.seed_statistics("valid"), best.seed_statistics("test")
    assert chosen and reported
    assert (chosen.n, chosen.mean, chosen.sd) == (3, pytest.approx(0.8), pytest.approx(0.1))
    assert reported.mean == pytest.approx(0.5)
    left = other.seed_statistics("valid")
    assert left and (left.n, left.mean) == (2, pytest.approx(0.7))


def test_of_an_error_rate_the_lowest_comes_first(sweep: list[Run], site: Site, ftlib: Ftlib, tmp_path: Path) -> None:
    for run in sweep:
        for folder in run.folder.glob("eval/*/*/after"):
            told = {"settings": files.read_json(folder / "scores.json")["settings"], "higher_is_better": False}
            evaluate(run, folder.parent.name, "after", jsonl.read_jsonl_log(folder / "predictions.jsonl"), **told)
    settings = group_runs([record_of(run, site) for run in sweep])
    assert [setting.values["training.learning_rate"] for setting in settings] == ["0.01", "0.001"]
    assert settings[0].best_run.config.seed == 0, "0.6 is lower than 0.8"
    ftlib("report", "pets", "-o", tmp_path / "page.html")
    assert "Ranked by valid, lower is better; test is not used for the ranking." in (tmp_path / "page.md").read_text()


def test_jobs_and_intervals_of_saving_and_a_second_question_are_no_settings(site: Site, tmp_path: Path) -> None:
    runs = [
        _member(site, tmp_path, 5, 5, seed=0, job__mem="8G", task="instruct"),
        _member(site, tmp_path, 5, 5, seed=1, job__mem="16G", checkpoint__steps=7, task="instruct"),
        _member(site, tmp_path, 5, 5, seed=2, task="instruct", evaluation__without_context="true"),
    ]
    (setting,) = group_runs([record_of(run, site) for run in runs])
    assert (len(setting.runs), setting.values) == (3, {})


def test_how_a_batch_is_cut_is_no_setting_but_the_best_checkpoint_is(site: Site, tmp_path: Path) -> None:
    cut = {"training__per_device_train_batch_size": 2, "training__gradient_accumulation_steps": 2}
    runs = [
        _member(site, tmp_path, 5, 5, seed=0),
        _member(site, tmp_path, 5, 5, seed=1, batch__auto="true", **cut),
        _member(site, tmp_path, 5, 5, seed=2, checkpoint__best="{metric: accuracy, every: 5}"),
    ]
    settings = group_runs([record_of(run, site) for run in runs])
    assert sorted(len(setting.runs) for setting in settings) == [1, 2]


def test_the_page(sweep: list[Run], ftlib: Ftlib) -> None:
    code, out, _ = ftlib("report", "pets")
    path = Path(out.strip())
    assert (code, path.name, path.parent) == (0, "report.html", sweep[0].folder.parent)
    page = path.read_text(encoding="utf-8")
    assert "Best on valid: learning_rate=0.001 – accuracy 0.800 ± 0.100; test 0.500 ± 0.000" in page
    assert "6 runs: 5 done, 1 diverged; diverged once; 0.00 GPU-hours (0.00 of training, 0.00 of evaluation)." in page
    assert "diverged once; in every attempt (1), last: step 31: loss nan" in page
    assert "2 of 3" in page  # seeds with a score
    assert page.count('<polyline points="') == 6
    best = record_of(sweep[1], Site(store=Path(), runs=sweep[1].folder.parent.parent))
    assert f"<code>{best.name}</code>" in page and "seed: 1" in page
    assert "<script" not in page


def test_markdown_and_csv_stand_beside_it(sweep: list[Run], ftlib: Ftlib, tmp_path: Path) -> None:
    ftlib("report", "pets", "-o", tmp_path / "sweep.html")
    lines = list(csv.DictReader(io.StringIO((tmp_path / "sweep.csv").read_text())))
    found = {
        (line["training.learning_rate"], line["seed"]): float(line["value"])
        for line in lines
        if line["split"] == "valid" and line["main"] == "1"
    }
    assert found == {
        ("0.001", "0"): 0.8,
        ("0.001", "1"): 0.9,
        ("0.001", "2"): 0.7,
        ("0.01", "0"): 0.6,
        ("0.01", "2"): 0.8,
    }
    text = (tmp_path / "sweep.md").read_text()
    assert r"| learning\_rate=0.001 | 3 of 3 | 0.800 ± 0.100 |" in text


def test_two_keys_get_their_effects_apart(site: Site, tmp_path: Path, ftlib: Ftlib) -> None:
    for rate, prompt, valid in ((1e-3, "a", 4), (1e-3, "b", 6), (1e-2, "a", 8), (1e-2, "b", 10)):
        _member(site, tmp_path, valid, 5, training__learning_rate=rate, data__prompt=prompt)
    ftlib("report", "pets", "-o", tmp_path / "p.html")
    text = (tmp_path / "p.md").read_text()
    assert "| 0.001 | 2 | 0.500 ± 0.141 |" in text
    assert "| b | 2 | 0.800 ± 0.283 |" in text


def test_several_runs_named_one_by_one(sweep: list[Run], ftlib: Ftlib, tmp_path: Path) -> None:
    page = tmp_path / "two.html"
    code, _, _ = ftlib("report", sweep[0].folder, sweep[3].folder, sweep[0].folder, "-o", page)
    assert code == 0
    assert "2 runs: 2 done; " in page.read_text()


def test_scores_on_other_datasets_stand_side_by_side(sweep: list[Run], ftlib: Ftlib, tmp_path: Path) -> None:
    answers = [row(n, "cat", "cat" if n < 3 else "dog") for n in range(10)]
    evaluate(sweep[0], "valid", "after", answers, dataset="set2")
    ftlib("report", "pets", "-o", tmp_path / "p.html")
    text = (tmp_path / "p.md").read_text()
    assert "| setting | jsonl test | jsonl valid | set2 valid |" in text
    assert "| 0.500 ± 0.000 | 0.800 ± 0.100 | 0.300 |" in text


def _report(ftlib: Ftlib, folder: Path) -> str:
    """The Markdown of all runs named pets."""
    assert ftlib("report", "pets", "-o", folder / "p.html")[0] == 0
    return (folder / "p.md").read_text().replace("\\", "")


def test_settings_of_different_splits_are_not_ranked_in_silence(site: Site, tmp_path: Path, ftlib: Ftlib) -> None:
    for seed in (0, 1):
        for split, prompt, valid in ((0, "a", 2), (0, "b", 6), (1, "a", 4), (1, "b", 8)):
            fields = {"seed": seed, "data__split__seed": split, "data__prompt": prompt}
            _member(site, tmp_path, valid, 5, f"{split}-", **fields)
    board, prompt, split = (part.partition("\n## ")[0] for part in _report(ftlib, tmp_path).split("\n## ")[1:4])
    assert "| prompt=b, data.split.seed=1 | 2 of 2 | 0.800 ± 0.000 |" in board
    assert "These settings were evaluated on different rows of valid" in board and "rows of test" in board
    assert split.startswith("Effect of data.split.seed") and "evaluated on different rows" in split
    assert "| b | 4 | 0.700 ± 0.115 |" in prompt and "on different rows" not in prompt
    assert "(settings were evaluated on different rows)" in _report(ftlib, tmp_path).splitlines()[0]


def test_the_seeds_of_a_setting_on_different_rows(site: Site, tmp_path: Path, ftlib: Ftlib) -> None:
    for seed, valid in enumerate((5, 9)):
        _member(site, tmp_path, valid, 5, f"{seed}-", seed=seed)
    text = _report(ftlib, tmp_path)
    assert "The runs of a setting were evaluated on different rows of valid, which may explain part of ±." in text
    assert "(settings were evaluated on different rows)" not in text


def test_unlike_settings_are_not_ranked_in_silence(site: Site, tmp_path: Path, ftlib: Ftlib) -> None:
    for seed, tokens in ((0, 16), (1, 2)):
        run = _member(site, tmp_path, 5, 5, seed=seed, evaluation__max_new_tokens=tokens)
        for split in ("valid", "test"):
            rows = [row(n, "cat", "cat") for n in range(10)]
            settings = {"fingerprint": split, "decode": "generate", "num_beams": 1, "max_new_tokens": tokens}
            settings |= {"generation": {}, "positive": None}
            evaluate(run, split, "after", rows, settings=settings)
            evaluate(run, f"{split}-2", "after", rows, settings=settings | {"max_new_tokens": 9})
    text = _report(ftlib, tmp_path)
    assert "the evaluations on valid differ in max_new_tokens (16, 2), which may explain differences" in text
    assert "4 evaluations with other settings than the run's config are not in this table" in text


def test_a_copy_of_a_run_is_no_other_seed(site: Site, tmp_path: Path, ftlib: Ftlib) -> None:
    run = _member(site, tmp_path, 5, 5, seed=3)
    shutil.copytree(run.folder, run.folder.with_name("0123456789ab"))
    text = _report(ftlib, tmp_path)
    assert "| 1 of 1 | 0.500 |" in text and "as a copy it is not counted as a seed" in text


def test_a_tie_has_no_best(site: Site, tmp_path: Path, ftlib: Ftlib) -> None:
    for rate in ("1e-3", "1e-2", "1e-1"):
        _member(site, tmp_path, 5, 5, training__learning_rate=rate)
    text = _report(ftlib, tmp_path)
    assert "Best on valid: no best setting, 3 of 3 are tied at accuracy 0.500" in text
    assert "Reproduce the best run" not in (tmp_path / "p.html").read_text()


def test_settings_on_the_same_rows_need_no_remark(sweep: list[Run], ftlib: Ftlib, tmp_path: Path) -> None:
    assert "on different rows" not in (text := _report(ftlib, tmp_path)) and "different rows" not in text


def test_an_undefined_score_is_none(sweep: list[Run], ftlib: Ftlib, tmp_path: Path) -> None:
    undefined: dict[str, Any] = {"value": None, "interval": None, "settings": {"fingerprint": "valid"}}
    for dataset in ("jsonl", "set2"):
        evaluate(sweep[0], "valid", "after", [row(1, "cat", "cat")], dataset, **undefined)
    text = _report(ftlib, tmp_path)
    assert "| learning_rate=0.001 | 2 of 3 | 0.800 ± 0.141 |" in text
    assert "| learning_rate=0.001 | 0.500 ± 0.000 | 0.800 ± 0.141 | – |" in text


def test_columns_of_one_name_and_different_rows_are_told_apart(site: Site, tmp_path: Path, ftlib: Ftlib) -> None:
    cats = _member(site, tmp_path, 8, 5, "cats ", seed=0, data__root="/data/cats")
    _member(site, tmp_path, 6, 5, "dogs ", seed=1, data__root="/data/dogs")
    answers = [row(n, "cat", "cat" if n < 3 else "dog") for n in range(10)]
    evaluate(cats, "valid", "after", answers, dataset="set2")
    table = _report(ftlib, tmp_path).partition("## Across datasets")[2].partition("##")[0]
    assert "| jsonl valid, accuracy (cats val) | set2 valid |" in table
    assert "| jsonl valid, accuracy (dogs val) |" in table
    assert "| 0.500 | 0.800 | 0.300 | – | – |" in table and "| – | – | – | 0.500 | 0.600 |" in table


def test_without_scores_on_valid_nothing_is_chosen(site: Site, tmp_path: Path, ftlib: Ftlib) -> None:
    for seed in (0, 1):
        _member(site, tmp_path, None, 0, seed=seed)
    code, out, _ = ftlib("report", "pets")
    assert code == 0
    assert "so no ranking" in Path(out.strip()).read_text()


def test_markdown_keeps_text_text() -> None:
    table = Table("a", "lr", ["x|y", "n"], [["<b>*no*</b>\nline", "1"]])
    assert table.markdown() == "## a\n\n| x\\|y | n |\n| --- | ---: |\n| \\<b\\>\\*no\\*\\</b\\> line | 1 |"
