"""Run folders, their files and checkpoints, and the lookup of runs by name.

`<runs>/<name>/<identity>/` contains config.yaml, environment.json, data.json, data_paths.json, base.json, code/,
owner.json, checkpoints/, adapter/ or model/, metrics.jsonl, history.jsonl, eval/, report.html and DONE. The state of a
run (running, failed, …) is derived in slurm/status.py.
"""

from __future__ import annotations

import shutil
import stat
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftlib.config import yaml12
from ftlib.config.identity import changes_since
from ftlib.config.loader import DATA_PATHS, PLUGINS, RUN_CONFIG, Experiment, plugin_copy
from ftlib.core import files, jsonl, log, permissions, plugins, trust
from ftlib.core.environment import host_name, job_id
from ftlib.core.paths import Site
from ftlib.core.redaction import redact
from ftlib.errors import UserError

_CHECKPOINT_PREFIX = "checkpoint-"
_RUN_GLOB = "[!.]*/*/config.yaml"
"""Hidden folders contain files of jobs."""
_RUNS_SHOWN = 20
_SETTINGS_SHOWN = 4
"""Number of runs of one name, and of settings by which they are told apart, in messages."""


@dataclass(frozen=True)
class Run:
    """A run folder and the paths in it."""

    folder: Path

    @property
    def config_file(self) -> Path:
        return self.folder / RUN_CONFIG

    @property
    def metrics(self) -> Path:
        """One line per optimizer step, and one per evaluation during training."""
        return self.folder / "metrics.jsonl"

    @property
    def history(self) -> Path:
        """One line per event: start, end, restart after a divergence, round; see `events.py`."""
        return self.folder / "history.jsonl"

    @property
    def owner(self) -> Path:
        """The holder of the lease on the run; its modification time is the heartbeat."""
        return self.folder / "owner.json"

    @property
    def environment(self) -> Path:
        """A list with a record for each start of the run: versions, host, GPUs, code."""
        return self.folder / "environment.json"

    @property
    def data(self) -> Path:
        """The prepared data that the run was trained on: folder and fingerprints."""
        return self.folder / "data.json"

    @property
    def data_paths(self) -> Path:
        """Where its data have been found, if not at the path in its config: a list, the newest last."""
        return self.folder / DATA_PATHS

    @property
    def base(self) -> Path:
        """SHA-256 of each of the base model's files."""
        return self.folder / "base.json"

    @property
    def warm_start(self) -> Path:
        """The weights that training started with, if they are another run's: folder and hash."""
        return self.folder / "warm_start.json"

    @property
    def initial_factors(self) -> Path:
        """With PiSSA, the factors that training started with, until it is done; see `models/pissa.py`."""
        return self.folder / "pissa"

    @property
    def code(self) -> Path:
        """The ftlib package that the run started with; see `pinning.py`."""
        return self.folder / "code"

    @property
    def compile_cache(self) -> Path:
        """torch.compile's cache, until training is done; see `training/compiling.py`."""
        return self.folder / "compiled"

    @property
    def report(self) -> Path:
        return self.folder / "report.html"

    @property
    def done_marker(self) -> Path:
        return self.folder / "DONE"

    def result_folder(self, method: str) -> Path:
        """The trained weights: a PEFT adapter, or a whole model."""
        return self.folder / ("adapter" if method in ("lora", "dora") else "model")

    def checkpoint_root(self, attempt: int = 0) -> Path:
        """The checkpoints of an attempt; later attempts restart with another seed after a divergence."""
        return self.folder / "checkpoints" / f"attempt-{attempt}"

    def evaluation_folder(self, dataset: str, split: str, when: str, settings: str = "") -> Path:
        """The folder of an evaluation.

        Args:
            settings: a folder of its own for settings other than the config's, see `comparability.settings_folder`.
        """
        return self.folder / "eval" / dataset / split / settings / when

    def log_event(self, event: str, **details: Any) -> None:
        """Append an event to the run's history, in the first rank only."""
        if log.is_main_process():
            self.log_event_any_rank(event, **details)

    def log_event_any_rank(self, event: str, **details: Any) -> None:
        """Append an event to the run's history, in any rank."""
        record = {"event": event, "time": round(time.time(), 3), "host": host_name(), "job": job_id(), **details}
        jsonl.append_jsonl(self.history, record)

    def environments(self) -> list[dict[str, Any]]:
        """The records of environment.json, one for each start, the oldest first."""
        found: list[dict[str, Any]] = files.read_json(self.environment) if self.environment.exists() else []
        return found

    def log_environment(self, environment: dict[str, Any]) -> None:
        """Append a record of this start to environment.json, in the first rank only."""
        if not log.is_main_process():
            return
        files.write_json(self.environment, [*self.environments(), {"time": round(time.time(), 3), **environment}])


