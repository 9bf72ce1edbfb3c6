"""How long a run will take, from the speed of finished runs: hours, GPU-hours, and requeues that the time limit means.

Compared are runs with the same model, adapter, task and data on the same number of GPUs of the same type. Nothing here
needs torch.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftlib.config import yaml12
from ftlib.config.loader import Experiment
from ftlib.config.schema import Config
from ftlib.core import files, jsonl
from ftlib.core.paths import Site
from ftlib.runs.run import Run, find_runs

_MOST = 50
"""Finished runs that are read, the newest first."""


@dataclass(frozen=True)
class Forecast:
    """What a run is expected to need.

    Attributes:
        seconds: of training.
        startup: seconds from the start of a job to its first step.
        gpus: of the whole job.
        basis: what this is known from, such as "3 finished runs".
    """

    seconds: float
    startup: float
    gpus: int
    basis: str

    def starts(self, limit: float, margin: float = 120.0) -> int:
        """Return how many starts a job needs whose time limit is `limit` seconds; 0 if it would never get on."""
        useful = limit - self.startup - margin
        return math.ceil(self.seconds / useful) if useful > 0 else 0

    def describe(self, limit: float, count: int = 1) -> str:
        """Return the forecast of `count` such runs as text."""
        starts = self.starts(limit)
        if not starts:
            return f"job.time is shorter than the start-up ({self.startup:.0f} s in {self.basis}) and the time to save"
        hours = (self.seconds + starts * self.startup) / 3600
        cost = f" ({self.gpus * hours:.2g} GPU-h)" if self.gpus else ""
        told = f"about {hours:.2g} h a run{cost}, as {self.basis} took"
        requeues = f"; job.time means {starts - 1} {'requeue' if starts == 2 else 'requeues'}" if starts > 1 else ""
        cost = f", {count * self.gpus * hours:.2g} GPU-h" if self.gpus else ""
        total = f"; {count} runs: {count * hours:.2g} h{cost}" if count > 1 else ""
        return told + requeues + total


def forecast(experiment: Experiment, site: Site) -> Forecast | None:
    """Return the forecast of a run; None without a finished run like it, or with an unknown number of steps."""
    config, own = experiment.config, yaml12.load(experiment.to_yaml(), "config")[0]
    found = [known for run in _newest(site) if (known := _speed(run, own)) is not None]
    if not found:
        return None
    rows_per_second = statistics.median(speed for speed, _, _ in found)
    startup = statistics.median(each for _, each, _ in found)
    rows = _rows(config, [total for _, _, total in found])
    gpus = config.job.gpus * config.job.nodes
    return Forecast(rows / rows_per_second, startup, gpus, _runs(len(found))) if rows else None


def _newest(site: Site) -> list[Run]:
    finished = [run for run in find_runs([], site) if run.done_marker.exists()]
    return sorted(finished, key=lambda run: run.done_marker.stat().st_mtime, reverse=True)[:_MOST]


def _speed(run: Run, own: dict[str, Any]) -> tuple[float, float, int] | None:
    """Return rows per second, start-up in seconds, and rows of an epoch (0: unknown) of a comparable run."""
    try:
        other: dict[str, Any] = yaml12.load(run.config_file.read_text(encoding="utf-8"), str(run.config_file))[0]
        events = jsonl.read_jsonl_log(run.history)
        data = files.read_json(run.data) if run.data.exists() else {}
    except (OSError, ValueError):
        return None
    same = all(_field(other, key) == _field(own, key) for key in _COMPARED)
    trainings = [event for event in events if event["event"] == "training" and "rows" in event]
    if not same or not trainings:
        return None
    paces = [line["seconds"] for line in jsonl.read_jsonl_log(run.metrics) if "loss" in line and "seconds" in line]
    if not paces:
        return None
    starts = [event for event in events if event["event"] == "start"]
    startup = trainings[0]["time"] - starts[0].get("allocated", starts[0]["time"]) if starts else 0.0
    same_data = _field(other, "data.root") == _field(own, "data.root")
    epoch = data.get("splits", {}).get("train", {}).get("rows", 0) if same_data else 0
    return trainings[-1]["rows"] / statistics.median(paces), startup, epoch


_COMPARED = (
    *("task", "model.family", "model.base", "model.quantization", "adapter.method", "data.source"),
    *("job.gpus", "job.nodes", "job.gpu_type"),
)
"""Fields that two runs share if one's speed tells the other's."""


def _field(config: dict[str, Any], key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _rows(config: Config, epochs: Sequence[int]) -> float:
    """Return the rows that a config trains on; 0 if unknown."""
    steps = config.training.get("max_steps", -1)
    if isinstance(steps, int) and steps > 0:
        return float(steps * config.effective_batch_size)
    known = [rows for rows in epochs if rows]
    return known[0] * float(config.training.get("num_train_epochs", 3)) if known else 0.0


def _runs(number: int) -> str:
    return "1 finished run" if number == 1 else f"{number} finished runs"


def describe_forecast(experiments: Sequence[Experiment], path: Path, site: Site, limit: float) -> str:
    """Return what `submit` says about the hours of runs.

    Args:
        path: the config.
        limit: job.time in seconds.
    """
    if known := forecast(experiments[0], site):
        return known.describe(limit, len(experiments))
    gpu = "--gres=gpu:1 " if experiments[0].config.job.gpus else ""
    measure = f"sbatch {gpu}jobs/ftlib.sbatch plan {path} --time"
    return f"hours: unknown, since no finished run is like this one. In a job, this measures them: {measure}"
