"""What older code left is gone on with: a run, an evaluation, a merge, prepared data, a store, a submitted job.

fixtures/old.tar.gz is unpacked anew for each test that changes it; `make_fixtures.py` tells what it holds.
"""

from __future__ import annotations

import json
import pickle
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.conftest import REPOSITORY, read_lines
from tests.golden.conftest import Command, Golden, Result, environment_of, run_process
from tests.golden.normal import blank_decimals, differences, places, said
from tests.golden.test_chain import without

FIXTURES = Path(__file__).parent / "fixtures"
UNDISTURBED = json.loads((FIXTURES / "undisturbed.json").read_text())
LOSSES = {"loss": (1e-4, 0.0), "grad_norm": (1e-3, 1e-5)}
MADE_AT = "/tmp/ftlib-golden"
"""Where `make_fixtures.py` worked; not there any more."""


@dataclass(frozen=True)
class Old:
    """An unpacked copy."""

    folder: Path
    heavy: Command

    @property
    def store(self) -> Path:
        return self.folder / "store"

    @property
    def config(self) -> Path:
        return self.folder / "old.yaml"

    def run(self, seed: int) -> Path:
        """The folder of the run `old` with a seed."""
        (found,) = (
            path for path in self.store.glob("runs/alice/old/*/config.yaml") if f"\nseed: {seed}\n" in path.read_text()
        )
        return found.parent

    def torch(self, *words: object) -> Result:
        return self.heavy(*words, store=self.store, folder=self.folder)

    def light(self, *words: object) -> Result:
        return run_process(*words, store=self.store, folder=self.folder)

    def said(self, text: str) -> str:
        return said(text, {"store": self.store, "folder": self.folder})


@pytest.fixture
def old(tmp_path: Path, heavy: Command) -> Old:
    subprocess.run(["tar", "-xzf", FIXTURES / "old.tar.gz", "--no-same-owner", "-C", tmp_path], check=True)
    return Old(tmp_path, heavy)


def losses(run: Path) -> list[dict[str, object]]:
    return without(read_lines(run / "metrics.jsonl"), "seconds", "checkpoint_seconds")


@pytest.mark.parametrize("pinned", [True, False], ids=["by its own code", "by this code"])
def test_training_goes_on(old: Old, golden: Golden, pinned: bool) -> None:
    run = old.run(2)
    assert len(losses(run)) == 7 and (run / "checkpoints" / "attempt-0" / "checkpoint-6" / "COMPLETE.json").exists()
    if not pinned:
        shutil.rmtree(run / "code")
    found = old.torch("train", run / "config.yaml")
    assert found.code == 0, found.err
    golden.text(f"old/train-{'pinned' if pinned else 'unpinned'}.txt", blank_decimals(old.said(found.text)))
    assert (run / "code" / "ftlib" / "__init__.py").read_text().endswith("make_fixtures.py\n") == pinned
    assert differences(losses(run), without(UNDISTURBED, "seconds"), LOSSES) == []
    assert [event["event"] for event in read_lines(run / "history.jsonl")][-1] == "done"
    assert (run / "adapter" / "COMPLETE.json").exists() and (run / "DONE").exists()


def test_the_config_finds_the_runs(old: Old, golden: Golden) -> None:
    """Under the names that they have; `--dry-run` tells how each stands."""
    found = old.light("submit", old.config, "sweep.seed=[0, 1, 2, 3]", "--dry-run")
    golden.text("old/submit.txt", re.sub(r"/code-[0-9a-f]{12}/", "/code-<hash>/", old.said(found.text)))


