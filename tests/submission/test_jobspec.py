"""Time limits and submitit parameters."""

from collections.abc import Callable
from pathlib import Path

import pytest

from ftlib.config_file import load_experiment
from ftlib.site import Site
from ftlib.submission.jobspec import JobSpec, minutes_of


@pytest.mark.parametrize(
    ("time", "minutes"),
    [("90", 90), ("5:30", 6), ("08:00:00", 480), ("0:00:01", 1), ("1-0", 1440), ("2-3:30", 3090), ("1-00:00:30", 1441)],
)
def test_slurms_time_notation(time: str, minutes: int) -> None:
    assert minutes_of(time) == minutes


def test_parameters(write_config: Callable[..., Path]) -> None:
    site = Site(Path("/s"), Path("/r"))
    config = load_experiment(write_config(), ["job.gpus=2", "job.mem=48G", "job.time=1-12"], site, {}).config
    options = "--job-name=tiny --ntasks-per-node=2 --cpus-per-task=4 --mem=48G --time=2160 --gres=gpu:2"
    assert JobSpec.of(config).sbatch_options() == options.split()