def run_for(experiment: Experiment, site: Site, new: bool = False) -> Run:
    """The run folder of an experiment, which may not exist yet.

    An unfinished run of an older recipe resumes in its folder, with its pinned code; the config in a run folder always
    refers to that run.

    Args:
        new: the folder of a new run, whatever earlier runs there are.
    """
    folder = site.runs / experiment.config.name
    newest = [name for name in experiment.names if name.recipe == max(each.recipe for each in experiment.names)]
    for name in [] if new else experiment.names:
        run = Run(folder / name.identity)
        own = name is experiment.names[0] or not run.done_marker.exists()
        if run.config_file.is_file() if name in newest else own and (run.code / files.COMPLETE_MARKER).is_file():
            return run
    return Run(folder / newest[0].identity)


def recipe_notice(experiment: Experiment, site: Site) -> str | None:
    """A notice about an existing run of an older recipe; None if there is none."""
    folder, used = site.runs / experiment.config.name, run_for(experiment, site)
    for name in experiment.names:
        run = Run(folder / name.identity)
        since = "; ".join(changes_since(experiment.config, name.recipe))
        if not since or not (run.code / files.COMPLETE_MARKER).is_file():
            continue
        told = f"{run_name(run, site)} is of recipe {name.recipe} (changed since: {since})"
        if run == used:
            remedy = "to train with the newest recipe, give the config another name or seed"
            return f"{told} and goes on with the code that it began with; {remedy}"
        if run.done_marker.exists():
            return (
                f"{told} and stays as it is: ftlib evaluate {run_name(run, site)}; {run_name(used, site)} is a new run"
            )
    return None


def create_run(experiment: Experiment, site: Site, new: bool = False) -> Run:
    """Create the run folder of an experiment, if it does not exist, and write its resolved config."""
    run = run_for(experiment, site, new)
    permissions.open_run_folder(run.folder, site)
    text = experiment.to_yaml(run.folder.name)
    same = run.config_file.exists() and run.config_file.read_text(encoding="utf-8") == text
    if log.is_main_process():
        _copy_plugins(run, experiment)
    if log.is_main_process() and not same:
        files.write_text(run.config_file, text)
    if log.is_main_process():
        _log_data_paths(run, experiment.data_locations)
    return run


def update_run(experiment: Experiment, site: Site) -> Run:
    """The run folder of an experiment: as `create_run` if it exists, else only where it would be."""
    run = run_for(experiment, site)
    return create_run(experiment, site) if run.config_file.is_file() else run


def _copy_plugins(run: Run, experiment: Experiment) -> None:
    """Keep the plugins' files with the run, which goes on with them whatever is edited."""
    for plugin in experiment.config.plugins:
        copy = plugin_copy(run.folder, plugin.model_dump())
        if not plugin.file or copy.is_file():
            continue
        text = plugins.require_same(plugin).decode()
        plugins.require_trusted(plugin)
        if redact(text) != text:
            raise UserError(f"{plugin.file}: holds a secret, and a plugin is saved with every run")
        with files.storage_errors(copy):
            copy.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            files.write_text(copy, text)
            trust.remove_write_permission_of_others(run.folder / PLUGINS)


def _log_data_paths(run: Run, elsewhere: dict[str, str]) -> None:
    """Record where the data are now; commands that read the run's config look there first."""
    known = files.read_json(run.data_paths) if run.data_paths.exists() else [{}]
    if known[-1] != elsewhere:
        files.write_json(run.data_paths, [*(each for each in known if each != elsewhere), elsewhere])


