"""Files that appear whole or not at all, and logs that survive a torn last line.

Every write goes beside its target, is flushed to the disk and then renamed, since shared storage (NFS, Lustre, GPFS)
keeps that promise where file locks may silently do nothing. A folder is complete only with its marker, a JSON file
with the size and SHA-256 of every file in it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ftlib import disk
from ftlib.errors import UserError

MARKER = "COMPLETE.json"
TEMPORARY = ".tmp-"
"""In the name of what is being written."""
_NOT_WRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST}
_ABANDONED_SECONDS = 24 * 3600


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def fingerprint(value: Any) -> str:
    """SHA-256 of a JSON value, independent of the order of its keys."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


@contextlib.contextmanager
def storage_errors(place: Path) -> Iterator[None]:
    """Turn a full or read-only storage into a UserError that names the place.

    Libraries wrap the system's error in their own types (torch: RuntimeError, safetensors: SafetensorError), so their
    text and the room that is left are looked at as well.
    """
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        raise (_explain(error.errno, Path(error.filename or place)) or error) from None
    except Exception as error:
        if "No space left" in str(error) or "os error 28" in str(error) or disk.shortage(place, 1 << 20):
            raise _explain(errno.ENOSPC, place) from None  # type: ignore[misc]
        raise


def _explain(number: int | None, place: Path) -> UserError | None:
    if number in disk.NO_SPACE:
        remedy = "Free some space or raise the quota, then run the same command again: it goes on where it stopped."
        return UserError(f"{place}: no space left on the storage ({os.strerror(number or 0)})", remedy)
    if number in _NOT_WRITABLE:
        remedy = "Set FTLIB_STORE (and FTLIB_RUNS) in jobs/site.env or the environment to folders that you may write."
        return UserError(f"{place}: not writable ({os.strerror(number or 0)})", remedy)
    return None


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems cannot sync a folder
            raise
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all, creating its folder.

    Raises:
        UserError: no space, or not writable.
    """
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = _temporary(path)
        try:
            with temporary.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole or not at all."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=1) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        UserError: the file is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None


@contextlib.contextmanager
def shared_with_group() -> Iterator[None]:
    """What is made inside can be read and replaced by the group, whatever the user's umask."""
    before = os.umask(0o002)
    try:
        yield
    finally:
        os.umask(before)


@contextlib.contextmanager
def publish_folder(target: Path) -> Iterator[Path]:
    """Fill a temporary folder in the body; it then appears as `target`, complete with its marker, or not at all.

    An older `target` is replaced, unless its content is the same. Leftovers of killed writers are removed first.

    Raises:
        UserError: no space, or not writable.
    """
    temporary = _temporary(target)
    try:
        with storage_errors(target):  # looks for room before the unfinished files, which may have taken it, are removed
            target.parent.mkdir(parents=True, exist_ok=True)
            _remove_leftovers(target)
            temporary.mkdir()
            yield temporary
            _seal(temporary)
            _swap(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _temporary(path: Path) -> Path:
    """A name beside a path that says whose it is."""
    return path.with_name(f"{path.name}{TEMPORARY}{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}")


def _remove_leftovers(target: Path) -> None:
    """Remove temporary folders of dead processes of this host, and of other hosts once they are a day old."""
    for leftover in target.parent.glob(f"{target.name}{TEMPORARY}*"):
        host, pid, _ = leftover.name.partition(TEMPORARY)[2].rsplit("-", 2)
        here = host == socket.gethostname()
        if not Path(f"/proc/{pid}").exists() if here else _age(leftover) > _ABANDONED_SECONDS:
            shutil.rmtree(leftover, ignore_errors=True)


def _age(path: Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _seal(folder: Path) -> None:
    """Flush every file of a folder and write its marker last.

    Whoever may enter the folder may read its files: safetensors makes them for their owner alone, whatever the umask.
    """
    content, allowed = {}, folder.stat().st_mode & 0o666
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            content[str(path.relative_to(folder))] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
            path.chmod(path.stat().st_mode & 0o7777 | allowed)
            _sync(path)
    write_json(folder / MARKER, content)
    for path in sorted({folder / name for name in content}):
        _sync(path.parent)


def _swap(temporary: Path, target: Path) -> None:
    """Rename a sealed folder to its place; somebody else may be doing the same."""
    marker = (temporary / MARKER).read_bytes()
    while True:
        try:
            temporary.rename(target)
            break
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        if is_complete(target, thorough=True) and (target / MARKER).read_bytes() == marker:
            return
        old = _temporary(target)
        with contextlib.suppress(FileNotFoundError):
            target.rename(old)
        shutil.rmtree(old, ignore_errors=True)
    _sync(target.parent)


def is_complete(folder: Path, thorough: bool = False) -> bool:
    """Whether a published folder is whole: every file of its marker there with its size (and hash, if `thorough`)."""
    marker = folder / MARKER
    if not marker.is_file():
        return False
    for name, entry in read_json(marker).items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != entry["bytes"]:
            return False
        if thorough and sha256(path) != entry["sha256"]:
            return False
    return True


def append_jsonl(path: Path, record: dict[str, Any]) -> None:
    """Add one line to a JSONL log; what a writer tore before it stays a line of its own.

    Raises:
        UserError: no space, or not writable.
    """
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b") as file:
            torn = False
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                torn = file.read() != b"\n"
            file.write(b"\n" * torn + json.dumps(record, ensure_ascii=False).encode() + b"\n")


def read_jsonl_log(path: Path) -> list[dict[str, Any]]:
    """Read a JSONL log of ftlib's own; torn lines, left by killed writers or a full storage, are dropped."""
    return jsonl_records(path.read_bytes()) if path.exists() else []


def jsonl_records(text: bytes) -> list[dict[str, Any]]:
    """The records of a JSONL log's text: of every line that is whole."""
    records = []
    for line in text.split(b"\n")[:-1]:
        with contextlib.suppress(ValueError):
            records.append(json.loads(line))
    return records


def cut_jsonl_log(path: Path, keep: Callable[[dict[str, Any]], bool] = lambda record: True) -> None:
    """Drop torn lines, and every record that is not to be kept; without any, the file is left as it is."""
    if not path.exists():
        return
    before = path.read_bytes()
    records = filter(keep, jsonl_records(before))
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    if text.encode() != before:
        write_text(path, text)
