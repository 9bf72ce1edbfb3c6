"""The code that jobs run, frozen when they are submitted: uncommitted changes too, whatever is edited meanwhile.

A snapshot is a copy of `ftlib/` and `jobs/` in the runs folder, named by its content, so that many submissions of the
same code share it.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import ftlib
from ftlib import files
from ftlib.errors import UserError
from ftlib.site import REPOSITORY, Site

_PARTS = ("ftlib", "jobs")
_LEFT_OUT = ("__pycache__", "site.env")


def find_home() -> Path:
    """The clone that holds jobs/run.sh: the current folder, or the one that this package lies in.

    Raises:
        UserError: neither, or its code is not what is installed here.
    """
    for folder in (Path.cwd(), REPOSITORY):
        if (folder / "jobs" / "run.sh").is_file() and (folder / "ftlib").is_dir():
            break
    else:
        raise UserError("jobs/run.sh is not there", "Submit from a clone of the repository.")
    if _content(folder / "ftlib", "*.py") != _content(Path(ftlib.__file__).parent, "*.py"):
        problem = f"the code in {folder} is not what is installed here ({Path(ftlib.__file__).parent})"
        raise UserError(problem, f"Install it anew, best by reference: pip install -e {folder}")
    return folder


def snapshot_folder(home: Path, site: Site) -> Path:
    """Where the snapshot of a clone lies, or will lie."""
    digest = files.fingerprint({part: _content(home / part) for part in _PARTS})
    return site.runs / ".jobs" / f"code-{digest[:12]}"


def take_snapshot(home: Path, target: Path) -> None:
    """Copy a clone's code to its snapshot folder, unless it is there.

    Raises:
        UserError: no space, or not writable.
    """
    if files.is_complete(target):
        return
    with files.publish_folder(target) as folder:
        for part in _PARTS:
            shutil.copytree(home / part, folder / part, ignore=shutil.ignore_patterns(*_LEFT_OUT))


def _content(folder: Path, pattern: str = "*") -> dict[str, str]:
    paths = (path for path in folder.rglob(pattern) if path.is_file() and not set(path.parts) & set(_LEFT_OUT))
    return {str(path.relative_to(folder)): files.sha256(path) for path in paths}