def prompts_folder(name: str, site: Site) -> Path:
    """The folder for the prompt comparison of a config, beside its runs."""
    return site.runs / name / "prompts"


def find_run(text: str, site: Site, prefer_trained: bool = False) -> Run:
    """A run by its folder, its `name/identity`, or its name if that is unique among the runs that are to be trained.

    Args:
        prefer_trained: of several runs with this name, take the only trained one, and say so.

    Raises:
        UserError: no such run, or several; the message lists them.
    """
    found = find_runs([text], site)
    if len(found) > 1:
        found = [run for run in found if not _is_evaluated_only(run)] or found
    if prefer_trained and len(found) > 1:
        trained = [run for run in found if run.done_marker.exists()]
        if len(trained) == 1:
            log.info(f"{text}: using {run_name(trained[0], site)}, the only trained one of {len(found)} runs")
            return trained[0]
    if len(found) > 1:
        raise UserError(f"{text}: several runs have this name", f"Name one of them:\n{_choices(found, site)}")
    return found[0]


def find_trained_run(text: str, site: Site) -> Run:
    """A trained run, found like `find_run` does.

    Raises:
        UserError: no such run, several trained ones, or it is not trained yet.
    """
    run = find_run(text, site, prefer_trained=True)
    require_trained(run)
    return run


def require_trained(run: Run, remedy: str = "Run `ftlib train` first.") -> None:
    """Check that a run is trained.

    Raises:
        UserError: it is not.
    """
    if not run.done_marker.exists():
        raise UserError(f"{run.folder}: not trained yet", remedy)


def require_evaluable(experiment: Experiment, run: Run, site: Site) -> None:
    """Check that a run is trained; the message names the alternatives of an evaluation.

    Raises:
        UserError: it is not.
    """
    if not run.done_marker.exists():
        remedy = "Run `ftlib train` first, or add --before for the base model."
        others = [other for other in _of_name(experiment.config.name, site) if other.done_marker.exists()]
        trained = f"Trained runs of this name:\n{_choices(others, site)}" if others else None
        require_trained(run, "\n".join(filter(None, [remedy, recipe_notice(experiment, site), trained])))


def _choices(found: Sequence[Run], site: Site) -> str:
    """A line for each run: how to name it, whether it is trained, and its settings that differ from the others'."""
    more = len(found) - _RUNS_SHOWN
    found = found[:_RUNS_SHOWN]
    settings = [_flat(_saved_config(run)) for run in found]
    keys = sorted({key for each in settings for key in each})
    differing = [key for key in keys if len({repr(each.get(key)) for each in settings}) > 1]
    lines = []
    for run, own in zip(found, settings, strict=True):
        facts = [f"{key}={own[key]}" for key in differing if key in own]
        shown = ", ".join(facts[:_SETTINGS_SHOWN]) + (" …" if len(facts) > _SETTINGS_SHOWN else "")
        state = "trained" if run.done_marker.exists() else "not trained yet"
        lines.append(f"  {run_name(run, site)}  {state}{shown and f': {shown}'}")
    return "\n".join([*lines, *([f"  … and {more} more; `ftlib status` lists all"] if more > 0 else [])])


def _saved_config(run: Run) -> dict[str, Any]:
    try:
        return yaml12.load(run.config_file.read_text(encoding="utf-8"), str(run.config_file))[0] or {}
    except (OSError, UserError):
        return {}


