"""Hand a plan to Slurm as submitit arrays, to processes of this machine, or to this process.

What is pickled is the name of a function of this package and strings, since the Pythons of login node and container
differ. In a Slurm job jobs/run.sh calls submitit once for each command, in the container, and answers its exit code.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ftlib.errors import UserError
from ftlib.submission.jobspec import JobSpec
from ftlib.submission.lanes import Commands, run_lane
from ftlib.submission.slurm import scrubbed

if TYPE_CHECKING:
    from submitit.slurm.slurm import SlurmExecutor

_YEAR_MINUTES = 365 * 24 * 60


@dataclass(frozen=True)
class Plan:
    """What is submitted together.

    Attributes:
        spec: the job of every run.
        tasks: for each run its commands.
        stages: names of commands, in the order of `tasks`; what stands in one stage shares a job.
        last: a command for when all runs have ended, however they did.
        folder: submitit's files and the jobs' output.
        setup: shell lines that begin a Slurm job.
        array_size: how many elements an array may have.
    """

    spec: JobSpec
    tasks: Sequence[Commands]
    stages: Sequence[Sequence[str]]
    last: Sequence[str] | None
    folder: Path
    setup: Sequence[str]
    array_size: int


@dataclass(frozen=True)
class Array:
    """One call of sbatch."""

    spec: JobSpec
    tasks: Sequence[Commands]
    stage: Sequence[str]
    dependency: str | None


Submit = Callable[[Plan, Array], list[str]]
Taken = Callable[[Sequence[int], Sequence[str]], None]
"""Hears at once, for which tasks of a plan (by their indexes; none for its `last`), of the ids of jobs just taken."""


def run_stage_command(commands: Commands) -> None:
    """In a Slurm job: become the command that jobs/run.sh asks for (FTLIB_STEP)."""
    wanted = os.environ["FTLIB_STEP"]
    arguments = next(command for command in commands if command[0] == wanted)
    os.execv(sys.executable, [sys.executable, "-m", "ftlib", *arguments])


def to_slurm(plan: Plan, taken: Taken) -> None:
    """Submit arrays through submitit.

    Raises:
        UserError: this machine has no Slurm, or it refuses a job; those before it stay submitted.
    """
    _submit_arrays(plan, _sbatch, taken)


def scripts(plan: Plan) -> list[tuple[str, Array]]:
    """What `to_slurm` would submit: the batch scripts, as submitit renders them, and their arrays."""
    found: list[tuple[str, Array]] = []

    def render(plan: Plan, array: Array) -> list[str]:
        name = f"ARRAY{len(found) + 1}"
        found.append((_script(plan, array), array))
        return [f"{name}_{index}" for index in range(len(array.tasks))] if len(array.tasks) > 1 else [name]

    _submit_arrays(plan, render, lambda numbers, ids: None)
    return found


def _submit_arrays(plan: Plan, submit: Submit, taken: Taken) -> None:
    """An evaluation waits for its own training only (aftercorr), so that one failed run holds up no other.

    An array waits for the one before it if that is full: `array_parallelism` holds for all of them together.
    """
    masters: list[str] = []
    for start in range(0, len(plan.tasks), plan.array_size):
        tasks = plan.tasks[start : start + plan.array_size]
        waits = masters and plan.spec.array_parallelism < plan.array_size
        dependency = f"afterany:{masters[-1]}" if waits else None
        for stage in plan.stages:
            ids = submit(plan, Array(plan.spec, tasks, stage, dependency))
            taken(range(start, start + len(tasks)), ids)
            masters.append(ids[0].partition("_")[0])
            dependency = f"{'aftercorr' if len(tasks) > 1 else 'afterok'}:{masters[-1]}"
    if plan.last:
        spec = replace(plan.spec, name=f"{plan.spec.name}-{plan.last[0]}", gpus=0, nodes=1)
        after = f"afterany:{':'.join(masters)}" if masters else None
        taken((), submit(plan, Array(spec, [[plan.last]], plan.last[:1], after)))


def _prepared(executor: SlurmExecutor, plan: Plan, array: Array) -> SlurmExecutor:
    executor.python = f"run_submitted {'+'.join(array.stage)} python3"
    executor.update_parameters(**array.spec.parameters(plan.setup, array.dependency))
    return executor


def _script(plan: Plan, array: Array) -> str:
    from submitit.slurm.slurm import SlurmExecutor

    class Renderer(SlurmExecutor):
        """Needs no Slurm here."""

        @classmethod
        def affinity(cls) -> int:
            return 2

    executor = _prepared(Renderer(plan.folder), plan, array)
    if len(array.tasks) > 1:
        executor.parameters["map_count"] = len(array.tasks)
    return executor._make_submission_file_text(executor._submitit_command_str, "")


def _sbatch(plan: Plan, array: Array) -> list[str]:
    from submitit.core.utils import FailedJobError, FailedSubmissionError
    from submitit.slurm.slurm import SlurmExecutor

    try:
        executor = _prepared(SlurmExecutor(plan.folder), plan, array)
    except RuntimeError:
        raise UserError("Slurm is not in PATH", "Use --executor local on a machine without Slurm.") from None
    try:
        with _scrubbed_environment(array.spec):
            jobs = executor.map_array(run_stage_command, array.tasks)
    except (FailedJobError, FailedSubmissionError) as error:
        raise UserError(f"sbatch refuses this job: {str(error).strip()}") from None
    return [str(job.job_id) for job in jobs]


@contextlib.contextmanager
def _scrubbed_environment(spec: JobSpec) -> Iterator[None]:
    kept = dict(os.environ)
    os.environ.clear()
    os.environ.update(scrubbed(kept))
    if spec.export is not None:
        os.environ["SBATCH_EXPORT"] = spec.export
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(kept)


def to_this_machine(plan: Plan, taken: Taken) -> None:
    """Start `array_parallelism` processes in the background that share the runs out among them, and their GPUs.

    A job's id is the number of its process.
    """
    from submitit.local.local import LocalExecutor

    pool, each = _gpus_here(), plan.spec.gpus
    lanes = min(plan.spec.array_parallelism, len(plan.tasks), _lanes_here(plan.spec, pool))

    def start(tasks: Sequence[Commands], after: Sequence[str], gpus: Sequence[str]) -> str:
        executor = LocalExecutor(plan.folder)
        executor.update_parameters(timeout_min=_YEAR_MINUTES, stderr_to_stdout=True)
        with _silence():
            return str(executor.submit(run_lane, tasks, after, gpus).job_id)

    jobs: list[str] = []
    for lane in range(lanes):
        numbers = range(lane, len(plan.tasks), lanes)
        jobs.append(start([plan.tasks[number] for number in numbers], [], pool[lane * each : (lane + 1) * each]))
        taken(numbers, jobs[-1:] * len(numbers))
    if plan.last:
        taken((), [start([[plan.last]], jobs, [])])


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """What is started inside does not hold our output open: $(ftlib submit …) would wait for its end."""
    sys.stdout.flush()
    kept = {stream: os.dup(stream) for stream in (1, 2)}
    with Path(os.devnull).open("w") as nowhere:
        for stream in kept:
            os.dup2(nowhere.fileno(), stream)
    try:
        yield
    finally:
        for stream, before in kept.items():
            os.dup2(before, stream)
            os.close(before)


def _gpus_here() -> list[str]:
    """The GPUs that are ours to use, as CUDA_VISIBLE_DEVICES names them; without it, all of this machine."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [gpu.strip() for gpu in named.split(",") if gpu.strip()]
    return [str(number) for number in range(len(list(Path("/dev").glob("nvidia[0-9]*"))))]


