"""Pins what a run or a job started with: its code, its prepared data and its base model.

Pinned code is a folder that contains `ftlib/` (for a job also `jobs/`), complete with its marker, and writable by its
owner alone:

- `<run>/code`: the package that a run was first trained with. Every later start of the run uses it.
- `<runs>/.jobs/code-<hash>`: a snapshot of a clone, named by its content, shared by all jobs with the same code.
  `ftlib submit` takes it on the login node, jobs/run.sh at the first start of a job that was submitted by sbatch
  (`<runs>/.jobs/<job>/code` is a link to it; older jobs have a copy of the whole clone there).

Every file in these folders is copied, with uncommitted changes and new files; hidden files, `__pycache__` and site.env
are not.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ftlib
from ftlib.core import files, log, permissions, trust
from ftlib.core.paths import REPOSITORY, Site, find_site
from ftlib.core.wait import wait_until
from ftlib.errors import EXIT_USER, UserError

if TYPE_CHECKING:  # with the config's schema it takes longer than a snapshot
    from ftlib.runs.run import Run

_PACKAGE = Path(ftlib.__file__).parent
_RUN_PINNED = (
    "import sys; sys.path[:] = [sys.argv.pop(1), *filter(None, sys.path)]; "  # '' is the working folder
    "from ftlib.__main__ import main; sys.exit(main())"
)
_SNAPSHOT_PARTS = ("ftlib", "jobs")
_SNAPSHOT_PREFIX = "code-"
_EXCLUDED = ("__pycache__", "site.env")


def _code_files(home: Path, part: str, pattern: str = "*") -> dict[str, Path]:
    """Path in a part of a clone → file, for every file that belongs to the code."""
    found = {path.relative_to(home / part): path for path in (home / part).rglob(pattern) if path.is_file()}
    return {
        str(name): path
        for name, path in sorted(found.items())
        if not any(word in _EXCLUDED or word.startswith(".") for word in name.parts)
    }


def _code_hashes(home: Path, part: str, pattern: str = "*") -> dict[str, str]:
    return {name: files.file_sha256(path) for name, path in _code_files(home, part, pattern).items()}


def _pin_code(home: Path, target: Path, parts: Sequence[str]) -> None:
    """Copy parts of a clone, or of the folder that the package is installed in.

    Raises:
        UserError: no space, or not writable.
    """
    with files.atomic_directory(target) as folder:
        for part in parts:
            for name, path in _code_files(home, part).items():
                copy = folder / part / name
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(path, copy)
        trust.remove_write_permission_of_others(folder)


def exec_pinned_code(run: Run, site: Site, arguments: list[str]) -> None:
    """Pin the running code to a new run; for an older run whose code differs, replace this process by that code.

    Args:
        site: is handed on, since pinned code is not beside jobs/site.env.
        arguments: the ftlib command line to run again.

    Raises:
        UserError: no space, not writable, or code that others could have written.
    """
    if _is_pinned(run):
        return
    target = run.code
    permissions.require_trusted(target, "the code that this run began with", site)
    log.warning(f"this run was started with a different version of ftlib; resuming with that version ({target})")
    os.environ.update(FTLIB_STORE=str(site.store), FTLIB_RUNS=str(site.runs))
    log.export_verbosity()  # not as -v or -q, which older code does not know
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # exec removes our handler; until there is one USR1 kills
    os.execv(sys.executable, [sys.executable, "-c", _RUN_PINNED, str(target), *arguments])


def require_pinned_code(run: Run, command: str) -> None:
    """Pin the running code to a new run; refuse an older run whose code differs, which needs a process of its own.

    Args:
        command: the ftlib command that does the same.

    Raises:
        UserError: the run's code differs, no space, or not writable.
    """
    if not _is_pinned(run):
        problem = f"{run.folder}: this run was started with a different version of ftlib, and this process has loaded"
        remedy = f"Use the command, which resumes with the run's own version: ftlib {command} {run.config_file}"
        raise UserError(f"{problem} version {ftlib.__version__} from {_PACKAGE}", remedy)


def _is_pinned(run: Run) -> bool:
    """Whether the running code is what the run started with; to a new run it is pinned now."""
    target = run.code
    if not files.is_complete(target) and log.is_main_process():
        _pin_code(_PACKAGE.parent, target, ["ftlib"])
        return True
    wait_until(lambda: files.is_complete(target), poll=0.2)  # the first rank copies it
    return _code_hashes(target, "ftlib") == _code_hashes(_PACKAGE.parent, "ftlib")


def find_clone() -> Path:
    """The clone with jobs/run.sh: the current folder, or the one that contains this package.

    Raises:
        UserError: there is none, or its code differs from the installed package.
    """
    for folder in (Path.cwd(), REPOSITORY):
        if (folder / "jobs" / "run.sh").is_file() and (folder / "ftlib").is_dir():
            break
    else:
        raise UserError("jobs/run.sh is not there", "Submit from a clone of the repository.")
    if _code_hashes(folder, "ftlib", "*.py") != _code_hashes(_PACKAGE.parent, "ftlib", "*.py"):
        problem = f"the code in {folder} is not what is installed here ({_PACKAGE})"
        raise UserError(problem, f"Reinstall it, preferably in editable mode: pip install -e {folder}")
    return folder


def snapshot_folder(home: Path, site: Site, parts: Sequence[str] = _SNAPSHOT_PARTS) -> Path:
    """Where the snapshot of a clone is, or will be."""
    return site.runs / ".jobs" / f"{_SNAPSHOT_PREFIX}{_digest(home, parts)}"


def _digest(home: Path, parts: Sequence[str]) -> str:
    return files.json_sha256({part: _code_hashes(home, part) for part in parts})[:12]


def take_snapshot(home: Path, target: Path, site: Site, parts: Sequence[str] = _SNAPSHOT_PARTS) -> None:
    """Copy a clone's code to its snapshot folder, unless it exists.

    Raises:
        UserError: no space, or not writable; or the existing one has changed, or others could have changed it.
    """
    permissions.open_jobs_folder(site)
    if not files.is_complete(target):
        _pin_code(home, target, parts)
    permissions.require_trusted(target, "the snapshot of the code", site)
    require_unchanged(target)
    os.utime(target)  # `ftlib clean` keeps what was used lately


def require_unchanged(target: Path) -> None:
    """Refuse a snapshot whose content does not have the hash in its name; other folders are accepted.

    Raises:
        UserError: the content has changed.
    """
    if not target.name.startswith(_SNAPSHOT_PREFIX):
        return
    parts = [path.name for path in target.iterdir() if path.is_dir()]
    if target.name != f"{_SNAPSHOT_PREFIX}{_digest(target, parts)}":
        problem = f"{target}: this snapshot of the code has been changed since it was made"
        raise UserError(problem, f"Remove it and submit again: rm -rf {shlex.quote(str(target))}")


def pin_data(run: Run, facts: dict[str, Any], prepared: str) -> None:
    """Record the data of a new run; a run that has a record must have the same rows.

    Args:
        prepared: the name of the folder in the store with the prepared data.

    Raises:
        UserError: the rows have changed.
    """
    verify_data_unchanged(run, facts)
    files.write_json(run.data, {**facts, "prepared": prepared})


def same_rows(facts: dict[str, Any], others: dict[str, Any]) -> bool:
    """Whether two prepared datasets have the same rows in each split, however and whenever they were prepared."""

    def of(known: dict[str, Any]) -> dict[str, str]:
        return {split: entry["fingerprint"] for split, entry in known["splits"].items()}

    return of(facts) == of(others)


def verify_data_unchanged(run: Run, facts: dict[str, Any]) -> None:
    """Refuse other data than a run started with: rows of its training set could be in the new test set.

    Args:
        facts: data.json of the prepared dataset, with the hashes of its rows.

    Raises:
        UserError: the rows have changed.
    """
    if run.data.exists() and not same_rows(facts, files.read_json(run.data)):
        raise UserError(
            f"{run.folder}: the dataset has changed since this run began",
            "Put the old data back, or give the config another name or seed to start a new run.",
        )


def pin_base(run: Run, hashes: dict[str, str]) -> None:
    """Record the content of a run's base model; a run that has a record must have the same model.

    For a run from an older version, which has no record, one is made now, and that is logged.

    Args:
        hashes: file → SHA-256, from `hub.cache.model_hashes`.

    Raises:
        UserError: a file has changed, is gone, or is new.
    """
    verify_base_unchanged(run, hashes)
    if run.base.exists() or not log.is_main_process():
        return
    if run.data.exists():
        log.warning(
            f"{run.folder}: the base model's content was not recorded when this run was started, so it cannot be "
            "compared; it is recorded now"
        )
    files.write_json(run.base, hashes)


def verify_base_unchanged(run: Run, hashes: dict[str, str]) -> None:
    """Refuse another base model than a run started with: its weights do not fit any other.

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
            f"{run.folder}: the base model is not the one that this run was started with: {told}",
            "Put the old files back, or give the config another name or seed to start a new run.",
        )


def main(home: str, *more: str) -> int:
    """`python3 -m ftlib.runs.pinning CLONE [FOLDER…]`: jobs/run.sh takes a snapshot, of more folders of the clone too.

    Prints its folder.
    """
    log.configure()
    parts = (*_SNAPSHOT_PARTS, *more)
    try:
        site = find_site()
        target = snapshot_folder(Path(home), site, parts)
        take_snapshot(Path(home), target, site, parts)
    except UserError as error:
        log.error(f"ftlib: {error}")
        return EXIT_USER
    print(target)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
