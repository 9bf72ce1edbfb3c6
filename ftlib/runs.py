"""Run folders: where everything of a run lies, and what happened to it.

`<runs>/<name>/<identity>/` holds config.yaml, environment.json, data.json, data_paths.json, owner.json, checkpoints/,
adapter/ or model/, metrics.jsonl, history.jsonl, eval/, report.html and DONE.
"""

from __future__ import annotations

import os
import shutil
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftlib import console, files
from ftlib.config_file import DATA_PATHS, RUN_CONFIG, Experiment
from ftlib.errors import UserError
from ftlib.identity import changes_since
from ftlib.site import Site

_CHECKPOINT = "checkpoint-"
_RUNS = "[!.]*/*/config.yaml"
"""Hidden folders hold what belongs to jobs."""


@dataclass(frozen=True)
class Run:
    """A run folder and the paths in it."""

    folder: Path

    @property
    def config_file(self) -> Path:
        return self.folder / RUN_CONFIG

    @property
    def metrics(self) -> Path:
        """One line per optimizer step, and one per evaluation on the way."""
        return self.folder / "metrics.jsonl"

    @property
    def history(self) -> Path:
        """One line per start and end, restart after a divergence, and round."""
        return self.folder / "history.jsonl"

    @property
    def owner(self) -> Path:
        """Who is at work on the run; its modification time is the heartbeat."""
        return self.folder / "owner.json"

    @property
    def environment(self) -> Path:
        """A list: for each start of the run, what it was made with."""
        return self.folder / "environment.json"

    @property
    def data(self) -> Path:
        """The prepared data that the run was trained on: folder and fingerprints."""
        return self.folder / "data.json"

    @property
    def data_paths(self) -> Path:
        """Where its data were found since, if not where its config says: a list, the newest last."""
        return self.folder / DATA_PATHS

    @property
    def base(self) -> Path:
        """The base model's files: SHA-256 of each."""
        return self.folder / "base.json"

    @property
    def warm_start(self) -> Path:
        """The weights that training began with, if they are another run's: folder and hash."""
        return self.folder / "warm_start.json"

    @property
    def code(self) -> Path:
        """The package that the run began with."""
        return self.folder / "code"

    @property
    def programs(self) -> Path:
        """Of torch.compile, until training is done; see `training/compile_cache.py`."""
        return self.folder / "compiled"

    @property
    def report(self) -> Path:
        return self.folder / "report.html"

    @property
    def done(self) -> Path:
        return self.folder / "DONE"

    def result(self, method: str) -> Path:
        """The trained weights: a PEFT adapter, or a whole model."""
        return self.folder / ("adapter" if method in ("lora", "dora") else "model")

    def checkpoints(self, attempt: int = 0) -> Path:
        """Of one attempt; those after the first begin anew with another seed because training had diverged."""
        return self.folder / "checkpoints" / f"attempt-{attempt}"

    def evaluation(self, dataset: str, split: str, when: str) -> Path:
        return self.folder / "eval" / dataset / split / when

    def note(self, event: str, **details: Any) -> None:
        """Add a line to the run's history; the first rank does."""
        if console.speaks():
            self.note_from_any(event, **details)

    def note_from_any(self, event: str, **details: Any) -> None:
        """Add a line to the run's history, whichever rank this is."""
        record = {"event": event, "time": round(time.time(), 3), "host": host_name(), "job": job_number(), **details}
        files.append_jsonl(self.history, record)

    def environments(self) -> list[dict[str, Any]]:
        """What environment.json holds: what each start was made with, oldest first."""
        found: list[dict[str, Any]] = files.read_json(self.environment) if self.environment.exists() else []
        return found

    def note_environment(self, environment: dict[str, Any]) -> None:
        """Add this start's surroundings to environment.json; the first rank does."""
        if not console.speaks():
            return
        files.write_json(self.environment, [*self.environments(), {"time": round(time.time(), 3), **environment}])


def run_of(experiment: Experiment, site: Site, anew: bool = False) -> Run:
    """The run folder of an experiment, which need not be there.

    A run that was begun with an older recipe and is not finished goes on in its folder, with the code that it has
    pinned; so does whatever the config in a run folder is used for.

    Args:
        anew: the folder of a new run, whatever was begun before.
    """
    folder = site.runs / experiment.config.name
    newest = [name for name in experiment.names if name.recipe == max(each.recipe for each in experiment.names)]
    for name in [] if anew else experiment.names:
        run = Run(folder / name.identity)
        own = name is experiment.names[0] or not run.done.exists()
        if run.config_file.is_file() if name in newest else own and (run.code / files.MARKER).is_file():
            return run
    return Run(folder / newest[0].identity)


def recipe_notice(experiment: Experiment, site: Site) -> str | None:
    """What must be said of a run with an older recipe that exists; None without one."""
    folder, used = site.runs / experiment.config.name, run_of(experiment, site)
    for name in experiment.names:
        run = Run(folder / name.identity)
        since = "; ".join(changes_since(experiment.config, name.recipe))
        if not since or not (run.code / files.MARKER).is_file():
            continue
        told = f"{handle(run, site)} is of recipe {name.recipe} (changed since: {since})"
        if run == used:
            remedy = "to train with the newest recipe, give the config another name or seed"
            return f"{told} and goes on with the code that it began with; {remedy}"
        if run.done.exists():
            return f"{told} and stays as it is: ftlib evaluate {handle(run, site)}; {handle(used, site)} is a new run"
    return None


