"""Atomic writes of files and directories, hashes, and checks of free space.

A file is written beside its target, flushed to disk and renamed, because rename is atomic on shared storage (NFS,
Lustre, GPFS), where file locks may have no effect. A directory is complete only with its marker, a JSON file with the
size and SHA-256 of every file in it. Secrets are masked (redaction.py) in all text that is written.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import glob
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ftlib.core import trust
from ftlib.core.environment import host_name
from ftlib.core.redaction import redact
from ftlib.core.text import format_size
from ftlib.errors import UserError

COMPLETE_MARKER = "COMPLETE.json"
TEMPORARY_PREFIX = ".tmp-"
"""Part of the names of unfinished files."""
_NOT_WRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST}
_NOT_USABLE = {*_NOT_WRITABLE, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG}
_ABANDONED_SECONDS = 24 * 3600
_OWN_NAME = re.compile(r"(?P<host>.+)-(?P<pid>[0-9]+)-[0-9a-f]{8}")


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def json_sha256(value: Any) -> str:
    """SHA-256 of a JSON value, independent of the order of its keys."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


_FAILED_WRITES = ("No space left", "unexpected pos ", "PytorchStreamWriter failed")
"""Messages of libraries that could not write all of a file; the last two are torch.save's."""


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn errors of a full or read-only storage into a UserError that names the path.

    Libraries wrap the system's error in their own types (torch: RuntimeError, safetensors: SafetensorError), so the
    message and the free space are checked as well.
    """
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        raise (_storage_user_error(error.errno, Path(error.filename or path)) or error) from None
    except Exception as error:
        told = next((number for number in NO_SPACE if f"os error {number})" in str(error)), None)
        failed = any(words in str(error) for words in _FAILED_WRITES)  # the space may be free again by now
        if told or failed or find_shortage(path, 1 << 20):
            raise _storage_user_error(told or errno.ENOSPC, path) from None  # type: ignore[misc]
        raise


def as_user_error(error: OSError) -> UserError | None:
    """The UserError for a file or folder that cannot be read or written; None for errors that a user cannot fix."""
    if not isinstance(error.filename, (str, bytes)) or error.errno is None:
        return None
    path = Path(os.fsdecode(error.filename))
    if error.errno in NO_SPACE:
        return _storage_user_error(error.errno, path)
    if error.errno in _NOT_USABLE:
        problem = f"{str(path)[:500]}: cannot be read or written ({os.strerror(error.errno)})"
        return UserError(problem, _REMEDIES.get(error.errno, _REMEDY))
    return None


_IN_THE_WAY = (
    "There is a file, or a dangling link, where a folder is needed. Move it away, or name another folder: FTLIB_STORE "
    "and FTLIB_RUNS in jobs/site.env or the environment."
)
_REMEDIES = {errno.ENOTDIR: _IN_THE_WAY, errno.EEXIST: _IN_THE_WAY}
_REMEDY = (
    "Choose a folder that you may write: FTLIB_STORE and FTLIB_RUNS in jobs/site.env or the environment, -o for what a "
    "command writes elsewhere, another current folder for logs/."
)


def _storage_user_error(number: int | None, path: Path) -> UserError | None:
    if number in NO_SPACE:
        remedy = "Free some space or raise the quota, then run the same command again: it resumes where it stopped."
        return UserError(f"{path}: no space left on the storage ({os.strerror(number or 0)})", remedy)
    if number in _NOT_WRITABLE:
        return UserError(f"{path}: not writable ({os.strerror(number or 0)})", _REMEDIES.get(number or 0, _REMEDY))
    return None


_FLUSHED_AT_ONCE = 8


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems cannot sync a folder
            raise
    finally:
        os.close(handle)


def write_text(path: Path, text: str, urls: bool = True) -> None:
    """Write a file atomically, creating its folder. Secrets are masked.

    Args:
        urls: also the user information of every URL, see `redact`.

    Raises:
        UserError: no space, or not writable.
    """
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = _temporary_path(path)
        try:
            with temporary.open("x", encoding="utf-8") as file:
                file.write(redact(text, urls=urls))
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync(path.parent)


def copy_file(source: Path, target: Path) -> None:
    """Copy a file atomically; a symbolic link at the target is replaced, not followed.

    Leftovers of killed writers are removed first.

    Raises:
        UserError: no space, or not writable.
    """
    with storage_errors(target):
        _remove_leftovers(target)
        temporary = _temporary_path(target)
        try:
            with source.open("rb") as given, temporary.open("xb") as file:
                shutil.copyfileobj(given, file, 1 << 20)
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any, urls: bool = True) -> None:
    """Write a JSON file atomically, see `write_text`."""
    write_text(path, json_text(value, indent=1) + "\n", urls)


def json_text(value: Any, indent: int | None = None) -> str:
    """JSON that can be encoded as UTF-8: lone surrogates, as in undecodable file names, are escaped."""
    return json.dumps(value, ensure_ascii=False, indent=indent).encode(errors="backslashreplace").decode()


def read_text(path: Path) -> str:
    """Read a text file.

    Raises:
        UserError: the file is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8: {error}") from None


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        UserError: the file is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        UserError: the file is not JSON, or holds something else.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError(f"{path}: must be a JSON object, got {json_text(content):.60}")
    return content


