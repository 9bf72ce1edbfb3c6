"""The header of a safetensors file, without torch: eight bytes with its length, then JSON, then the data.

github.com/huggingface/safetensors, "Format".
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ftlib.errors import UserError

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def read_safetensors_header(path: Path) -> tuple[dict[str, dict[str, Any]], int]:
    """What a file says of its tensors.

    Returns:
        Tensor → {"dtype", "shape", "data_offsets"}, and the byte from which on offsets count.

    Raises:
        UserError: damaged, cut short, or a git-lfs pointer.
    """
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            head = file.read(len(_LFS_POINTER))
            if head == _LFS_POINTER:
                raise UserError(f"{path}: a git-lfs pointer, not the file itself", "Run `git lfs pull` in its clone.")
            length = int.from_bytes(head[:8], "little")
            if length > size:
                raise ValueError("its header would be longer than the file")
            file.seek(8)
            header: dict[str, Any] = json.loads(file.read(length))
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        end = 8 + length + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, MemoryError, OverflowError) as error:
        raise UserError(f"{path}: not a safetensors file: {error}") from None
    if size != end:
        raise UserError(f"{path}: {size:,} bytes, but its header tells of {end:,}: it is damaged")
    return entries, 8 + length
