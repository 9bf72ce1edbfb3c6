"""Executors: submit to Slurm as submitit arrays, to background processes on this machine, or run in this process.

Only the name of a function of this package and strings are pickled, because the Python versions of login node and
container differ. In a Slurm job, jobs/run.sh calls submitit once for each command, in the container, and handles its
exit code.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ftlib
from ftlib import run_module
from ftlib.core import jsonl, log
from ftlib.core.environment import process_start
from ftlib.core.gpu import usable_gpus
from ftlib.core.text import one_line_error, option_error, raise_error
from ftlib.core.wait import wait_until
from ftlib.errors import EXIT_FAILURE, EXIT_REQUEUE, EXIT_USER, UserError
from ftlib.run_module import module_command
from ftlib.runs.pinning import require_unchanged
from ftlib.runs.run import Run
from ftlib.slurm.client import clean_environment
from ftlib.slurm.jobspec import JobSpec

if TYPE_CHECKING:
    from submitit.slurm.slurm import SlurmExecutor


_YEAR_MINUTES = 365 * 24 * 60
_RUN_MODULE = '"$root/ftlib/run_module.py"'
"""Path in the snapshot, as used by jobs/run.sh; submitit appends `-u -m …`."""


@dataclass(frozen=True)
class Submission:
    """Runs that are submitted together.

    Attributes:
        spec: the job of every run.
        tasks: the commands of each run.
        stages: names of commands, in the order of `tasks`; commands of a stage share a job.
        last: a command that runs when all runs have ended, successful or not.
        folder: folder of submitit's files and the jobs' output.
        setup: shell lines at the start of a Slurm job.
        array_size: maximum number of elements of an array.
    """

    spec: JobSpec
    tasks: Sequence[Commands]
    stages: Sequence[Sequence[str]]
    last: Sequence[str] | None
    folder: Path
    setup: Sequence[str]
    array_size: int


@dataclass(frozen=True)
class JobArray:
    """One call of sbatch."""

    spec: JobSpec
    tasks: Sequence[Commands]
    stage: Sequence[str]
    dependency: str | None


SubmitFunction = Callable[[Submission, JobArray], list[str]]
OnSubmitted = Callable[[Sequence[int], Sequence[str]], None]
"""Called after each submission with the indices of the tasks (empty for `last`) and the job IDs."""


def run_stage_command(commands: Commands) -> None:
    """In a Slurm job: exec the command that jobs/run.sh selects (FTLIB_STEP).

    Raises:
        SystemExit: with 2 if the job's snapshot has changed.
    """
    try:
        require_unchanged(Path(ftlib.__file__).parents[1])
    except UserError as error:
        print(f"ftlib: {error}", file=sys.stderr)
        raise SystemExit(EXIT_USER) from None
    wanted = os.environ["FTLIB_STEP"]
    arguments = next(command for command in commands if command[0] == wanted)
    os.execv(sys.executable, module_command("ftlib", *arguments))


def submit_to_slurm(submission: Submission, on_submitted: OnSubmitted) -> None:
    """Submit arrays with submitit.

    Raises:
        UserError: there is no Slurm, or it rejects a job; earlier ones stay submitted.
    """
    _submit_arrays(submission, _sbatch, on_submitted)


def render_scripts(submission: Submission) -> list[tuple[str, JobArray]]:
    """Return what `submit_to_slurm` would submit: batch scripts, as submitit renders them, and their arrays."""
    found: list[tuple[str, JobArray]] = []

    def render(submission: Submission, array: JobArray) -> list[str]:
        name = f"ARRAY{len(found) + 1}"
        found.append((_script(submission, array), array))
        return [f"{name}_{index}" for index in range(len(array.tasks))] if len(array.tasks) > 1 else [name]

    _submit_arrays(submission, render, lambda numbers, ids: None)
    return found


def _submit_arrays(submission: Submission, submit: SubmitFunction, on_submitted: OnSubmitted) -> None:
    """Submit the arrays. An evaluation depends only on its own training (aftercorr), so a failed run blocks no other.

    An array depends on the previous one if that is full, so that `array_parallelism` applies to all of them.
    """
    masters: list[str] = []
    for start in range(0, len(submission.tasks), submission.array_size):
        tasks = submission.tasks[start : start + submission.array_size]
        waits = masters and submission.spec.array_parallelism < submission.array_size
        own = [submission.spec.dependency] if submission.spec.dependency else []
        dependency = ",".join([*own, *([f"afterany:{masters[-1]}"] if waits else [])]) or None
        for stage in submission.stages:
            ids = submit(submission, JobArray(submission.spec, tasks, stage, dependency))
            on_submitted(range(start, start + len(tasks)), ids)
            masters.append(ids[0].partition("_")[0])
            dependency = f"{'aftercorr' if len(tasks) > 1 else 'afterok'}:{masters[-1]}"
    if submission.last:
        spec = replace(submission.spec, name=f"{submission.spec.name}-{submission.last[0]}", gpus=0, nodes=1,
                       gres=(), mem_per_gpu=None)  # fmt: skip
        after = f"afterany:{':'.join(masters)}" if masters else None
        on_submitted((), submit(submission, JobArray(spec, [[submission.last]], submission.last[:1], after)))


def _configure_executor(executor: SlurmExecutor, submission: Submission, array: JobArray) -> SlurmExecutor:
    raise_error("the folder of the jobs' output", option_error(str(submission.folder)))
    executor.python = f"run_submitted {'+'.join(array.stage)} python3 {_RUN_MODULE}"
    executor.update_parameters(**array.spec.parameters(submission.setup, array.dependency))
    return executor


def _script(submission: Submission, array: JobArray) -> str:
    from submitit.slurm.slurm import SlurmExecutor

    class Renderer(SlurmExecutor):
        """A SlurmExecutor that works without Slurm."""

        @classmethod
        def affinity(cls) -> int:
            return 2

    executor = _configure_executor(Renderer(submission.folder), submission, array)
    if len(array.tasks) > 1:
        executor.parameters["map_count"] = len(array.tasks)
    return executor._make_submission_file_text(executor._submitit_command_str, "")


def _sbatch(submission: Submission, array: JobArray) -> list[str]:
    from submitit.core.utils import FailedJobError, FailedSubmissionError
    from submitit.slurm.slurm import SlurmExecutor

    try:
        executor = _configure_executor(SlurmExecutor(submission.folder), submission, array)
    except RuntimeError:
        raise UserError("Slurm is not in PATH", "Use --executor local on a machine without Slurm.") from None
    try:
        with _clean_environment(array.spec):
            jobs = executor.map_array(run_stage_command, array.tasks)
    except (FailedJobError, FailedSubmissionError) as error:
        raise UserError(f"sbatch rejects this job: {str(error).strip()}") from None
    return [str(job.job_id) for job in jobs]


@contextlib.contextmanager
def _clean_environment(spec: JobSpec) -> Iterator[None]:
    kept = dict(os.environ)
    os.environ.clear()
    os.environ.update(clean_environment(kept))
    if spec.export is not None:
        os.environ["SBATCH_EXPORT"] = spec.export
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(kept)


def submit_locally(submission: Submission, on_submitted: OnSubmitted) -> None:
    """Start `array_parallelism` background processes that share the runs and the GPUs.

    A job's ID is the process ID.
    """
    from submitit.local.local import LocalExecutor

    if submission.spec.dependency:
        log.warning(f"job.dependency: {submission.spec.dependency} applies to Slurm only")
    pool, each, here = usable_gpus(), submission.spec.gpus, str(Path.cwd())
    lanes = min(submission.spec.array_parallelism, len(submission.tasks), _local_workers(submission.spec, pool))

    def start(tasks: Sequence[Commands], after: Sequence[str], gpus: Sequence[str]) -> str:
        executor = LocalExecutor(submission.folder, python=f"{shlex.join([sys.executable, '-u', run_module.__file__])}")
        executor.update_parameters(timeout_min=_YEAR_MINUTES, stderr_to_stdout=True)
        with _detached_output(), _in_root_folder():
            return str(executor.submit(run_worker, tasks, after, gpus, here).job_id)

    jobs: list[str] = []
    for lane in range(lanes):
        numbers = range(lane, len(submission.tasks), lanes)
        jobs.append(start([submission.tasks[number] for number in numbers], [], pool[lane * each : (lane + 1) * each]))
        on_submitted(numbers, jobs[-1:] * len(numbers))
    if submission.last:
        on_submitted((), [start([[submission.last]], jobs, [])])


@contextlib.contextmanager
def _detached_output() -> Iterator[None]:
    """Context in which new processes do not inherit the output, so that $(ftlib submit …) does not wait for them."""
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


@contextlib.contextmanager
def _in_root_folder() -> Iterator[None]:
    """Context with `/` as working directory: submitit runs `python -m …`, which imports from the working directory, and
    only root can write to `/`.
    """
    here = Path.cwd()
    os.chdir("/")
    try:
        yield
    finally:
        os.chdir(here)


def _local_workers(spec: JobSpec, gpus: Sequence[str]) -> int:
    """Return how many runs fit on this machine: by its GPUs, or without GPUs by the usable CPUs."""
    if gpus and spec.gpus:
        return max(1, len(gpus) // spec.gpus)
    return max(1, len(os.sched_getaffinity(0)) // spec.cpus)


def run_in_process(submission: Submission, on_submitted: OnSubmitted) -> None:
    """Run everything in this process, sequentially.

    Raises:
        SystemExit: see `run_worker`.
    """
    from submitit.local.debug import DebugExecutor

    last = [[submission.last]] if submission.last else []
    job = DebugExecutor(submission.folder).submit(run_worker, [*submission.tasks, *last])
    job.result()
    on_submitted(range(len(submission.tasks)), [str(job.job_id)] * len(submission.tasks))


EXECUTORS: dict[str, Callable[[Submission, OnSubmitted], None]] = {
    "slurm": submit_to_slurm,
    "local": submit_locally,
    "debug": run_in_process,
}


def setup_lines(code: Path, frozen: dict[str, str]) -> list[str]:
    """Return the first lines of a Slurm job, as in jobs/*.sbatch: traps, frozen settings, jobs/run.sh.

    Args:
        code: the snapshot.
        frozen: settings of this job, independent of later changes of jobs/site.env.

    Raises:
        UserError: a setting has several lines.
    """
    for name, value in {**frozen, "the folder of the code": str(code)}.items():
        raise_error(name, one_line_error(value))
    return [
        "usr1=0 term=0",
        "trap 'usr1=1' USR1",
        "trap 'term=1' TERM",
        *(f"export {name}={shlex.quote(value)}" for name, value in sorted(frozen.items())),
        f"FTLIB_JOBS={shlex.quote(str(code / 'jobs'))}",
        'source "$FTLIB_JOBS/run.sh" || exit 2',
    ]


# A local worker: runs its share of a submission sequentially.

Commands = Sequence[Sequence[str]]
"""ftlib command lines, each as COMMAND ARGUMENTS…"""

_POLL_SECONDS = 1


def run_worker(
    tasks: Sequence[Commands], after: Sequence[str] = (), gpus: Sequence[str] | None = None, folder: str = "."
) -> None:
    """Run several tasks sequentially; a failed or cancelled task does not stop the others.

    Args:
        after: IDs of processes to wait for.
        gpus: GPUs as in CUDA_VISIBLE_DEVICES; None does not change it.
        folder: working directory of the commands.

    Raises:
        SystemExit: 75 if this process was asked to stop; 1 at the end if a command failed.
    """
    log.configure()
    os.chdir(folder)
    if gpus is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    wait_until(lambda: not any(process_start(int(process)) for process in after), _POLL_SECONDS)
    codes = [_run_task(commands) for commands in tasks]
    if any(codes):
        raise SystemExit(EXIT_FAILURE)


def _run_task(commands: Commands) -> int:
    """Return the exit code of the first failed command, or 0."""
    for command in commands:
        if _was_cancelled(command[-1]):
            log.warning(f"{' '.join(command)}: cancelled")
            return 0
        if code := _run(command):
            return code
    return 0


def _was_cancelled(config_file: str) -> bool:
    """Whether a run was cancelled or submitted again after its submission to this process."""
    process = os.environ.get("SUBMITIT_LOCAL_JOB_ID")
    events = jsonl.read_jsonl_log(Run(Path(config_file).parent).history)
    turns = [event for event in events if event["event"] in ("submitted", "cancelled")]
    ours = [event["event"] == "submitted" and event["job"] == process for event in turns]
    return any(ours) and not ours[-1]


def _run(arguments: Sequence[str]) -> int:
    told: list[int] = []
    with subprocess.Popen(module_command("ftlib", *arguments)) as child:

        def forward_signal(number: int, frame: Any) -> None:
            told.append(number)
            child.send_signal(number)

        before = signal.signal(signal.SIGTERM, forward_signal)
        code = child.wait()
        signal.signal(signal.SIGTERM, before)
    if told:
        raise SystemExit(EXIT_REQUEUE)
    return code
