"""From `job:` and site settings to what submitit renders, against golden batch scripts."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest

from ftlib.config.identity import ORIGINAL_KEYS, canonical_fields
from ftlib.config.loader import load_experiment
from ftlib.config.schema import Config, SbatchOption
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
        ("per-gpu", "job.gpus=a100:2\njob.nodes=2\njob.mem_per_gpu=32GB\njob.gres=lscratch:200,nvme:1\njob.signal=300\n"
                    "job.dependency=afterok:7\njob.time=90\njob.array_parallelism=2",
         {"FTLIB_GPU_OPTION": "gpus"}, 4, True),
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
    with pytest.raises(UserError, match="FTLIB_GPU_OPTION=tres: must be one of gres, gpus-per-node, gpus"):
        JobSpec.of(config(), {"FTLIB_GPU_OPTION": "tres"})
    for override, words in [
        ("job.sbatch={output: x}", "job.sbatch.output"),
        ("job.sbatch={array: 1-3}", "job.sbatch.array"),
        ("job.sbatch={clusters: other}", "job.sbatch.clusters"),
        ("job.sbatch={exclusive: false}", "job.sbatch.exclusive"),
        ("job.partition=a b", "job.partition"),
        ("job.nodes=0", "job.nodes"),
        ("job.time=1.5", "job.time"),
        ("job.mem=-1", "job.mem"),
        ("job.mem=true", "job.mem"),
        ("job.gpus=a100", "job.gpus"),
        ("job.signal=5", "job.signal"),
        ("job.dependency=afterok:7?afterany:8", "job.dependency: must be as for sbatch"),
        ("job.gres=[lscratch:1 2]", "job.gres.0"),
        ('job.gres=["a\\nb"]', "job.gres.0"),
    ]:
        with pytest.raises(UserError) as caught:
            config(override)
        assert f"command line: {words}" in caught.value.problem
    for overrides, told in [
        (("job.mem=16G", "job.mem_per_cpu=4G"), "mem and mem_per_cpu exclude each other"),
        (("job.mem_per_gpu=4G", "job.gpus=0"), "mem_per_gpu requires gpus"),
        (("job.gpus=2", "job.gpu_type=nvidia_a100_1g.10gb"), "a process sees one MIG slice"),
        (("job.gpus=1g.10gb:2",), "a process sees one MIG slice"),
        (("job.gpus=a100:2", "job.gpu_type=h100"), "contradict each other"),
        (("job.gres=gpu:2",), "GPUs are requested with gpus"),
    ]:
        with pytest.raises(UserError, match=told):
            config(*overrides)


OURS = ("array", "output", "error", "signal", "open-mode", "export", "wrap", "chdir", "requeue")


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        *((name, "ftlib sets this option itself") for name in OURS),
        ("gpus-per-task", "device 0, and NCCL could not use peer-to-peer"),
        ("gpu-bind", "ftlib sets it to none"),
        ("mem-per-cpu", "set job.mem_per_cpu"),
        ("gpus-per-node", "set job.gpus"),
    ],
)
def test_options_of_sbatch_that_are_refused(config: Callable[..., Config], option: str, reason: str) -> None:
    with pytest.raises(UserError) as caught:
        config(f"job.sbatch={{{option}: 1}}")
    assert f"command line: job.sbatch.{option}: " in caught.value.problem and reason in caught.value.problem
    assert option not in get_args(SbatchOption)


@pytest.mark.parametrize(
    ("overrides", "memory"),
    [
        ((), {"mem": "16G"}),
        (("job.mem=0",), {"mem": "0"}),
        (("job.mem=16000",), {"mem": "16000"}),
        (("job.mem=16GB",), {"mem": "16G"}),
        (("job.mem=16gib",), {"mem": "16G"}),
        (("job.mem=null",), {}),
        (("job.mem_per_cpu=4GB",), {"mem_per_cpu": "4G"}),
        (("job.mem=null", "job.mem_per_gpu=32G", "job.gpus=2"), {"mem_per_gpu": "32G"}),
    ],
)
def test_memory(config: Callable[..., Config], overrides: tuple[str, ...], memory: dict[str, str]) -> None:
    """Of Slurm's three options at most one is set; a saved config says the same when it is read again."""
    read = config(*overrides)
    for each in (read, Config.model_validate(canonical_fields(read))):
        parameters = JobSpec.of(each, {}).parameters([], None)
        assert {name: value for name, value in parameters.items() if name.startswith("mem") and value} == memory


def test_minutes_as_a_number(config: Callable[..., Config]) -> None:
    assert [JobSpec.of(config(f"job.time={time}"), {}).minutes for time in ("90", "2880", '"90"')] == [90, 2880, 90]


def test_no_job_key_names_a_run(config_file: Path) -> None:
    def identity(*overrides: str) -> str:
        return load_experiment(config_file, overrides, Site(Path("/s"), Path("/r")), {}).identity

    new = ("job.mem_per_gpu=32G", "job.gres=[nvme:1]", "job.signal=300", "job.dependency=afterok:7", "job.time=90")
    assert identity("job.gpus=1", *new) == identity("job.gpus=1")
    assert {"mem_per_cpu", "mem_per_gpu", "gres", "signal", "dependency"}.isdisjoint(ORIGINAL_KEYS["Job"])
