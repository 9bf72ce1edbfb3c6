"""Where things lie at this site: the shared store, the runs, the image.

`jobs/site.env` holds literal `KEY=VALUE` lines (the same file `jobs/run.sh` reads); the environment wins over it.
"""

from __future__ import annotations

import getpass
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ftlib.errors import UserError

REPOSITORY = Path(__file__).resolve().parent.parent
_LINE = re.compile(r"([A-Z][A-Z0-9_]*)=(.*)")


@dataclass(frozen=True)
class Site:
    """The two roots on shared storage.

    Attributes:
        store: group-readable: `hf/` (HF_HOME), `models/`, `datasets/`, `prepared/`.
        runs: private run folders.
    """

    store: Path
    runs: Path


def read_site_env(path: Path) -> dict[str, str]:
    """Read literal `KEY=VALUE` lines; nothing is expanded, quotes around a whole value are taken off.

    Raises:
        UserError: unreadable file, or a line that is neither KEY=VALUE, a comment nor empty.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    values = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = _LINE.fullmatch(line.strip())
        if not match:
            raise UserError(f"{path}:{number}: expected KEY=VALUE, got {line.strip()!r}")
        key, value = match.groups()
        values[key] = value[1:-1] if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"" else value
    return values


def site_settings(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """All settings of jobs/site.env (looked for here, then in the repository) with the environment over them."""
    for folder in (Path.cwd(), REPOSITORY):
        if (folder / "jobs" / "site.env").exists():
            return {**read_site_env(folder / "jobs" / "site.env"), **environment}
    return dict(environment)


def find_site(environment: Mapping[str, str] = os.environ) -> Site:
    """Find the store and the runs folder.

    `FTLIB_STORE` and `FTLIB_RUNS` (default `<store>/runs/$USER`). Without a store: `./store` outside Slurm; inside
    Slurm that would be a node's random working folder, so it is an error.

    Raises:
        UserError: inside Slurm without FTLIB_STORE.
    """
    settings = site_settings(environment)
    store_text = settings.get("FTLIB_STORE", "")
    if not store_text and "SLURM_JOB_ID" in environment:
        raise UserError(
            "FTLIB_STORE is not set, and inside a Slurm job there is no safe default",
            "Set it in jobs/site.env (copy jobs/site.env.example) to a folder on shared storage.",
        )
    store = Path(store_text or "store").expanduser().absolute()
    runs_text = settings.get("FTLIB_RUNS", "")
    runs = Path(runs_text).expanduser().absolute() if runs_text else store / "runs" / getpass.getuser()
    return Site(store=store, runs=runs)
