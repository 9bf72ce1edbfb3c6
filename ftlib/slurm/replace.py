"""Runs that begin anew: what there is of them goes only when something has taken its place.

Meanwhile they lie in `<runs>/.replaced-*/<name>/<identity>/`, a folder that is owned like a run; if its owner dies,
the next `submit` or `clean` puts back what nothing has taken the place of. What is in `.deleted-*` may go at any time.
"""

from __future__ import annotations

import contextlib
import shutil
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

from ftlib.core import files, log
from ftlib.core.lease import LeaseHeld, acquire_lease
from ftlib.core.paths import Site
from ftlib.runs import run as runs_run
from ftlib.runs.run import Run

_ASIDE_PREFIX, _DELETED_PREFIX = ".replaced-", ".deleted-"


@contextlib.contextmanager
def replaced_runs(runs: Sequence[Run], site: Site) -> Iterator[None]:
    """Move run folders away; they are deleted in the end, or back in their places if the body failed.

    If it failed after it had begun some runs anew (they have a history), these stay, and only the others come back.

    Raises:
        LeaseHeld: somebody is at work on a run.
        UserError: not writable.
    """
    there = [run for run in runs if run.folder.exists()]
    if not there:
        yield
        return
    aside = site.runs / f"{_ASIDE_PREFIX}{uuid.uuid4().hex}"
    with files.storage_errors(site.runs):
        aside.mkdir()
    with acquire_lease(aside):
        try:
            for run in there:
                target = aside / run.folder.relative_to(site.runs)
                with files.storage_errors(run.folder), acquire_lease(run.folder):
                    target.parent.mkdir(exist_ok=True)
                    run.folder.rename(target)
            yield
        except BaseException:
            _restore(aside, site)
            raise
        finally:
            _delete(aside)


def finish_interrupted(site: Site) -> None:
    """Put back, or delete, what a `--replace` has set aside that was killed."""
    for folder in site.runs.glob(f"{_DELETED_PREFIX}*"):
        shutil.rmtree(folder, ignore_errors=True)
    for aside in site.runs.glob(f"{_ASIDE_PREFIX}*"):
        if any(aside.glob("*/config.yaml")):  # of an older ftlib, which did not note whose they are
            continue
        with contextlib.suppress(LeaseHeld), acquire_lease(aside):
            for run in _restore(aside, site):
                log.warning(f"{runs_run.run_name(run, site)}: back, since the --replace that moved it was interrupted")
            _delete(aside)


def _restore(aside: Path, site: Site) -> list[Run]:
    """Move the runs back that have not begun anew; these."""
    moved = []
    for folder in sorted(aside.glob("*/*")):
        run = Run(site.runs / folder.relative_to(aside))
        if not run.history.exists():
            Run(folder).owner.unlink(missing_ok=True)
            if run.folder.exists():
                shutil.rmtree(run.folder)
            run.folder.parent.mkdir(exist_ok=True)
            folder.rename(run.folder)
            moved.append(run)
    return moved


def _delete(aside: Path) -> None:
    """First the name changes: of what is half deleted nothing may come back."""
    try:
        shutil.rmtree(aside.rename(aside.with_name(aside.name.replace(_ASIDE_PREFIX, _DELETED_PREFIX))))
    except OSError as error:
        log.warning(f"what was replaced cannot be deleted: {error}")
