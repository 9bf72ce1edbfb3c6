"""`ftlib report` as a user calls it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ftlib.core import files
from ftlib.core.paths import find_site
from ftlib.metrics.comparability import evaluation_fingerprint
from ftlib.runs.run import Run
from tests.reports import fake_runs

Ftlib = Callable[..., tuple[int, str, str]]
HEAVY = {"torch", "transformers", "numpy", "matplotlib", "sklearn", "peft"}
PROBE = f"""
import sys
sys.modules["PIL"] = None  # not installed
from ftlib.__main__ import main
code = main(["report", "pets"])
sys.exit(code or sorted({HEAVY} & set(sys.modules)) or 0)
"""


def test_writes_into_the_run_folder_and_prints_where(finished: Run, ftlib: Ftlib) -> None:
    code, out, _ = ftlib("report", "pets")
    assert code == 0
    assert out.strip() == str(finished.report)
    assert finished.report.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


def test_writes_where_it_is_told(finished: Run, ftlib: Ftlib, tmp_path: Path) -> None:
    target = tmp_path / "new" / "page.html"
    code, out, _ = ftlib("report", finished.folder, "-o", target)
    assert (code, out.strip()) == (0, str(target))
    assert target.is_file()
    assert not finished.report.exists()


def test_unknown_run_is_the_users_mistake(finished: Run, ftlib: Ftlib) -> None:
    code, out, err = ftlib("report", "cats")
    assert (code, out) == (2, "")
    assert "no such run" in err
    assert "pets" in err


def test_needs_only_the_light_install(finished: Run) -> None:
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def planted_run(tmp_path: Path, privacy: str) -> Run:
    """A run whose prompts, answers and labels say "planted"."""
    config = fake_runs.CONFIG.replace('"{prefix}"', '"planted prompt {prefix}"') + f"privacy: {privacy}\n"
    run = fake_runs.new_run(find_site(), tmp_path, config)
    fake_runs.train(run)
    rows = [
        fake_runs.row(
            number, answer, expected, prompt="planted prompt", without_context={"prediction": "planted", "score": 0.0}
        )
        for number, (answer, expected) in enumerate([("planted a", "planted a"), ("planted a", "planted b")])
    ]
    asked = {
        "fingerprint": "feed0002",
        "prompt": "planted {prefix}",
        "labels": ["planted"],
        "prompts": {"a": "planted"},
    }
    for when in ("before", "after"):
        fake_runs.evaluate(run, "valid", when, rows, settings={**asked, "positive": f"planted {when}"})
    folder = run.evaluation_folder("jsonl", "valid", "after").parent
    told = [evaluation_fingerprint(files.read_json(folder / when / "scores.json")) for when in ("before", "after")]
    files.write_json(folder / "comparison.json", {"of": told, "sentence": "nothing changed"})
    fake_runs.finish(run)
    images = find_site().store / "datasets" / "pets" / "images"
    images.mkdir(parents=True)
    (images / "a.png").write_bytes(fake_runs.PNG)
    return run


@pytest.mark.parametrize(
    ("privacy", "options", "images", "text"),
    [
        ("{}", [], True, True),
        ("{}", ["--no-images"], False, True),
        ("{images: false}", [], False, True),
        ("{text: false}", [], True, False),
        ("{images: false, text: false}", [], False, False),
    ],
)
def test_privacy_holds_for_everything_that_a_report_writes(
    store: Path, ftlib: Ftlib, tmp_path: Path, privacy: str, options: list[str], images: bool, text: bool
) -> None:
    run = planted_run(tmp_path, privacy)
    code, _, error = ftlib("report", "pets", "--tensorboard", *options)
    assert code == 0, error
    page = run.report.read_text(encoding="utf-8")
    assert ("data:image/" in page) == images and ("planted prompt" in page) == text
    written = [run.report.with_suffix(suffix) for suffix in (".html", ".md", ".csv")]
    written += [path for path in (run.folder / "tensorboard").rglob("*") if path.is_file()]
    assert any(b"planted" in path.read_bytes() for path in written) == text
    assert "row-1" in page  # rows are told in any case


def test_what_is_collected_of_a_private_run_holds_no_text(store: Path, tmp_path: Path) -> None:
    site = find_site()
    record = fake_runs.record_of(planted_run(tmp_path, "{text: false}"), site)
    [split] = record.splits
    assert "planted" not in f"{record.config} {record.config_text} {[one.scores for one in split.by_when.values()]}"
    assert split.change, "what training changed is still told"
    settings = [one.scores["settings"]["positive"] for one in split.by_when.values()]
    assert settings[0] != settings[1], "what was asked differently stays different"


def test_privacy_renames_no_run(store: Path, tmp_path: Path) -> None:
    plain = fake_runs.new_run(find_site(), tmp_path, fake_runs.CONFIG)
    private = fake_runs.new_run(find_site(), tmp_path, fake_runs.CONFIG + "privacy: {text: false}\n")
    assert plain.folder == private.folder and "privacy" in private.config_file.read_text()