def _flat(fields: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested fields by their dotted keys."""
    found: dict[str, Any] = {}
    for key, value in fields.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def _is_evaluated_only(run: Run) -> bool:
    """Whether it only holds scores of a base or merged model (`evaluate CONFIG model.base=… --before`)."""
    if run.done_marker.exists() or run.data.exists():
        return False
    events = jsonl.read_jsonl_log(run.history)
    of_training = any(
        event["event"] in ("start", "submitted") or event.get("command") not in (None, "evaluate") for event in events
    )
    return not of_training and (bool(events) or (run.folder / "eval").is_dir())


def is_unused(run: Run) -> bool:
    """Whether its folder holds nothing but a config, as evaluations of version 0.1 left it."""
    try:
        return not any(path.name not in (RUN_CONFIG, DATA_PATHS, PLUGINS) for path in run.folder.iterdir())
    except OSError:  # not readable, or just deleted
        return False


def run_name(run: Run, site: Site) -> str:
    """The name of a run in messages and commands."""
    inside = run.folder.is_relative_to(site.runs)
    return str(run.folder.relative_to(site.runs) if inside else run.folder)


def find_runs(texts: Sequence[str], site: Site) -> list[Run]:
    """All runs, or the named ones: by folder, by `name/identity`, or all runs of a name.

    Raises:
        UserError: no run has this name.
    """
    if not texts:
        return [Run(path.parent) for path in sorted(site.runs.glob(_RUN_GLOB))]
    return list(dict.fromkeys(run for text in texts for run in _named(text, site)))


def _of_name(name: str, site: Site) -> list[Run]:
    """The runs of a config's name."""
    return [Run(path.parent) for path in sorted((site.runs / name).glob("*/config.yaml"))]


def _named(text: str, site: Site) -> list[Run]:
    """The runs of a name; a folder of the same name is addressed by its path, `./NAME`."""
    folder, own, by_path = Path(text), site.runs / text, text.startswith((".", "/"))
    unreadable = "{}: you may not read this folder"
    remedy = "Its owner can share it: FTLIB_SHARE_RUNS=1 in jobs/site.env, and the chmod that `ftlib doctor` tells."
    try:
        runs = [own] if (own / "config.yaml").is_file() else [path.parent for path in sorted(own.glob("*/config.yaml"))]
    except PermissionError:
        raise UserError(unreadable.format(own), remedy) from None
    runs = [path for path in runs if not is_unused(Run(path))] or runs
    try:
        is_run = stat.S_ISREG((folder / RUN_CONFIG).stat().st_mode)
    except PermissionError:
        if by_path or not runs:
            raise UserError(unreadable.format(text), remedy) from None
        is_run = False
    except OSError:  # named in another way
        is_run = False
    if is_run and (by_path or not runs):
        return [Run(folder.absolute())]
    if runs:
        return [Run(path) for path in runs]
    known = sorted(path.parent.parent.name for path in site.runs.glob(_RUN_GLOB))
    names = ", ".join(dict.fromkeys(known)) or "none"
    raise UserError(f"{text}: no such run", f"Runs in {site.runs}: {names}")


def checkpoint_folder(root: Path, step: int) -> Path:
    """The folder of a step's checkpoint."""
    return root / f"{_CHECKPOINT_PREFIX}{step}"


def list_checkpoints(root: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every complete checkpoint, the oldest first."""
    found = []
    for folder in root.glob(f"{_CHECKPOINT_PREFIX}*"):
        number = folder.name.removeprefix(_CHECKPOINT_PREFIX)
        if number.isdigit() and files.is_complete(folder):
            found.append((int(number), folder))
    return sorted(found)


def last_checkpoint(root: Path) -> tuple[int, Path] | None:
    """The newest checkpoint in which all files have the size and hash of its marker."""
    for step, folder in reversed(list_checkpoints(root)):
        if files.is_complete(folder, thorough=True):
            return step, folder
    return None


def remove_checkpoints_after(root: Path, step: int) -> None:
    """Delete checkpoints of later steps: damaged ones, which would otherwise count when checkpoints are rotated."""
    for folder in root.glob(f"{_CHECKPOINT_PREFIX}*"):
        number = folder.name.removeprefix(_CHECKPOINT_PREFIX)
        if number.isdigit() and int(number) > step:
            shutil.rmtree(folder, ignore_errors=True)


def rotate_checkpoints(root: Path, keep: int, best: int | None = None) -> None:
    """Delete all but the newest `keep` checkpoints and that of step `best`, and leftovers of killed writers."""
    complete = list_checkpoints(root)
    kept = {folder for _, folder in complete[-keep:]} | {folder for step, folder in complete if step == best}
    for folder in root.glob(f"{_CHECKPOINT_PREFIX}*"):
        if folder not in kept:
            shutil.rmtree(folder, ignore_errors=True)
