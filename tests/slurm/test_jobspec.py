"""From `job:` and site settings to what submitit renders, against golden batch scripts."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from ftlib.config.loader import load_experiment
from ftlib.config.schema import Config
from ftlib.core.paths import Site
from ftlib.errors import UserError
from ftlib.slurm.executors import Submission, render_scripts, setup_lines
from ftlib.slurm.jobspec import JobSpec, minutes_of

GOLDEN = Path(__file__).parent / "golden"
EVERYTHING = (
    "job.gpus=1 job.gpu_type=a100 job.mem=48G job.time=1-12 job.nodes=2 job.partition=long job.account=lab job.qos=high"
    " job.constraint=a100|h100 job.exclude=n[3-5] job.mail_type=END,FAIL job.mail_user=me@example.org"
    " job.array_parallelism=2 job.sbatch={reservation: course, exclusive: true, nice: 100}"
).replace(" job.", "\njob.")


@pytest.fixture
def config(config_file: Path) -> Callable[..., Config]:
    def load(*overrides: str) -> Config:
        return load_experiment(config_file, overrides, Site(Path("/s"), Path("/r")), {}).config

    return load


@pytest.mark.parametrize(
    ("time", "minutes"),
    [("90", 90), ("5:30", 6), ("08:00:00", 480), ("0:00:01", 1), ("1-0", 1440), ("2-3:30", 3090), ("1-00:00:30", 1441)],
)
def test_slurms_time_notation(time: str, minutes: int) -> None:
    assert minutes_of(time) == minutes


def plan(spec: JobSpec, runs: int, evaluation_apart: bool = False) -> Submission:
    names = ("train", "evaluate")
    return Submission(
        spec=spec,
        tasks=[[[name, f"/r/tiny/{number}/config.yaml"] for name in names] for number in range(runs)],
        stages=[names[:1], names[1:]] if evaluation_apart else [names],
        last=["report", "tiny"] if evaluation_apart else None,
        folder=Path("/work here/logs/tiny"),
        setup=setup_lines(Path("/r/.jobs/code-1"), {"FTLIB_STORE": "/shared store", "FTLIB_RUNS": "/r"}),
        array_size=3,
    )


@pytest.mark.parametrize(
    ("name", "overrides", "settings", "runs", "apart"),
    [
        ("one", "", {}, 1, False),
        ("everything", EVERYTHING, {"SBATCH_PARTITION": "short"}, 3, False),
        ("site", "job.gpus=1", {"SBATCH_ACCOUNT": "lab", "SBATCH_EXPORT": "NONE", "SBATCH_EXCLUSIVE": "",
                                "FTLIB_GPU_OPTION": "gpus-per-node", "SBATCH_WCKEY": "x",
                                "SBATCH_CLUSTERS": "other"}, 1, False),
        ("chain", "job.gpus=0\njob.array_parallelism=2", {}, 5, True),
    ],
)  # fmt: skip
def test_golden_scripts(
    config: Callable[..., Config], name: str, overrides: str, settings: dict[str, str], runs: int, apart: bool
) -> None:
    spec = JobSpec.of(config(*overrides.splitlines()), settings)
    found = render_scripts(plan(spec, runs, apart))
    text = "\n".join(script for script, _ in found)
    assert text == (GOLDEN / f"{name}.sh").read_text()
    for script, _ in found:
        assert subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True).stderr == ""


def test_each_array_has_its_own_runs(config: Callable[..., Config]) -> None:
    arrays = [array for _, array in render_scripts(plan(JobSpec.of(config(), {}), 5, True))]
    numbers = [[task[0][1].split("/")[3] for task in array.tasks] for array in arrays[:-1]]
    assert numbers == [["0", "1", "2"]] * 2 + [["3", "4"]] * 2
    assert arrays[-1].tasks == [[["report", "tiny"]]]


def test_mistakes(config: Callable[..., Config]) -> None:
    with pytest.raises(UserError, match="FTLIB_GPU_OPTION=tres: must be one of gres, gpus-per-node"):
        JobSpec.of(config(), {"FTLIB_GPU_OPTION": "tres"})
    for override, words in [
        ("job.sbatch={output: x}", "job.sbatch.output"),
        ("job.sbatch={array: 1-3}", "job.sbatch.array"),
        ("job.sbatch={clusters: other}", "job.sbatch.clusters"),
        ("job.sbatch={exclusive: false}", "job.sbatch.exclusive"),
        ("job.partition=a b", "job.partition"),
        ("job.nodes=0", "job.nodes"),
    ]:
        with pytest.raises(UserError) as caught:
            config(override)
        assert f"command line: {words}" in caught.value.problem