def test_evaluation_goes_on(old: Old, golden: Golden) -> None:
    run = old.run(1)
    folder = run / "eval" / "jsonl" / "valid"
    (log,) = (folder / "after.partial" / "answers").glob("answers-*.jsonl")
    answered = {line["id"]: line["text"] for line in read_lines(log)}
    assert len(answered) == 4
    given = dict.fromkeys(answered, "7")  # nothing that the model would say
    log.unlink()  # a log whose name comes later would win
    lines = (json.dumps({"id": name, "text": text}) + "\n" for name, text in given.items())
    log.with_name("answers-0-0-0.jsonl").write_text("".join(lines))
    found = old.torch("evaluate", f"old/{run.name}")
    assert found.code == 0, found.err
    said = {row["id"]: row["prediction"] for row in read_lines(folder / "after" / "predictions.jsonl")}
    assert len(said) == 12 and {name: said[name] for name in given} == given, "what was answered is not asked again"
    assert not list(run.glob("eval/**/*.partial"))
    for path in (folder / "after", folder / "comparison.json"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert old.torch("evaluate", f"old/{run.name}").code == 0
    alone = {row["id"]: row["prediction"] for row in read_lines(folder / "after" / "predictions.jsonl")}
    assert {name: text for name, text in alone.items() if name not in given} == {
        name: text for name, text in said.items() if name not in given
    }


def test_merge_goes_on(old: Old, golden: Golden) -> None:
    def merge(output: str) -> Result:
        models = [f"old/{old.run(seed).name}" for seed in (0, 1)]
        words = ["--base", old.store / "models" / "small", "--model", *models, "--method", "ties"]
        found = old.torch("merge", *words, "-o", old.folder / output)
        assert found.code == 0, found.err
        return found

    shutil.copytree(old.folder / "merged.partial", old.folder / "marked.partial")
    marked = (old.folder / "marked.partial" / "model.safetensors").read_bytes()[:-1] + b"!"
    (old.folder / "marked.partial" / "model.safetensors").write_bytes(marked)
    merge("marked")
    assert (old.folder / "marked" / "model.safetensors").read_bytes() == marked, "what was merged is not merged again"
    told = [merge("merged").text, merge("merged").text]
    golden.text("old/merge.txt", blank_decimals(old.said("\n".join(told))))
    merge("anew")
    for name in ("config.json", "README.md"):
        assert (old.folder / "merged" / name).read_bytes() == (old.folder / "anew" / name).read_bytes()
    weights = [load_file(old.folder / name / "model.safetensors") for name in ("merged", "anew")]
    assert weights[0].keys() == weights[1].keys()
    assert all(np.allclose(weights[0][name], weights[1][name], rtol=0, atol=1e-6) for name in weights[0])
    assert not list(old.folder.glob("*.partial"))


def test_prepared_data_are_taken(old: Old, golden: Golden) -> None:
    (folder,) = (old.store / "prepared").iterdir()
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    found = old.torch("prepare", old.config)
    golden.text("old/prepare.txt", old.said(found.text))
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_status_shows_them(old: Old, golden: Golden) -> None:
    golden.text("old/status.txt", old.said(old.light("status").text))
    golden.json("old/status.json", json.loads(old.light("status", "--json").out))
    golden.text("old/usage.txt", old.said(old.light("status", "--usage").text))


@pytest.mark.parametrize("name", ["chosen", "old", "diverged", "old diverged chosen queued"])
def test_reports(old: Old, golden: Golden, name: str) -> None:
    """To the letter, since nothing is computed by a model here."""
    page = old.folder / "page.html"
    found = old.light("report", *name.split(), "-o", page)
    assert found.code == 0, found.err
    for suffix in (".html", ".md", ".csv"):
        text = places(page.with_suffix(suffix).read_text(), {"store": old.store, "folder": old.folder})
        text = re.sub(r"\s*<style>.*?</style>\s*|(?<=;base64,)[^\"]*", "…", text, flags=re.DOTALL)
        text = re.sub(r"Made .*? by ftlib [\w.]+", "Made … by ftlib …", text)
        text = re.sub(r">\s*<", ">\n<", text)
        golden.text(f"old/report-{name.replace(' ', '-')}{suffix}", text)


def test_a_submitted_job_is_run(old: Old, tmp_path: Path) -> None:
    """The pickle names `ftlib.submission.launch.run_stage_command`; jobs/run.sh starts it by ftlib/run_module.py."""
    path = old.folder / "logs" / "queued" / "71_submitted.pkl"
    assert re.search(rb"ftlib\.submission\.launch.{1,9}run_stage_command", path.read_bytes(), re.DOTALL)
    with path.open("rb") as file:
        job = pickle.load(file)
    assert [command[0] for command in job.args[0]] == ["stage", "prepare", "train", "evaluate"]
    job.args = ([[word.replace(MADE_AT, str(old.folder)) for word in command] for command in job.args[0]],)
    job.dump(path)
    slurm = {"SUBMITIT_EXECUTOR": "slurm", "SLURM_JOB_ID": "71", "FTLIB_STEP": "prepare"}
    runner = [sys.executable, REPOSITORY / "ftlib" / "run_module.py", "-u", "-m", "submitit.core._submit"]
    done = subprocess.run(
        [*runner, path.parent], cwd=tmp_path, env=environment_of(old.store, **slurm), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (folder,) = (old.store / "prepared").iterdir()
    assert f"{folder}\n" in done.stdout, "the command said where the prepared data are"