def open_run(experiment: Experiment, site: Site, anew: bool = False) -> Run:
    """The run folder of an experiment, made if need be, with its resolved config in it."""
    run = run_of(experiment, site, anew)
    with files.storage_errors(site.runs), files.shared_with_group():
        site.runs.parent.mkdir(parents=True, exist_ok=True)  # <store>/runs, where every user has a folder
    text = experiment.to_yaml(run.folder.name)
    same = run.config_file.exists() and run.config_file.read_text(encoding="utf-8") == text
    if console.speaks() and not same:
        files.write_text(run.config_file, text)
    if console.speaks():
        _note_data_paths(run, experiment.elsewhere)
    return run


def _note_data_paths(run: Run, elsewhere: dict[str, str]) -> None:
    """What works with the run's own config looks for its data first where they were last."""
    known = files.read_json(run.data_paths) if run.data_paths.exists() else [{}]
    if known[-1] != elsewhere:
        files.write_json(run.data_paths, [*(each for each in known if each != elsewhere), elsewhere])


def prompts_folder(name: str, site: Site) -> Path:
    """Where a config's prompts are compared: beside its runs, since the model is not trained yet."""
    return site.runs / name / "prompts"


def find_run(text: str, site: Site) -> Run:
    """A run by its folder, its `name/identity`, or its name if that is unique.

    Raises:
        UserError: no such run, or several.
    """
    found = find_runs([text], site)
    if len(found) > 1:
        choices = "\n".join(f"  {handle(run, site)}" for run in found)
        raise UserError(f"{text}: several runs have this name", f"Name one of them:\n{choices}")
    return found[0]


def handle(run: Run, site: Site) -> str:
    """How commands name a run."""
    inside = run.folder.is_relative_to(site.runs)
    return str(run.folder.relative_to(site.runs) if inside else run.folder)


def find_runs(texts: Sequence[str], site: Site) -> list[Run]:
    """All runs, or those that are named: by folder, by `name/identity`, or all of a name.

    Raises:
        UserError: a name that no run has.
    """
    if not texts:
        return [Run(path.parent) for path in sorted(site.runs.glob(_RUNS))]
    return list(dict.fromkeys(run for text in texts for run in _named(text, site)))


def _named(text: str, site: Site) -> list[Run]:
    for folder in (Path(text), site.runs / text):
        if (folder / "config.yaml").is_file():
            return [Run(folder.absolute())]
    under = sorted((site.runs / text).glob("*/config.yaml"))
    if under:
        return [Run(path.parent) for path in under]
    known = sorted(path.parent.parent.name for path in site.runs.glob(_RUNS))
    names = ", ".join(dict.fromkeys(known)) or "none"
    raise UserError(f"{text}: no such run", f"Runs in {site.runs}: {names}")


def checkpoint_folder(root: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return root / f"{_CHECKPOINT}{step}"


def list_checkpoints(root: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every complete checkpoint, oldest first; torn and temporary folders are left out."""
    found = []
    for folder in root.glob(f"{_CHECKPOINT}*"):
        number = folder.name.removeprefix(_CHECKPOINT)
        if number.isdigit() and files.is_complete(folder):
            found.append((int(number), folder))
    return sorted(found)


def last_checkpoint(root: Path) -> tuple[int, Path] | None:
    """The newest checkpoint whose every file has the size and hash that its marker names."""
    for step, folder in reversed(list_checkpoints(root)):
        if files.is_complete(folder, thorough=True):
            return step, folder
    return None


def remove_checkpoints_after(root: Path, step: int) -> None:
    """Delete checkpoints of later steps: damaged ones that were passed over, which would crowd out good ones."""
    for folder in root.glob(f"{_CHECKPOINT}*"):
        number = folder.name.removeprefix(_CHECKPOINT)
        if number.isdigit() and int(number) > step:
            shutil.rmtree(folder, ignore_errors=True)


def rotate_checkpoints(root: Path, keep: int, best: int | None = None) -> None:
    """Delete all but the newest `keep` checkpoints and that of step `best`, and whatever killed writers left."""
    complete = list_checkpoints(root)
    kept = {folder for _, folder in complete[-keep:]} | {folder for step, folder in complete if step == best}
    for folder in root.glob(f"{_CHECKPOINT}*"):
        if folder not in kept:
            shutil.rmtree(folder, ignore_errors=True)


def host_name() -> str:
    """The node's name as Slurm calls it, else the machine's."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def job_number() -> str | None:
    """This Slurm job's number, the same after a requeue; an array's element is named as users name it, like 12_3."""
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        return f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ.get("SLURM_JOB_ID")


def process_start(pid: int) -> str | None:
    """When a process of this host started, in clock ticks since boot; None if there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else fields[19]