def _lanes_here(spec: JobSpec, gpus: Sequence[str]) -> int:
    """How many runs fit on this machine at once: by its GPUs, or without any by the processors that we may use."""
    if gpus and spec.gpus:
        return max(1, len(gpus) // spec.gpus)
    return max(1, len(os.sched_getaffinity(0)) // spec.cpus)


def to_this_process(plan: Plan, taken: Taken) -> None:
    """Run everything here, one after the other, before returning.

    Raises:
        SystemExit: see `run_lane`.
    """
    from submitit.local.debug import DebugExecutor

    last = [[plan.last]] if plan.last else []
    job = DebugExecutor(plan.folder).submit(run_lane, [*plan.tasks, *last])
    job.result()
    taken(range(len(plan.tasks)), [str(job.job_id)] * len(plan.tasks))


EXECUTORS: dict[str, Callable[[Plan, Taken], None]] = {
    "slurm": to_slurm,
    "local": to_this_machine,
    "debug": to_this_process,
}


def setup_lines(code: Path, frozen: dict[str, str]) -> list[str]:
    """What begins a Slurm job, as in jobs/*.sbatch: traps at once, the frozen settings, the wrapper.

    Args:
        code: the snapshot.
        frozen: settings that hold for this job whatever becomes of jobs/site.env.
    """
    return [
        "usr1=0 term=0",
        "trap 'usr1=1' USR1",
        "trap 'term=1' TERM",
        *(f"export {name}={shlex.quote(value)}" for name, value in sorted(frozen.items())),
        f"FTLIB_JOBS={shlex.quote(str(code / 'jobs'))}",
        'source "$FTLIB_JOBS/run.sh" || exit 2',
    ]
