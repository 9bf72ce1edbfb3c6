"""A run goes on with the code, the data and the base model that it began with, whatever has been edited since.

The package is copied into the run folder (`code/ftlib`) when training starts there for the first time.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import ftlib
from ftlib import console, files
from ftlib.errors import UserError
from ftlib.runs import Run
from ftlib.site import Site

_PACKAGE = Path(ftlib.__file__).parent
_RUN_PINNED = "import sys; sys.path[0] = sys.argv.pop(1); from ftlib.__main__ import main; sys.exit(main())"


def use_pinned_code(run: Run, site: Site, arguments: list[str]) -> None:
    """Pin the running code to a new run; for an older run whose code differs, replace this process by that code.

    Args:
        site: kept, though the pinned code does not lie beside jobs/site.env.
        arguments: the ftlib command line to run again.

    Raises:
        UserError: no space, or not writable.
    """
    target = run.code
    if not files.is_complete(target) and console.speaks():
        with files.publish_folder(target) as folder:
            shutil.copytree(_PACKAGE, folder / "ftlib", ignore=shutil.ignore_patterns("__pycache__"))
        return
    while not files.is_complete(target):  # the first rank is at it
        time.sleep(0.2)
    if _content(target / "ftlib") == _content(_PACKAGE):
        return
    console.say(f"this run began with other code; going on with that ({target})")
    os.environ.update(FTLIB_STORE=str(site.store), FTLIB_RUNS=str(site.runs))
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # exec takes our handler away; until the new one stands it would kill
    os.execv(sys.executable, [sys.executable, "-c", _RUN_PINNED, str(target), *arguments])


def _content(package: Path) -> dict[str, str]:
    paths = (path for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {str(path.relative_to(package)): files.sha256(path) for path in paths}


def pin_data(run: Run, facts: dict[str, Any], prepared: str) -> None:
    """Note what a new run is trained on; an older run goes on with nothing else.

    Args:
        prepared: the name of the folder in the store with the prepared data.

    Raises:
        UserError: the dataset has changed since.
    """
    require_data(run, facts)
    files.write_json(run.data, {**facts, "prepared": prepared})


def same_rows(facts: dict[str, Any], others: dict[str, Any]) -> bool:
    """Whether two prepared datasets have the same rows in each split; how and when they were prepared is all one."""

    def of(known: dict[str, Any]) -> dict[str, str]:
        return {split: entry["fingerprint"] for split, entry in known["splits"].items()}

    return of(facts) == of(others)


def require_data(run: Run, facts: dict[str, Any]) -> None:
    """Refuse other data than a run began with: what it learned and what it is tested on might be the same rows.

    Args:
        facts: of the prepared dataset, hashes of its rows among them.

    Raises:
        UserError: the dataset has changed since.
    """
    if run.data.exists() and not same_rows(facts, files.read_json(run.data)):
        raise UserError(
            f"{run.folder}: the dataset has changed since this run began",
            "Put the old data back, or give the config another name or seed to begin a new run.",
        )


def pin_base(run: Run, hashes: dict[str, str]) -> None:
    """Note the content of a run's base model; a run that has a note goes on with nothing else.

    A run that began before such notes gets one now, and is told so.

    Args:
        hashes: file → SHA-256, from `hub.model_hashes`.

    Raises:
        UserError: a file has changed, is gone, or is new.
    """
    require_base(run, hashes)
    if run.base.exists() or not console.speaks():
        return
    if run.data.exists():
        console.say(
            f"{run.folder}: the base model's content was not recorded when this run began; it is from now on. "
            "Whether it is still the same cannot be told."
        )
    files.write_json(run.base, hashes)


def require_base(run: Run, hashes: dict[str, str]) -> None:
    """Refuse another base model than a run began with: an adapter, or a half-trained model, means nothing on it.

    Raises:
        UserError: a file has changed, is gone, or is new.
    """
    before = files.read_json(run.base) if run.base.exists() else hashes
    odd = {
        **{name: "has changed" for name in before.keys() & hashes.keys() if before[name] != hashes[name]},
        **dict.fromkeys(before.keys() - hashes.keys(), "is gone"),
        **dict.fromkeys(hashes.keys() - before.keys(), "is new"),
    }
    if odd:
        told = ", ".join(f"{name} {what}" for name, what in sorted(odd.items())[:3]) + (" …" if len(odd) > 3 else "")
        raise UserError(
            f"{run.folder}: the base model is not the one that this run was begun with: {told}",
            "Put the old files back, or give the config another name or seed to begin a new run.",
        )
