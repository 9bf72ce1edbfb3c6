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

from ftlib import console, files
from ftlib import runs as run_folders
from ftlib.ownership import Occupied, owned
from ftlib.runs import Run
from ftlib.site import Site

_ASIDE, _DELETED = ".replaced-", ".deleted-"


@contextlib.contextmanager
def set_aside(runs: Sequence[Run], site: Site) -> Iterator[None]:
    """Move run folders away; they are deleted in the end, or back in their places if the body failed.

    If it failed after it had begun some runs anew (they have a history), these stay, and only the others come back.

    Raises:
        Occupied: somebody is at work on a run.
        UserError: not writable.
    """
    there = [run for run in runs if run.folder.exists()]
    if not there:
        yield
        return
    aside = site.runs / f"{_ASIDE}{uuid.uuid4().hex}"
    with files.storage_errors(site.runs):
        aside.mkdir()
    with owned(aside):
        try:
            for run in there:
                place = aside / run.folder.relative_to(site.runs)
                with files.storage_errors(run.folder), owned(run.folder):
                    place.parent.mkdir(exist_ok=True)
                    run.folder.rename(place)
            yield
        except BaseException:
            _put_back(aside, site)
            raise
        finally:
            _delete(aside)


def finish_interrupted(site: Site) -> None:
    """Put back, or delete, what a `--replace` has set aside that was killed."""
    for folder in site.runs.glob(f"{_DELETED}*"):
        shutil.rmtree(folder, ignore_errors=True)
    for aside in site.runs.glob(f"{_ASIDE}*"):
        if any(aside.glob("*/config.yaml")):  # of an older ftlib, which did not note whose they are
            continue
        with contextlib.suppress(Occupied), owned(aside):
            for run in _put_back(aside, site):
                console.say(f"{run_folders.handle(run, site)}: back, since the --replace that moved it was interrupted")
            _delete(aside)


def _put_back(aside: Path, site: Site) -> list[Run]:
    """Move the runs back that have not begun anew; these."""
    moved = []
    for place in sorted(aside.glob("*/*")):
        run = Run(site.runs / place.relative_to(aside))
        if not run.history.exists():
            Run(place).owner.unlink(missing_ok=True)
            if run.folder.exists():
                shutil.rmtree(run.folder)
            run.folder.parent.mkdir(exist_ok=True)
            place.rename(run.folder)
            moved.append(run)
    return moved


def _delete(aside: Path) -> None:
    """First the name changes: of what is half deleted nothing may come back."""
    try:
        shutil.rmtree(aside.rename(aside.with_name(aside.name.replace(_ASIDE, _DELETED))))
    except OSError as error:
        console.say(f"what was replaced cannot be deleted: {error}")
