"""How long a training step takes on this process's device, measured with model, rows and optimizer of a config.

The steps are those of a run, in a run folder that is deleted: nothing is saved and no checkpoint is written.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ftlib.config.loader import Experiment
from ftlib.core import log
from ftlib.core.gpu import gpu_name
from ftlib.core.paths import Site
from ftlib.runs.forecast import Forecast
from ftlib.runs.run import Run
from ftlib.training.train import collect_steps

_WARM_UP = 2
"""First steps, which are slower: memory is allocated, kernels are chosen."""


@dataclass(frozen=True)
class StepTiming:
    """The speed of training on this device.

    Attributes:
        device: the GPU's name, or "the CPU".
        gpus: of the whole job; the measurement used one device.
        step_seconds: median of the measured steps, each with all rows of the effective batch on this one device.
        step_rows: the effective batch.
        measured: number of steps in the median.
        total_steps: of the whole run; `rounds` that end early are counted in full.
        startup: seconds until the first step began, without the start of the container and of Python.
    """

    device: str
    gpus: int
    step_seconds: float
    step_rows: int
    measured: int
    total_steps: int
    startup: float

    @property
    def rows_per_second(self) -> float:
        """Of this one device."""
        return self.step_rows / self.step_seconds

    @property
    def on_wrong_device(self) -> bool:
        """Whether the job asks for a GPU, and this was measured on the CPU."""
        return bool(self.gpus) and self.device == CPU

    @property
    def forecast(self) -> Forecast:
        """Of the whole run; several GPUs are assumed to be as many times as fast. Measured on the CPU it has none."""
        gpus = 0 if self.on_wrong_device else self.gpus
        seconds = self.total_steps * self.step_seconds / max(1, gpus)
        return Forecast(seconds, self.startup, gpus, f"{self.measured} measured steps on {self.device}")

    def to_json(self) -> dict[str, Any]:
        """Return all numbers; times in seconds."""
        own = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {**own, "rows_per_second": self.rows_per_second, "training_seconds": self.forecast.seconds}


CPU = "the CPU"


def time_steps(experiment: Experiment, site: Site, steps: int) -> StepTiming:
    """Train some steps of a config on this process's device and return their speed.

    Args:
        steps: how many are measured, after two that are not.

    Raises:
        UserError: as for training; the run has no step beyond the first ones.
    """
    config = experiment.config
    far = config.checkpoint.model_copy(update={"steps": 10**9})
    unsaved = replace(experiment, config=config.model_copy(update={"checkpoint": far}))
    with tempfile.TemporaryDirectory(prefix="ftlib-timing-") as folder:
        started = time.monotonic()
        records, per_phase = collect_steps(unsaved, Run(Path(folder) / config.name / "timing"), site, _WARM_UP + steps)
        startup = time.monotonic() - started - sum(record["seconds"] for record in records)
    seconds = [record["seconds"] for record in records]
    kept = seconds[_WARM_UP:] or seconds[1:] or seconds
    if kept is seconds:
        log.warning("the run has a single step, whose time includes what only a first step does")
    return StepTiming(
        device=gpu_name() or CPU,
        gpus=config.job.gpus * config.job.nodes,
        step_seconds=statistics.median(kept),
        step_rows=config.effective_batch_size,
        measured=len(kept),
        total_steps=per_phase * max(1, len(config.rounds)),
        startup=max(0.0, startup),
    )