@contextlib.contextmanager
def atomic_directory(target: Path) -> Iterator[Path]:
    """Yield a temporary folder to fill; on success it is renamed to `target`, with its marker.

    An existing `target` is replaced, unless its content is the same. Leftovers of killed writers are removed first.

    Raises:
        UserError: no space, or not writable.
    """
    temporary = _temporary_path(target)
    try:
        with storage_errors(target):  # checks free space before the unfinished files, which may fill it, are removed
            target.parent.mkdir(parents=True, exist_ok=True)
            _remove_leftovers(target)
            temporary.mkdir()
            yield temporary
            _write_marker(temporary)
            _replace_directory(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _temporary_path(path: Path) -> Path:
    """An unpredictable name beside a path that contains the writer's host and process id."""
    return path.with_name(f"{path.name}{TEMPORARY_PREFIX}{host_name()}-{os.getpid()}-{uuid.uuid4().hex[:8]}")


def _remove_leftovers(target: Path) -> None:
    """Remove unfinished files of dead processes on this host, and those of other hosts after a day.

    Files with other names than `_temporary_path` gives are kept.
    """
    for leftover in target.parent.glob(f"{glob.escape(target.name)}{TEMPORARY_PREFIX}*"):
        ours = _OWN_NAME.fullmatch(leftover.name.removeprefix(f"{target.name}{TEMPORARY_PREFIX}"))
        if not ours:
            continue
        here = ours["host"] == host_name()
        if not Path(f"/proc/{ours['pid']}").exists() if here else _age(leftover) > _ABANDONED_SECONDS:
            with contextlib.suppress(OSError):
                leftover.unlink() if leftover.is_symlink() or leftover.is_file() else shutil.rmtree(leftover)


def _age(path: Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _write_marker(folder: Path) -> None:
    """Flush every file of a folder and write its marker last.

    Files get the folder's read permissions, because safetensors creates them for the owner alone, whatever the umask.
    They are hashed and flushed in parallel: on a network file system each flush waits for the server.
    """
    allowed = folder.stat().st_mode & 0o666
    paths = sorted(path for path in folder.rglob("*") if path.is_file())

    def finish(path: Path) -> dict[str, Any]:
        path.chmod(path.stat().st_mode & 0o7777 | allowed)
        _sync(path)
        return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}

    with ThreadPoolExecutor(_FLUSHED_AT_ONCE) as executor:
        entries = executor.map(finish, paths)
        content = {str(path.relative_to(folder)): entry for path, entry in zip(paths, entries, strict=True)}
    write_json(folder / COMPLETE_MARKER, content)
    for parent in sorted({path.parent for path in paths}):
        _sync(parent)


def _replace_directory(temporary: Path, target: Path) -> None:
    """Rename a finished folder to its target; another process may be doing the same."""
    marker = (temporary / COMPLETE_MARKER).read_bytes()
    while True:
        try:
            temporary.rename(target)
            break
        except OSError as error:
            # In a sticky folder the system reports EPERM or EACCES instead of "exists".
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.EPERM, errno.EACCES) or not target.exists():
                raise
        if is_complete(target, thorough=True) and (target / COMPLETE_MARKER).read_bytes() == marker:
            return
        old = _temporary_path(target)
        try:
            target.rename(old)
        except FileNotFoundError:
            pass
        except PermissionError:
            owner = trust.user_name(target.stat().st_uid)
            problem = f"{target}: is incomplete, or has other content, and belongs to {owner}"
            raise UserError(problem, "Only they, or the owner of the folder around it, can remove it.") from None
        shutil.rmtree(old, ignore_errors=True)
    _sync(target.parent)


def is_complete(folder: Path, thorough: bool = False) -> bool:
    """Whether a folder has its marker and all files in it have the right size (and hash, if `thorough`)."""
    marker = folder / COMPLETE_MARKER
    if not marker.is_file():
        return False
    for name, entry in read_json(marker).items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != entry["bytes"]:
            return False
        if thorough and file_sha256(path) != entry["sha256"]:
            return False
    return True


# Free-space checks before large writes.
#
# Free space alone is not enough, because a quota may be smaller. So the space is reserved with fallocate(2) and
# released at once, which hits the same limits as a write. Where the storage cannot reserve, only free space is checked.

NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
"""Error numbers of a full storage, a full quota and a file size limit."""
_KEEP_SIZE = 1
"""FALLOC_FL_KEEP_SIZE of fallocate(2)."""


def require_space(folder: Path, size: int) -> None:
    """Require that a folder's storage has space for `size` bytes.

    Raises:
        UserError: the storage is too full, or a quota too small.
    """
    if size > 0 and (limit := find_shortage(folder, size)):
        remedy = "Free some space (`ftlib clean`) or raise the quota; nothing has been written yet."
        raise UserError(f"{folder}: {format_size(size)} are needed and {limit}", remedy)


def find_shortage(folder: Path, size: int) -> str | None:
    """Why a folder's storage has no space for `size` more bytes; None if it seems to have."""
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < size:
        return f"only {format_size(free)} are free"
    return None if _can_reserve(folder, size) else "a quota leaves less"


def _can_reserve(path: Path, size: int) -> bool:
    """False only if the storage reports that there is no space."""
    libc = ctypes.CDLL(None, use_errno=True)
    fallocate = getattr(libc, "fallocate", None)  # posix_fallocate may write the bytes one block after another
    if fallocate is None or not os.access(path, os.W_OK):
        return True
    fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    try:
        with tempfile.NamedTemporaryFile(dir=path, prefix=".reserve-") as file:
            problem = ctypes.get_errno() if fallocate(file.fileno(), _KEEP_SIZE, 0, size) else 0
    except OSError as error:
        problem = error.errno or 0
    return problem not in NO_SPACE
