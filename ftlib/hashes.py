"""SHA-256 of large files, computed once: the store remembers it by the file's size, modification time and inode.

`<store>/hashes/<folder's hash>.json` holds `{name: {"bytes", "mtime_ns", "inode", "sha256"}}`. A file that differs in
any of the first three is read again.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ftlib import console, files
from ftlib.errors import UserError
from ftlib.local_paths import stored_path
from ftlib.site import Site

_BLOB = re.compile(r"[0-9a-f]{64}")
_WORTH_A_WORD = 1 << 30
"""Bytes: reading so many takes seconds."""


def hash_files(folder: Path, names: Sequence[str], site: Site) -> dict[str, str]:
    """The SHA-256 of a folder's files, read only where the store does not know them."""
    record = _record(folder, site)
    known = files.read_json(record) if record.is_file() else {}
    facts = {name: _facts(folder / name) for name in names}
    missing = [name for name in names if not facts[name].items() <= known.get(name, {}).items()]
    # A blob's name holds until the file is seen to have changed.
    found = {name: blob for name in missing if name not in known and (blob := blob_name(folder / name))}
    unread = [name for name in missing if name not in found]
    size = sum(facts[name]["bytes"] for name in unread)
    if size >= _WORTH_A_WORD:
        console.say(f"{folder}: hashing {size / 1e9:.1f} GB, once")
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        found |= dict(zip(unread, pool.map(lambda name: files.sha256(folder / name), unread), strict=True))
    remember(folder, found, site, facts)
    return {name: found.get(name) or known[name]["sha256"] for name in names}


def remember(
    folder: Path, hashes: Mapping[str, str], site: Site, facts: Mapping[str, dict[str, Any]] | None = None
) -> None:
    """Keep hashes that are known in the store, if it can be written to.

    Args:
        facts: of the files as they were before they were hashed; without them, as they are.
    """
    if not hashes:
        return
    record = _record(folder, site)
    facts = facts or {name: _facts(folder / name) for name in hashes}
    known = files.read_json(record) if record.is_file() else {}
    added = {name: {**facts[name], "sha256": digest} for name, digest in hashes.items()}
    with contextlib.suppress(UserError), files.shared_with_group():
        files.write_json(record, {**known, **added})


def _record(folder: Path, site: Site) -> Path:
    """Below the store a folder is known by its place in there, so that the store may be moved."""
    place = stored_path(folder.resolve(), site.store)
    return site.store / "hashes" / f"{files.fingerprint(place)[:24]}.json"


def _facts(path: Path) -> dict[str, Any]:
    stat = path.stat()
    return {"bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns, "inode": stat.st_ino}


def blob_name(path: Path) -> str | None:
    """What huggingface_hub's cache calls a large file: its SHA-256, with the file's name as a link to it."""
    name = path.resolve().name
    return name if path.is_symlink() and _BLOB.fullmatch(name) else None
