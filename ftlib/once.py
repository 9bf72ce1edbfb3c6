"""What several processes need and one of them makes: the base model's answers in a sweep, a model in the store."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from ftlib import console, files
from ftlib.ownership import Occupied, owned, owned_by_this_job

T = TypeVar("T")
POLL_SECONDS = 2.0


def made_once(place: Path, look: Callable[[], T | None], make: Callable[[], T | None], label: str) -> T | None:
    """What `look` finds, or what `make` makes while no other living process is making it.

    Waiting is never slower than making it again, since the other began earlier; if the other dies, we go on with what
    it left. The tasks of one job make it together.

    Args:
        place: a folder for the owner's note.
        label: for messages.
    """
    with files.storage_errors(place):
        place.mkdir(parents=True, exist_ok=True)
    told = False
    while not (found := look()):
        if not console.speaks():
            if owned_by_this_job(place):
                return make()
        else:
            try:
                with owned(place):
                    return look() or make()
            except Occupied:
                if not told:
                    console.say(f"{label}: another process is at work on it; waiting")
                told = True
        time.sleep(POLL_SECONDS)
    return found
