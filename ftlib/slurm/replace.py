"""`submit --replace`: old run folders are deleted only after the new runs were submitted.

Until then they are stored in `<runs>/.replaced-*/<name>/<identity>/`, with a lease like a run's. If the process dies,
the next `submit` or `clean` restores runs that were not replaced. `.deleted-*` can be deleted at any time.
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
    """Context that moves run folders away; deletes them at the end, or restores them if the body failed.

    If the body failed after some new runs were started (they have a history), these stay, and only the others are
    restored.

    Raises:
        LeaseHeld: a process works on a run.
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
    """Restore or delete the runs that a killed `--replace` moved away."""
    for folder in site.runs.glob(f"{_DELETED_PREFIX}*"):
        shutil.rmtree(folder, ignore_errors=True)
    for aside in site.runs.glob(f"{_ASIDE_PREFIX}*"):
        if any(aside.glob("*/config.yaml")):  # written by an older ftlib, which did not record the owner
            continue
        with contextlib.suppress(LeaseHeld), acquire_lease(aside):
            for run in _restore(aside, site):
                log.warning(
                    f"{runs_run.run_name(run, site)}: restored, because the --replace that moved it was interrupted"
                )
            _delete(aside)


def _restore(aside: Path, site: Site) -> list[Run]:
    """Move runs back that were not replaced, and return them."""
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
    """Delete a folder; it is renamed first, so that partly deleted runs are never restored."""
    try:
        shutil.rmtree(aside.rename(aside.with_name(aside.name.replace(_ASIDE_PREFIX, _DELETED_PREFIX))))
    except OSError as error:
        log.warning(f"replaced runs cannot be deleted: {error}")
