"""SHA-256 of large files, computed once: the store remembers it by the file's size, modification time and inode.

`<store>/hashes/<folder's hash>.json` holds `{name: {"bytes", "mtime_ns", "inode", "sha256"}}`. A file that differs in
any of the first three is read again. What else was found out about files is remembered in the same way (`record_of`).
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ftlib.core import files, log, permissions
from ftlib.core.paths import Site, stored_path
from ftlib.core.text import format_size
from ftlib.errors import UserError

_BLOB = re.compile(r"[0-9a-f]{64}")
_ANNOUNCED_BYTES = 1 << 30
"""Reading this many bytes takes seconds, so it is logged."""


def hash_files(folder: Path, names: Sequence[str], site: Site) -> dict[str, str]:
    """The SHA-256 of a folder's files; only files without a hash in the store are read."""
    record = _record_path(folder, site)
    known = files.read_json(record) if record.is_file() else {}
    facts = {name: _file_stat(folder / name) for name in names}
    missing = [name for name in names if not facts[name].items() <= known.get(name, {}).items()]
    # A blob's name is its hash, unless the file has changed since it was recorded.
    found = {name: blob for name in missing if name not in known and (blob := blob_name(folder / name))}
    unread = [name for name in missing if name not in found]
    size = sum(facts[name]["bytes"] for name in unread)
    if size >= _ANNOUNCED_BYTES:
        log.info(f"{folder}: hashing {format_size(size)}, once")
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        found |= dict(zip(unread, pool.map(lambda name: files.file_sha256(folder / name), unread), strict=True))
    store_hashes(folder, found, site, facts)
    return {name: found.get(name) or known[name]["sha256"] for name in names}


def recorded_hash(path: Path, site: Site) -> str | None:
    """The SHA-256 that the store last knew a file by, also if the file is gone since; None if it never knew it."""
    record = _record_path(path.parent, site)
    entry = files.read_json(record).get(path.name) if record.is_file() else None
    return entry["sha256"] if entry else None


def store_hashes(
    folder: Path, hashes: Mapping[str, str], site: Site, facts: Mapping[str, dict[str, Any]] | None = None
) -> None:
    """Record hashes in the store, if it is writable.

    Args:
        facts: size, time and inode of the files before they were hashed; default: the current ones.
    """
    if not hashes:
        return
    record = _record_path(folder, site)
    facts = facts or {name: _file_stat(folder / name) for name in hashes}
    known = files.read_json(record) if record.is_file() else {}
    added = {name: {**facts[name], "sha256": digest} for name, digest in hashes.items()}
    write_record(record, {**known, **added}, site)


def record_of(folder: Path, names: Sequence[str], facts: Any, site: Site) -> Path | None:
    """The file of the store that exists if something has been found out about files that have not changed since.

    Args:
        names: of files in the folder; or absolute paths.
        facts: what was found out, and how, as JSON.

    Returns:
        None if one of the files cannot be found.
    """
    try:
        with ThreadPoolExecutor(32) as pool:  # a network file system answers many at a time
            stats = list(pool.map(lambda name: _file_stat(folder / name), names))
    except OSError:
        return None
    return site.store / "hashes" / f"{files.json_sha256([facts, list(zip(names, stats, strict=True))])[:24]}.json"


def write_record(record: Path, facts: Any, site: Site) -> None:
    """Write a file in the store, if that is writable."""
    with contextlib.suppress(UserError), permissions.group_writable(site):
        files.write_json(record, facts)


def _record_path(folder: Path, site: Site) -> Path:
    """Folders in the store are identified by their path relative to it, so that the store can be moved."""
    place = stored_path(folder.resolve(), site.store)
    return site.store / "hashes" / f"{files.json_sha256(place)[:24]}.json"


def _file_stat(path: Path) -> dict[str, Any]:
    stat = path.stat()
    return {"bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns, "inode": stat.st_ino}


def blob_name(path: Path) -> str | None:
    """The SHA-256 of a large file in huggingface_hub's cache, where the file is a link to a blob of that name."""
    name = path.resolve().name
    return name if path.is_symlink() and _BLOB.fullmatch(name) else None
