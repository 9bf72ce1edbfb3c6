"""The weights that `warm_start` names."""

from __future__ import annotations

from pathlib import Path

from ftlib.core import files
from ftlib.core.paths import Site
from ftlib.errors import UserError
from ftlib.runs import run as runs
from ftlib.runs.run import Run


def warm_start_folder(text: str, run: Run, site: Site) -> Path:
    """Return the folder of weights that `warm_start` names: an absolute path, or the result of another run.

    Raises:
        UserError: no such run, or it is not finished.
    """
    folder = Path(text)
    if folder.is_absolute() and any((folder / name).is_file() for name in ("adapter_config.json", "config.json")):
        return folder
    others = [path.parent for path in (site.runs / text).glob("*/config.yaml") if path.parent != run.folder]
    other = Run(others[0]) if len(others) == 1 else runs.find_run(str(site.runs / text), site, prefer_trained=True)
    if not other.done_marker.exists():
        raise UserError(f"warm_start: {other.folder}: training has not finished", "Run `ftlib train` for it first.")
    return other.folder / str(files.read_json(other.done_marker)["result"])
