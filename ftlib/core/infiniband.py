"""InfiniBand and RoCE devices of a machine, and whether NCCL can use them, or does by its log.

NCCL reaches them through rdma-core's user libraries: libibverbs, and a provider for each kind of device (mlx5, …).
Without these it uses TCP sockets instead, many times slower, and reports that only in its own log.
"""

from __future__ import annotations

import ctypes
import os
import re
from pathlib import Path

_LIBRARY = "libibverbs.so.1"
_USING = re.compile("NCCL INFO Using network (.+)")
REMEDY = (
    "Install rdma-core's libraries (Debian and Ubuntu: libibverbs1 ibverbs-providers) in the image, which "
    "jobs/build.sbatch does, and start it with /dev (Apptainer's default)."
)


def active_devices(root: Path = Path("/")) -> list[str]:
    """The devices with an active port, such as mlx5_0."""
    states = sorted((root / "sys/class/infiniband").glob("*/ports/*/state"))
    return list(dict.fromkeys(path.parts[-4] for path in states if "ACTIVE" in _text(path)))


def find_obstacle(root: Path = Path("/"), library: str = _LIBRARY) -> str | None:
    """Why NCCL cannot use the devices and falls back to sockets; None if nothing was found."""
    if os.environ.get("NCCL_IB_DISABLE") == "1":
        return "NCCL_IB_DISABLE=1 is set"
    if os.environ.get("NCCL_NET", "").lower() == "socket":
        return "NCCL_NET=Socket is set"
    try:
        ctypes.CDLL(library)
    except OSError:
        return f"{library} is not installed here"
    if not any((root / "etc/libibverbs.d").glob("*.driver")):
        return "no provider is listed in /etc/libibverbs.d"
    if not any((root / "dev/infiniband").glob("uverbs*")):
        return "there is no /dev/infiniband/uverbs*"
    return None


def network_in_log(log: str) -> str | None:
    """The network that NCCL chose, such as IB, Socket or AWS Libfabric, by its log (NCCL_DEBUG=INFO); None: unknown."""
    found = _USING.search(log)
    return found[1].strip() if found else None


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
