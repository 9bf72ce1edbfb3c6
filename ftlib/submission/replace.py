"""Runs that begin anew: what there is of them goes only when something has taken its place."""

from __future__ import annotations

import contextlib
import shutil
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

from ftlib import console, files
from ftlib.ownership import owned
from ftlib.runs import Run
from ftlib.site import Site


@contextlib.contextmanager
def set_aside(runs: Sequence[Run], site: Site) -> Iterator[None]:
    """Move run folders away; they are deleted in the end, or back in their places if the body failed.

    If it failed after it had begun some runs anew (they have a history), these stay, and only the others come back.

    Raises:
        Occupied: somebody is at work on a run.
        UserError: not writable.
    """
    aside = site.runs / f".replaced-{uuid.uuid4().hex}"
    places = {run: aside / str(number) for number, run in enumerate(runs) if run.folder.exists()}
    try:
        for run, place in places.items():
            with files.storage_errors(run.folder), owned(run.folder):
                aside.mkdir(exist_ok=True)
                run.folder.rename(place)
        yield
    except BaseException:
        for run, place in places.items():
            if place.exists() and not run.history.exists():
                _put_back(run, place)
        _delete(aside)
        raise
    _delete(aside)


def _put_back(run: Run, place: Path) -> None:
    Run(place).owner.unlink(missing_ok=True)
    if run.folder.exists():
        shutil.rmtree(run.folder)
    place.rename(run.folder)


def _delete(aside: Path) -> None:
    try:
        shutil.rmtree(aside)
    except FileNotFoundError:
        pass
    except OSError as error:
        console.say(f"what was replaced cannot be deleted: {error}")
