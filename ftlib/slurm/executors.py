"""Executors: submit to Slurm as submitit arrays, to background processes on this machine, or run in this process.

Only the name of a function of this package and strings are pickled, because the Python versions of login node and
container differ. In a Slurm job, jobs/run.sh calls submitit once for each command, in the container, and handles its
exit code.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ftlib
from ftlib import run_module
from ftlib.core import files, jsonl, log
from ftlib.core.environment import process_start
from ftlib.core.gpu import usable_gpus
from ftlib.core.paths import Site
from ftlib.core.text import one_line_error, option_error, raise_error
from ftlib.core.wait import wait_until
from ftlib.errors import EXIT_FAILURE, EXIT_REQUEUE, EXIT_USER, UserError
from ftlib.run_module import module_command
from ftlib.runs.pinning import require_unchanged
from ftlib.runs.run import Run
from ftlib.slurm import intents
from ftlib.slurm.client import Slurm, SlurmUnavailable, clean_environment, is_away
from ftlib.slurm.jobspec import JobSpec

if TYPE_CHECKING:
    from submitit.slurm.slurm import SlurmExecutor


_YEAR_MINUTES = 365 * 24 * 60
_SBATCH_SECONDS = 300
"""sbatch itself tries again for some minutes while the controller is busy or away."""

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
    """One call of sbatch.

    Attributes:
        numbers: indices of the tasks in the submission; empty for `last`.
    """

    spec: JobSpec
    tasks: Sequence[Commands]
    stage: Sequence[str]
    dependency: str | None
    numbers: Sequence[int]


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


def submit_to_slurm(submission: Submission, runs: Sequence[Run], site: Site) -> list[str]:
    """Submit arrays whose elements submitit runs, and record the jobs in the histories of the runs.

    Returns:
        The job IDs; an array has a single one.

    Raises:
        UserError: there is no Slurm, it rejects a job, or its answer is lost; earlier jobs stay submitted.
    """
    masters: list[str] = []
    before: list[str | None] = [None] * len(runs)

    def send(submission: Submission, array: JobArray) -> list[str]:
        own = [runs[number] for number in array.numbers]
        after = [before[number] for number in array.numbers]
        name, report = array.spec.name, not array.numbers
        intent = intents.new_intent(site, name, submission.folder, own or runs, after, report)
        job = _sbatch(submission, array, intent)
        masters.append(job)
        intents.confirm(intent, job)
        return intent.job_ids(job)

    def note(numbers: Sequence[int], jobs: Sequence[str]) -> None:
        for number, job in zip(numbers, jobs, strict=False):
            before[number] = job

    try:
        _submit_arrays(submission, send, note)
    except BaseException:
        if masters:
            log.warning(f"submitted before the error: slurm job {', '.join(masters)}")
        raise
    return masters


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

    `array_parallelism` applies to all arrays together: as many full ones as fit into it run at the same time, and each
    further one depends on the one that began that many arrays before.
    """
    masters: list[str] = []
    lasts: list[str] = []
    at_once = max(1, submission.spec.array_parallelism // submission.array_size)
    for start in range(0, len(submission.tasks), submission.array_size):
        tasks = submission.tasks[start : start + submission.array_size]
        numbers = range(start, start + len(tasks))
        own = [submission.spec.dependency] if submission.spec.dependency else []
        earlier = [f"afterany:{lasts[-at_once]}"] if len(lasts) >= at_once else []
        dependency = ",".join([*own, *earlier]) or None
        for stage in submission.stages:
            ids = submit(submission, JobArray(submission.spec, tasks, stage, dependency, numbers))
            on_submitted(numbers, ids)
            masters.append(ids[0].partition("_")[0])
            dependency = f"{'aftercorr' if len(tasks) > 1 else 'afterok'}:{masters[-1]}"
        lasts.append(masters[-1])
    if submission.last:
        spec = replace(submission.spec, name=f"{submission.spec.name}-{submission.last[0]}", gpus=0, nodes=1,
                       gres=(), mem_per_gpu=None)  # fmt: skip
        after = f"afterany:{':'.join(masters)}" if masters else None
        on_submitted((), submit(submission, JobArray(spec, [[submission.last]], submission.last[:1], after, ())))


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


def _sbatch(submission: Submission, array: JobArray, intent: intents.Intent) -> str:
    """Call sbatch and return the job's ID. What the job reads is written before, and the intent last.

    Raises:
        UserError: Slurm rejects the job, its answer is lost, or there is no space.
    """
    from submitit.core.utils import DelayedSubmission

    try:
        with files.storage_errors(submission.folder):
            for index, commands in enumerate(array.tasks):
                command = DelayedSubmission(run_stage_command, commands)
                command.set_timeout(array.spec.minutes, 0)
                command.dump(intent.pickle(index))
            named = replace(array, spec=replace(array.spec, name=intent.name))
            files.write_text(intent.script, _script(submission, named))
        intents.write_intent(intent)
        done = _run_sbatch(intent.script, array.spec)
    except UserError:
        intents.withdraw(intent)
        raise
    answer = (done.stderr.strip() or done.stdout.strip()) if done else f"no answer within {_SBATCH_SECONDS} s"
    if done and (found := re.search(r"Submitted batch job (\d+)", done.stdout)):  # a site's own sbatch may fail later
        return found[1]
    if done and done.returncode > 0 and not is_away(answer):
        intents.withdraw(intent)
        remedy = "Change the config's job: section, or SBATCH_ACCOUNT, SBATCH_PARTITION and the like in jobs/site.env."
        raise UserError(f"sbatch rejects this job: {answer}", remedy)
    log.warning(f"sbatch's answer is lost ({answer}); looking for the job {intent.name}")
    try:
        job = intents.look_up([intent], Slurm()).get(intent.name)
    except SlurmUnavailable as error:
        remedy = "When Slurm responds, run the same command again: it looks for this job first, and sends it only once."
        raise UserError(f"whether Slurm has the job {intent.name} is not known: {error}", remedy) from None
    if job is None:
        intents.withdraw(intent)
        problem = f"sbatch: {answer}; Slurm does not have the job"
        raise UserError(problem, "Nothing was sent. Run the same command again when Slurm responds.")
    return job


def _run_sbatch(script: Path, spec: JobSpec) -> subprocess.CompletedProcess[str] | None:
    """Run sbatch; None if it does not end in time.

    Raises:
        UserError: it is not there.
    """
    environment = clean_environment(os.environ)
    if spec.export is not None:
        environment["SBATCH_EXPORT"] = spec.export
    command = ["sbatch", str(script)]
    try:
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_SBATCH_SECONDS)
    except subprocess.TimeoutExpired:
        return None
    except FileNotFoundError:
        raise UserError("sbatch is not in PATH", SlurmUnavailable("", installed=False).remedy) from None


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
            _record_kill(command, code)
            return code
    return 0


def _record_kill(command: Sequence[str], code: int) -> None:
    """Record that a process died of a signal, as jobs/run.sh does in a Slurm job: it could not do so itself."""
    run = Run(Path(command[-1]).parent)
    if code < 0 and command[0] in ("train", "evaluate") and run.history.exists():
        reason = f"killed: {signal.Signals(-code).name}"
        run.log_event("lost", command=command[0], ended=round(time.time(), 3), reason=reason)


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
