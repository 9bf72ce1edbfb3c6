"""Is there room? Asked before something large is written, so that a job does not fail in its last hour.

Free space alone does not tell: a quota may be smaller. So the space is reserved and given back at once, which meets
every limit that a write would meet, without writing (fallocate(2)). Where the storage cannot reserve, free space has to
do.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import tempfile
from pathlib import Path

from ftlib.errors import UserError

NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
"""What the system answers on a full storage, a full quota and a limit for one file."""
_KEEP_SIZE = 1
"""FALLOC_FL_KEEP_SIZE of fallocate(2)."""


def require_space(folder: Path, size: int) -> None:
    """Refuse if a folder's storage has no room for so many bytes.

    Raises:
        UserError: the storage is too full, or a quota too small.
    """
    if size > 0 and (limit := shortage(folder, size)):
        remedy = "Free some space (`ftlib clean`) or raise the quota; nothing has been written yet."
        raise UserError(f"{folder}: {_amount(size)} are needed and {limit}", remedy)


def shortage(folder: Path, size: int) -> str | None:
    """Why a folder's storage cannot take so many bytes more; None if nothing is known against it."""
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < size:
        return f"only {_amount(free)} are free"
    return None if _can_reserve(folder, size) else "a quota leaves less"


def _amount(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def _can_reserve(place: Path, size: int) -> bool:
    """False only if the storage says that there is no room."""
    libc = ctypes.CDLL(None, use_errno=True)
    fallocate = getattr(libc, "fallocate", None)  # posix_fallocate may write the bytes one block after another
    if fallocate is None or not os.access(place, os.W_OK):
        return True
    fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    try:
        with tempfile.NamedTemporaryFile(dir=place, prefix=".reserve-") as file:
            problem = ctypes.get_errno() if fallocate(file.fileno(), _KEEP_SIZE, 0, size) else 0
    except OSError as error:
        problem = error.errno or 0
    return problem not in NO_SPACE
