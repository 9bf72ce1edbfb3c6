"""Submit a config's run, or every run of its sweep: which are missing, what is submitted, which jobs Slurm accepted.

Whether a run is missing is decided in status.py (`submission_states`).
"""

from __future__ import annotations

import contextlib
import importlib.util
import shlex
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ftlib.config.loader import RawConfig
from ftlib.core import files, log, permissions
from ftlib.core.environment import process_start
from ftlib.core.paths import Site, site_settings
from ftlib.errors import UserError
from ftlib.runs import run as runs
from ftlib.runs.forecast import describe_forecast
from ftlib.runs.pinning import find_clone, snapshot_folder, take_snapshot
from ftlib.runs.run import Run
from ftlib.slurm import intents, requirements, status
from ftlib.slurm.client import Slurm, SlurmUnavailable
from ftlib.slurm.executors import (
    Submission,
    render_scripts,
    run_in_process,
    setup_lines,
    submit_locally,
    submit_to_slurm,
)
from ftlib.slurm.gpu_support import require_gpu_support
from ftlib.slurm.jobspec import JobSpec
from ftlib.slurm.pending import pending_remedy
from ftlib.slurm.replace import finish_interrupted, replaced_runs
from ftlib.slurm.sweep import SweepRun, expand_sweep

_FROZEN_SETTINGS = ("FTLIB_BINDS", "FTLIB_TMP", "FTLIB_HOOK", "FTLIB_MAX_REQUEUES", "FTLIB_GROUP", "FTLIB_SHARE_RUNS",
           "FTLIB_OWNER", "FTLIB_IMAGE_SHA256", "FTLIB_RUNTIME", "FTLIB_VENV")  # fmt: skip
_SECONDS_BETWEEN_STATES = 20.0
_PER_RUN_STAGES = ("stage", "prepare", "train", "evaluate")

Executor = Literal["slurm", "local", "debug"]
Stage = Literal["evaluate", "report"]


@dataclass(frozen=True)
class SubmitOptions:
    """How runs are submitted.

    Attributes:
        executor: Slurm, background processes of this machine, or one run after the other in this process.
        then: evaluate in jobs of their own, each when its training is done; report when all have ended.
        retry: also runs that failed; they resume from what is saved.
        replace: delete what there is of these runs and start anew.
        dry_run: submit nothing; only say what would be submitted.
    """

    executor: Executor = "slurm"
    then: Sequence[Stage] = ()
    retry: bool = False
    replace: bool = False
    dry_run: bool = False


@dataclass(frozen=True)
class SubmittedRuns:
    """What was submitted; with `dry_run` what would be.

    Attributes:
        runs: those that were sent; empty if none is missing.
        jobs: ids of the jobs, an array by its own; of executor local, of processes.
        folder: of the jobs' output; None if nothing was sent.
        preview: with `dry_run`, the batch scripts and the commands of every job.
    """

    runs: list[Run] = field(default_factory=list)
    jobs: list[str] = field(default_factory=list)
    folder: Path | None = None
    preview: str = ""


def submit(source: RawConfig, site: Site, options: SubmitOptions) -> SubmittedRuns:
    """Submit the runs of a config that are missing: never started, deleted, cancelled, preempted or
    lost, or trained but not evaluated.

    Raises:
        UserError: a fault in the config; Slurm does not answer or takes no more jobs; a run that is to be replaced is
            at work.
    """
    if options.executor != "slurm" and not options.dry_run and importlib.util.find_spec("torch") is None:
        remedy = "Without a GPU node: jobs/run.sh ftlib submit CONFIG --executor debug runs it in the container."
        raise UserError(
            f"--executor {options.executor}: torch is not installed here, so that nothing can train", remedy
        )
    sweep_runs, slurm = expand_sweep(source, site), Slurm()
    if options.executor == "slurm" and not options.dry_run and shutil.which("sbatch") is None:
        raise UserError("sbatch is not in PATH", SlurmUnavailable("", installed=False).remedy)
    with contextlib.ExitStack() as held:
        if not options.dry_run:
            if options.executor != "debug":  # which holds the runs' own leases, for as long as they train
                held.enter_context(intents.exclusive(site))
            _settle(site, slurm)
            finish_interrupted(site)
        chosen = _select_runs(sweep_runs, site, options, slurm)
        if not chosen:
            return SubmittedRuns()
        submission = _make_submission(chosen, site, options, slurm)
        if options.executor == "slurm":
            experiments = [member.experiment for member in chosen]
            require_gpu_support(experiments[0].config, site_settings(), requirements.image_path(site, site_settings()))
            log.info(describe_forecast(experiments, source.path, site, 60.0 * submission.spec.minutes))
        if options.dry_run:
            found = [runs.run_for(member.experiment, site, options.replace) for member in chosen]
            preview = _preview(submission, chosen, found, site, options.executor)
            return SubmittedRuns(found, [], submission.folder, preview)
        if options.executor == "slurm":
            requirements.require_startable([member.experiment for member in chosen], site, site_settings())
            requirements.check_request(submission.spec, slurm)
        submitted = _submit(submission, chosen, site, options)
    if options.executor == "slurm":
        _report_pending(submitted.jobs, slurm)
    return submitted


