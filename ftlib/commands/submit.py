"""Send a config's run, or every run of its sweep, to Slurm as one array; or run them here.

Each run is staged, prepared, trained and evaluated. A run is known by what changes its result: submitting again sends
only what is missing, that is, what was never begun, was deleted, cancelled or lost. Executor local runs several at once
in the background of this machine, debug one after the other before the command returns.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ftlib import command_line, console
from ftlib.errors import UserError
from ftlib.site import Site, find_site, site_settings

if TYPE_CHECKING:
    from ftlib.runs import Run
    from ftlib.submission.launch import Plan
    from ftlib.submission.sweep import Member

_FROZEN = ("FTLIB_BINDS", "FTLIB_TMP", "FTLIB_HOOK", "FTLIB_MAX_REQUEUES")
_EACH = ("stage", "prepare", "train", "evaluate")


def main(argv: list[str]) -> int:
    """`ftlib submit CONFIG [KEY=VALUE…] [--executor …] [--then …] [--retry|--replace] [--dry-run]`"""
    parsed = _parser().parse_intermixed_args(argv)
    site = find_site()
    from ftlib.config_file import read_source
    from ftlib.submission import sweep
    from ftlib.submission.replace import finish_interrupted

    members = sweep.expand(read_source(parsed.config, parsed.overrides), site)
    if not parsed.dry_run:
        finish_interrupted(site)
    chosen = _choose(members, site, parsed)
    if not chosen:
        return 0
    plan = _plan(chosen, site, parsed)
    if parsed.dry_run:
        _show(plan, chosen, site, parsed.replace)
        return 0
    _submit(plan, chosen, site, parsed)
    return 0


def _parser() -> argparse.ArgumentParser:
    command = command_line.parser("submit", __doc__)
    command.add_argument("--executor", choices=("slurm", "local", "debug"), default="slurm")
    command.add_argument(
        "--then",
        type=_stages,
        default=(),
        metavar="evaluate,report",
        help="evaluate in jobs of their own, each when its training is done; report when all have ended",
    )
    again = command.add_mutually_exclusive_group()
    again.add_argument("--retry", action="store_true", help="also those that failed; they go on from what is saved")
    again.add_argument("--replace", action="store_true", help="delete what there is of these runs and begin anew")
    command.add_argument("--dry-run", action="store_true", help="print what would be submitted")
    command_line.add_config(command)
    return command


def _stages(text: str) -> tuple[str, ...]:
    words = tuple(text.split(","))
    if words not in (("evaluate",), ("report",), ("evaluate", "report")):
        raise argparse.ArgumentTypeError("must be evaluate, report, or evaluate,report")
    return words


def _choose(members: Sequence[Member], site: Site, parsed: argparse.Namespace) -> list[Member]:
    """The runs to submit; says how all of them stand."""
    from ftlib import runs
    from ftlib.submission import standing
    from ftlib.submission.jobspec import JobSpec
    from ftlib.submission.slurm import Slurm, Unreachable

    slurm = Slurm()
    if not parsed.replace:
        for notice in filter(None, (runs.recipe_notice(member.experiment, site) for member in members)):
            console.say(notice)
    folders = [runs.run_of(member.experiment, site) for member in members]
    pairs = [(run, member.experiment.config) for run, member in zip(folders, members, strict=True)]
    try:
        states = standing.standings(pairs, slurm.jobs)
        spec = JobSpec.of(members[0].experiment.config, site_settings())
        asked = parsed.executor == "slurm" and not parsed.dry_run
        room = slurm.room(spec.account, spec.partition, spec.qos) if asked else None
    except Unreachable as error:
        raise UserError(f"how earlier jobs stand cannot be told: {error}", "Try again when Slurm answers.") from None
    wanted = [standing.MISSING, *([standing.FAILED] if parsed.retry or parsed.replace else [])]
    wanted += [standing.FINISHED] if parsed.replace else []
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    console.say(f"{len(members)} {'run' if len(members) == 1 else 'runs'}: {counts}")
    if standing.FAILED in states and standing.FAILED not in wanted:
        console.say("failed runs are left out; --retry goes on with them, --replace begins them anew")
    if parsed.replace and standing.AT_WORK in states:
        raise UserError("some of these runs are queued or running, and cannot be replaced", "Cancel them first.")
    chosen = [member for member, state in zip(members, states, strict=True) if state in wanted]
    return _fitting(chosen, room, 1 + ("evaluate" in parsed.then), "report" in parsed.then)


def _fitting(chosen: list[Member], room: int | None, each: int, last: int) -> list[Member]:
    """As many runs as Slurm takes now."""
    if room is None or len(chosen) * each + last <= room:
        return chosen
    fit = max(0, (room - last) // each)
    remedy = "Run the same command again when some of your jobs have ended: it sends the others."
    if not fit:
        raise UserError(f"Slurm takes {room} more jobs of yours now (MaxSubmitJobs)", remedy)
    console.say(f"Slurm takes {room} more jobs of yours now (MaxSubmitJobs): {fit} of {len(chosen)} runs are sent.")
    console.say(remedy)
    return chosen[:fit]


def _plan(chosen: Sequence[Member], site: Site, parsed: argparse.Namespace) -> Plan:
    from ftlib import runs
    from ftlib.submission.jobspec import JobSpec
    from ftlib.submission.launch import Plan
    from ftlib.submission.slurm import Slurm, Unreachable

    settings = site_settings()
    config = chosen[0].experiment.config
    files = [str(runs.run_of(member.experiment, site, parsed.replace).config_file) for member in chosen]
    try:
        array_size = Slurm().max_array_size() if parsed.executor == "slurm" else len(chosen)
    except Unreachable as error:
        if not parsed.dry_run:
            raise UserError(f"Slurm cannot be asked: {error}", "Without Slurm: --executor local.") from None
        console.say(f"Slurm cannot be asked ({error}); arrays as with its default limit")
        array_size = 1001
    return Plan(
        spec=JobSpec.of(config, settings),
        tasks=[[[name, file] for name in _EACH] for file in files],
        stages=[_EACH[:-1], _EACH[-1:]] if "evaluate" in parsed.then else [_EACH],
        last=["report", config.name] if "report" in parsed.then else None,
        folder=Path("logs").absolute() / config.name,
        setup=_setup(site, settings) if parsed.executor == "slurm" else [],
        array_size=array_size,
    )


def _setup(site: Site, settings: dict[str, str]) -> list[str]:
    """The beginning of every batch script; the places of store, runs and image are those of now."""
    from ftlib.submission.launch import setup_lines
    from ftlib.submission.snapshot import find_home, snapshot_folder

    image = Path(settings.get("FTLIB_IMAGE") or site.store / "images" / "ftlib.sif").expanduser().resolve()
    places = {"FTLIB_STORE": str(site.store), "FTLIB_RUNS": str(site.runs), "FTLIB_IMAGE": str(image)}
    frozen = {name: settings[name] for name in _FROZEN if name in settings}
    return setup_lines(snapshot_folder(find_home(), site), {**frozen, **places})


def _show(plan: Plan, chosen: Sequence[Member], site: Site, anew: bool) -> None:
    from ftlib import runs
    from ftlib.submission.launch import scripts

    for member in chosen:
        named = runs.handle(runs.run_of(member.experiment, site, anew), site)
        print(f"# {named}: {member.label}".rstrip(": "))
    for number, (script, array) in enumerate(scripts(plan), 1):
        print(f"##### ARRAY{number}: sbatch of this script, {len(array.tasks)} x {'+'.join(array.stage)}\n{script}")
        for index, task in enumerate(array.tasks):
            for command in task:
                if command[0] in array.stage:
                    print(f"# {index}: ftlib {' '.join(command)}")
        print()


def _submit(plan: Plan, chosen: Sequence[Member], site: Site, parsed: argparse.Namespace) -> None:
    from ftlib import runs
    from ftlib.submission.replace import set_aside
    from ftlib.submission.snapshot import find_home, snapshot_folder, take_snapshot

    replaced = [runs.run_of(member.experiment, site) for member in chosen] if parsed.replace else []
    with set_aside(replaced, site):
        folders = [runs.open_run(member.experiment, site, parsed.replace) for member in chosen]
        if parsed.executor == "slurm":
            home = find_home()
            take_snapshot(home, snapshot_folder(home, site))
        plan.folder.mkdir(parents=True, exist_ok=True)
        masters = _send(plan, folders, parsed.executor)
    console.say(f"{len(chosen)} submitted as {parsed.executor} job {', '.join(masters)}; output in {plan.folder}")
    print("\n".join(masters))


def _send(plan: Plan, folders: Sequence[Run], executor: str) -> list[str]:
    """Submit; each run's history tells its jobs and where their output goes as soon as they are taken.

    Returns:
        What to call the jobs by, an array by its own number.
    """
    from ftlib.runs import process_start
    from ftlib.submission.launch import EXECUTORS

    masters: dict[str, None] = {}
    before: dict[int, str] = {}

    def note(numbers: Sequence[int], jobs: Sequence[str]) -> None:
        masters.update(dict.fromkeys(job.partition("_")[0] for job in jobs))
        if executor == "debug":
            return
        for number, job in zip(numbers, jobs, strict=False):
            details = {"job": job, "executor": executor, "log": str(plan.folder / f"{job}_0_log.out")}
            started = process_start(int(job)) if executor == "local" else None
            folders[number].note("submitted", **details, after=before.get(number), started=started)
            before[number] = job

    try:
        EXECUTORS[executor](plan, note)
    except BaseException:
        if masters:
            console.say(f"submitted before this went wrong: {executor} job {', '.join(masters)}")
        raise
    return list(masters)
