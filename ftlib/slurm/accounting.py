"""The allocations of runs' jobs, as far as Slurm's accounting knows them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from ftlib.core import jsonl, log
from ftlib.core.paths import Site
from ftlib.runs import events as runs_events
from ftlib.runs.run import Run, find_runs
from ftlib.runs.usage import Allocation
from ftlib.slurm.client import Slurm, SlurmUnavailable


def known_allocations(chosen: Sequence[Run], site: Site) -> dict[Run, list[Allocation]]:
    """Return each run's allocations, the oldest first; empty without accounting, with a message.

    A job that worked on several runs (an interactive allocation, for example) is left out: its time cannot be divided,
    and the runs' own histories tell what they used of it.
    """
    jobs = {
        run: runs_events.slurm_jobs_of(jsonl.read_jsonl_log(run.history)) for run in {*chosen, *find_runs([], site)}
    }
    users = Counter(job for own in jobs.values() for job in own)
    asked = {run: [job for job in jobs[run] if users[job] == 1] for run in chosen}
    try:
        found = Slurm().allocations([job for own in asked.values() for job in own])
    except SlurmUnavailable as error:
        log.warning(f"no accounting ({error}); hours are counted from the history of the runs")
        found = []
    return {run: [one for one in found if one.job in asked[run]] for run in chosen}