def _report_pending(jobs: Sequence[str], slurm: Slurm) -> None:
    """Report reasons for waiting that do not pass by themselves. Slurm knows some only after its next scheduling, of
    which `ftlib status` tells."""
    try:
        reasons = slurm.waiting_reasons(jobs)
    except SlurmUnavailable as error:
        log.debug(f"why the jobs wait is not known: {error}")
        return
    for job, waits in reasons.items():
        for reason in waits:
            if remedy := pending_remedy(reason):
                log.warning(f"job {job} waits for {reason}: {remedy}")


def _settle(site: Site, slurm: Slurm) -> None:
    """Find out what became of interrupted submissions.

    Raises:
        UserError: Slurm does not answer.
    """
    try:
        intents.settle(site, slurm)
    except SlurmUnavailable as error:
        raise UserError(f"cannot check an interrupted submission: {error}", error.remedy) from None


def _select_runs(sweep_runs: Sequence[SweepRun], site: Site, options: SubmitOptions, slurm: Slurm) -> list[SweepRun]:
    """Return the runs to submit; reports the states of all."""
    if not options.replace:
        for notice in filter(None, (runs.recipe_notice(member.experiment, site) for member in sweep_runs)):
            log.warning(notice)
    folders = [runs.run_for(member.experiment, site) for member in sweep_runs]
    pairs = [(run, member.experiment.config) for run, member in zip(folders, sweep_runs, strict=True)]
    try:
        states = status.submission_states(pairs, site, lambda ids: slurm.jobs(ids, own=True))
        spec = JobSpec.of(sweep_runs[0].experiment.config, site_settings())
        asked = options.executor == "slurm" and not options.dry_run
        room = slurm.remaining_submit_quota(spec.account, spec.partition, spec.qos) if asked else None
    except SlurmUnavailable as error:
        raise UserError(f"cannot check earlier jobs: {error}", error.remedy) from None
    wanted = [status.MISSING, *([status.FAILED] if options.retry or options.replace else [])]
    wanted += [status.FINISHED] if options.replace else []
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    log.info(f"{len(sweep_runs)} {'run' if len(sweep_runs) == 1 else 'runs'}: {counts}")
    if status.FAILED in states and status.FAILED not in wanted:
        log.warning("failed runs are skipped; --retry resumes them, --replace starts them again")
    if options.replace and status.ACTIVE in states:
        raise UserError("some of these runs are queued or running, and cannot be replaced", "Cancel them first.")
    chosen = [member for member, state in zip(sweep_runs, states, strict=True) if state in wanted]
    return _within_quota(chosen, room, 1 + ("evaluate" in options.then), "report" in options.then)


