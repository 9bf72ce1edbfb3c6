"""Submit a config's run, or all runs of its sweep, to Slurm as one array; or run them here.

Each run is staged, prepared, trained and evaluated. A run is identified by the config fields that affect its result:
submitting again only sends missing runs (never started, deleted, cancelled or lost). Executor local runs several at
once
in the background on this machine; debug runs them sequentially before the command returns.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ftlib.cli import arguments
from ftlib.core import log
from ftlib.core.paths import Site, find_site, site_settings
from ftlib.errors import UserError

if TYPE_CHECKING:
    from ftlib.runs.run import Run
    from ftlib.slurm.executors import Submission
    from ftlib.slurm.sweep import SweepRun

_FROZEN_SETTINGS = ("FTLIB_BINDS", "FTLIB_TMP", "FTLIB_HOOK", "FTLIB_MAX_REQUEUES", "FTLIB_GROUP", "FTLIB_SHARE_RUNS",
           "FTLIB_OWNER", "FTLIB_IMAGE_SHA256")  # fmt: skip
_PER_RUN_STAGES = ("stage", "prepare", "train", "evaluate")


def main(argv: list[str]) -> int:
    """`ftlib submit CONFIG [KEY=VALUE…] [--executor …] [--then …] [--retry|--replace] [--dry-run]`"""
    parsed = _parser().parse_intermixed_args(argv)
    site = find_site()
    from ftlib.config.loader import read_raw_config
    from ftlib.slurm import sweep
    from ftlib.slurm.submit import finish_interrupted

    sweep_runs = sweep.expand_sweep(read_raw_config(parsed.config, parsed.overrides), site)
    if not parsed.dry_run:
        finish_interrupted(site)
    chosen = _select_runs(sweep_runs, site, parsed)
    if not chosen:
        return 0
    submission = _make_submission(chosen, site, parsed)
    if parsed.dry_run:
        _show(submission, chosen, site, parsed.replace)
        return 0
    _submit(submission, chosen, site, parsed)
    return 0


def _parser() -> argparse.ArgumentParser:
    command = arguments.make_parser("submit", __doc__)
    command.add_argument("--executor", choices=("slurm", "local", "debug"), default="slurm")
    command.add_argument(
        "--then",
        type=_stages,
        default=(),
        metavar="evaluate,report",
        help="evaluate each run in a separate job after its training; report when all have ended",
    )
    again = command.add_mutually_exclusive_group()
    again.add_argument("--retry", action="store_true", help="also failed runs; they resume")
    again.add_argument("--replace", action="store_true", help="delete existing runs and start again")
    command.add_argument("--dry-run", action="store_true", help="print what would be submitted")
    arguments.add_config_arguments(command)
    return command


def _stages(text: str) -> tuple[str, ...]:
    words = tuple(text.split(","))
    if words not in (("evaluate",), ("report",), ("evaluate", "report")):
        raise argparse.ArgumentTypeError("must be evaluate, report, or evaluate,report")
    return words


def _select_runs(sweep_runs: Sequence[SweepRun], site: Site, parsed: argparse.Namespace) -> list[SweepRun]:
    """Return the runs to submit; reports the states of all."""
    from ftlib.runs import run as runs
    from ftlib.slurm import status
    from ftlib.slurm.client import Slurm, SlurmUnavailable
    from ftlib.slurm.jobspec import JobSpec

    slurm = Slurm()
    if not parsed.replace:
        for notice in filter(None, (runs.recipe_notice(member.experiment, site) for member in sweep_runs)):
            log.info(notice)
    folders = [runs.run_for(member.experiment, site) for member in sweep_runs]
    pairs = [(run, member.experiment.config) for run, member in zip(folders, sweep_runs, strict=True)]
    try:
        states = status.submission_states(pairs, site, slurm.jobs)
        spec = JobSpec.of(sweep_runs[0].experiment.config, site_settings())
        asked = parsed.executor == "slurm" and not parsed.dry_run
        room = slurm.remaining_submit_quota(spec.account, spec.partition, spec.qos) if asked else None
    except SlurmUnavailable as error:
        raise UserError(f"cannot check earlier jobs: {error}", "Try again when Slurm responds.") from None
    wanted = [status.MISSING, *([status.FAILED] if parsed.retry or parsed.replace else [])]
    wanted += [status.FINISHED] if parsed.replace else []
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    log.info(f"{len(sweep_runs)} {'run' if len(sweep_runs) == 1 else 'runs'}: {counts}")
    if status.FAILED in states and status.FAILED not in wanted:
        log.info("failed runs are skipped; --retry resumes them, --replace starts them again")
    if parsed.replace and status.ACTIVE in states:
        raise UserError("some of these runs are queued or running, and cannot be replaced", "Cancel them first.")
    chosen = [member for member, state in zip(sweep_runs, states, strict=True) if state in wanted]
    return _within_quota(chosen, room, 1 + ("evaluate" in parsed.then), "report" in parsed.then)


def _within_quota(chosen: list[SweepRun], quota: int | None, each: int, last: int) -> list[SweepRun]:
    """Return as many runs as Slurm accepts now."""
    if quota is None or len(chosen) * each + last <= quota:
        return chosen
    fit = max(0, (quota - last) // each)
    remedy = "Run the same command again when some of your jobs have ended, to submit the others."
    if not fit:
        raise UserError(f"Slurm accepts {quota} more jobs from you now (MaxSubmitJobs)", remedy)
    log.info(f"Slurm accepts {quota} more jobs from you now (MaxSubmitJobs): submitting {fit} of {len(chosen)} runs.")
    log.info(remedy)
    return chosen[:fit]


def _make_submission(chosen: Sequence[SweepRun], site: Site, parsed: argparse.Namespace) -> Submission:
    from ftlib.runs import run as runs
    from ftlib.slurm.client import Slurm, SlurmUnavailable
    from ftlib.slurm.executors import Submission
    from ftlib.slurm.jobspec import JobSpec

    settings = site_settings()
    config = chosen[0].experiment.config
    files = [str(runs.run_for(member.experiment, site, parsed.replace).config_file) for member in chosen]
    try:
        array_size = Slurm().max_array_size() if parsed.executor == "slurm" else len(chosen)
    except SlurmUnavailable as error:
        if not parsed.dry_run:
            raise UserError(f"Slurm is not available: {error}", "Without Slurm: --executor local.") from None
            log.info(f"Slurm is not available ({error}); using its default array limit")
        array_size = 1001
    return Submission(
        spec=JobSpec.of(config, settings),
        tasks=[[[name, file] for name in _PER_RUN_STAGES] for file in files],
        stages=[_PER_RUN_STAGES[:-1], _PER_RUN_STAGES[-1:]] if "evaluate" in parsed.then else [_PER_RUN_STAGES],
        last=["report", config.name] if "report" in parsed.then else None,
        folder=Path("logs").absolute() / config.name,
        setup=_setup_lines(site, settings) if parsed.executor == "slurm" else [],
        array_size=array_size,
    )


def _setup_lines(site: Site, settings: dict[str, str]) -> list[str]:
    """Return the first lines of the batch scripts; the paths of store, runs and image are fixed at submission."""
    from ftlib.runs.pinning import find_home, snapshot_folder
    from ftlib.slurm.executors import setup_lines

    image = Path(settings.get("FTLIB_IMAGE") or site.store / "images" / "ftlib.sif").expanduser().resolve()
    places = {"FTLIB_STORE": str(site.store), "FTLIB_RUNS": str(site.runs), "FTLIB_IMAGE": str(image)}
    frozen = {name: settings[name] for name in _FROZEN_SETTINGS if name in settings}
    return setup_lines(snapshot_folder(find_home(), site), {**frozen, **places})


def _show(submission: Submission, chosen: Sequence[SweepRun], site: Site, anew: bool) -> None:
    from ftlib.runs import run as runs
    from ftlib.slurm.executors import render_scripts

    for member in chosen:
        named = runs.run_name(runs.run_for(member.experiment, site, anew), site)
        log.print_result(f"# {named}: {member.label}".rstrip(": "))
    for number, (script, array) in enumerate(render_scripts(submission), 1):
        log.print_result(
            f"##### ARRAY{number}: sbatch of this script, {len(array.tasks)} x {'+'.join(array.stage)}\n{script}"
        )
        for index, task in enumerate(array.tasks):
            for command in task:
                if command[0] in array.stage:
                    log.print_result(f"# {index}: ftlib {' '.join(command)}")
        log.print_result("")


def _submit(submission: Submission, chosen: Sequence[SweepRun], site: Site, parsed: argparse.Namespace) -> None:
    from ftlib.runs import run as runs
    from ftlib.runs.pinning import find_home, snapshot_folder, take_snapshot
    from ftlib.slurm.submit import replaced_runs

    replaced = [runs.run_for(member.experiment, site) for member in chosen] if parsed.replace else []
    with replaced_runs(replaced, site):
        folders = [runs.create_run(member.experiment, site, parsed.replace) for member in chosen]
        if parsed.executor == "slurm":
            home = find_home()
            take_snapshot(home, snapshot_folder(home, site), site)
        _make_job_folder(submission.folder, site)
        masters = _send_to_executor(submission, folders, parsed.executor)
    log.info(f"{len(chosen)} submitted as {parsed.executor} job {', '.join(masters)}; output in {submission.folder}")
    log.print_result("\n".join(masters))


def _make_job_folder(folder: Path, site: Site) -> None:
    """Create the folder of submitit's pickles, which jobs execute.

    Raises:
        UserError: not writable, or others can write to it.
    """
    from ftlib.core import files, permissions

    with files.storage_errors(folder):
        permissions.make_folder(folder, 0o777 & ~permissions.read_umask(), None)
    permissions.require_trusted(folder, "the folder of what is submitted", site)


def _send_to_executor(submission: Submission, folders: Sequence[Run], executor: str) -> list[str]:
    """Submit; the history of each run records its jobs and their output files right after submission.

    Returns:
        The job IDs; an array has a single one.
    """
    from ftlib.core.environment import process_start
    from ftlib.slurm.executors import EXECUTORS

    masters: dict[str, None] = {}
    before: dict[int, str] = {}

    def note(numbers: Sequence[int], jobs: Sequence[str]) -> None:
        masters.update(dict.fromkeys(job.partition("_")[0] for job in jobs))
        if executor == "debug":
            return
        for number, job in zip(numbers, jobs, strict=False):
            details = {"job": job, "executor": executor, "log": str(submission.folder / f"{job}_0_log.out")}
            started = process_start(int(job)) if executor == "local" else None
            folders[number].log_event("submitted", **details, after=before.get(number), started=started)
            before[number] = job

    try:
        EXECUTORS[executor](submission, note)
    except BaseException:
        if masters:
            log.info(f"submitted before the error: {executor} job {', '.join(masters)}")
        raise
    return list(masters)