def _within_quota(chosen: list[SweepRun], quota: int | None, each: int, last: int) -> list[SweepRun]:
    """Return as many runs as Slurm accepts now."""
    if quota is None or len(chosen) * each + last <= quota:
        return chosen
    fit = max(0, (quota - last) // each)
    remedy = "Run the same command again when some of your jobs have ended, to submit the others."
    if not fit:
        raise UserError(f"Slurm accepts {quota} more jobs from you now (MaxSubmitJobs)", remedy)
    log.warning(
        f"Slurm accepts {quota} more jobs from you now (MaxSubmitJobs): submitting {fit} of {len(chosen)} runs."
    )
    log.warning(remedy)
    return chosen[:fit]


def _make_submission(chosen: Sequence[SweepRun], site: Site, options: SubmitOptions, slurm: Slurm) -> Submission:
    settings = site_settings()
    config = chosen[0].experiment.config
    configs = [str(runs.run_for(member.experiment, site, options.replace).config_file) for member in chosen]
    try:
        arrays = options.executor == "slurm" and (len(chosen) > 1 or options.dry_run)
        array_size = slurm.max_array_size() if arrays else len(chosen)
    except SlurmUnavailable as error:
        if not options.dry_run:
            raise UserError(f"Slurm is not available: {error}", error.remedy) from None
        log.warning(f"Slurm is not available ({error}); using its default array limit")
        array_size = 1001
    return Submission(
        spec=JobSpec.of(config, settings),
        tasks=[[[name, file] for name in _PER_RUN_STAGES] for file in configs],
        stages=[_PER_RUN_STAGES[:-1], _PER_RUN_STAGES[-1:]] if "evaluate" in options.then else [_PER_RUN_STAGES],
        last=["report", config.name] if "report" in options.then else None,
        folder=Path("logs").absolute() / config.name,
        setup=_setup_lines(site, settings) if options.executor == "slurm" else [],
        array_size=array_size,
    )


def _setup_lines(site: Site, settings: dict[str, str]) -> list[str]:
    """Return the first lines of the batch scripts; the paths of store, runs and image are fixed at submission."""
    image = requirements.image_path(site, settings).resolve()
    places = {"FTLIB_STORE": str(site.store), "FTLIB_RUNS": str(site.runs), "FTLIB_IMAGE": str(image)}
    frozen = {name: settings[name] for name in _FROZEN_SETTINGS if name in settings}
    return setup_lines(snapshot_folder(find_clone(), site), {**frozen, **places})


def _preview(
    submission: Submission, chosen: Sequence[SweepRun], found: Sequence[Run], site: Site, executor: Executor
) -> str:
    """The runs, then every array's batch script and the commands of its elements; of other executors the commands."""
    lines = [
        f"# {runs.run_name(run, site)}: {member.label}".rstrip(": ") for run, member in zip(found, chosen, strict=True)
    ]
    if executor != "slurm":
        each = [command for task in submission.tasks for command in task]
        return "\n".join(
            [*lines, *(shlex.join(["ftlib", *command]) for command in [*each, submission.last or []] if command)]
        )
    for number, (script, array) in enumerate(render_scripts(submission), 1):
        lines.append(
            f"##### ARRAY{number}: sbatch of this script, {len(array.tasks)} x {'+'.join(array.stage)}\n{script}"
        )
        for index, task in enumerate(array.tasks):
            commands = [command for command in task if command[0] in array.stage]
            lines += [f"# {index}: ftlib {' '.join(command)}" for command in commands]
        lines.append("")
    return "\n".join(lines)


def wait_for_runs(source: RawConfig, site: Site) -> bool:
    """Wait until no run of a config is queued or running.

    Returns:
        Whether all of them are trained and evaluated.
    """
    sweep_runs, told = expand_sweep(source, site), ""
    pairs = [(runs.run_for(member.experiment, site), member.experiment.config) for member in sweep_runs]
    while True:
        try:
            states = status.submission_states(pairs, site, lambda ids: Slurm().jobs(ids, own=True))
        except SlurmUnavailable as error:
            log.warning(f"{error}; still waiting")
            states = [status.ACTIVE]
        counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
        if status.ACTIVE not in states:
            log.info(f"ended: {counts}")
            return set(states) == {status.FINISHED}
        if counts != told:
            log.info(f"waiting: {counts}")
        told = counts
        time.sleep(_SECONDS_BETWEEN_STATES)


def _submit(submission: Submission, chosen: Sequence[SweepRun], site: Site, options: SubmitOptions) -> SubmittedRuns:
    replaced = [runs.run_for(member.experiment, site) for member in chosen] if options.replace else []
    with replaced_runs(replaced, site):
        folders = [runs.run_for(member.experiment, site, options.replace) for member in chosen]
        new = [run for run in folders if not run.folder.exists()]
        try:
            created = [runs.create_run(member.experiment, site, options.replace) for member in chosen]
            if options.executor == "slurm":
                clone = find_clone()
                take_snapshot(clone, snapshot_folder(clone, site), site)
            _make_job_folder(submission.folder, site)
            jobs = _send_to_executor(submission, created, site, options.executor)
        except UserError:
            _remove_unsent(new, site)
            raise
    return SubmittedRuns(created, jobs, submission.folder)


def _remove_unsent(new: Sequence[Run], site: Site) -> None:
    """Delete run folders that were created for jobs that Slurm does not have."""
    sent = {folder for intent in intents.unsettled(site) for folder in intent.runs}
    for run in new:
        if run.folder not in sent and not run.history.exists():
            shutil.rmtree(run.folder, ignore_errors=True)
            with contextlib.suppress(OSError):  # other runs of the name
                run.folder.parent.rmdir()


def _make_job_folder(folder: Path, site: Site) -> None:
    """Create the folder of submitit's pickles, which jobs execute.

    Raises:
        UserError: not writable, or others can write to it.
    """
    with files.storage_errors(folder):
        permissions.make_folder(folder, 0o777 & ~permissions.read_umask(), None)
    permissions.require_trusted(folder, "the folder of what is submitted", site)


def _send_to_executor(submission: Submission, folders: Sequence[Run], site: Site, executor: Executor) -> list[str]:
    """Submit; the history of each run records its jobs and their output files right after submission.

    Returns:
        The job IDs; an array has a single one.
    """
    if executor == "slurm":
        return submit_to_slurm(submission, folders, site)
    jobs: dict[str, None] = {}

    def note(numbers: Sequence[int], processes: Sequence[str]) -> None:
        jobs.update(dict.fromkeys(processes))
        if executor == "debug":
            return
        for number, process in zip(numbers, processes, strict=False):
            output = str(submission.folder / f"{process}_0_log.out")
            started = process_start(int(process))
            folders[number].log_event("submitted", job=process, executor=executor, log=output, started=started)

    (submit_locally if executor == "local" else run_in_process)(submission, note)
    return list(jobs)
