"""Training on several GPUs, on one node or more: one process per GPU, started by Slurm as the tasks of a step.

The processes form a torch.distributed group. With a single process everything here is a no-op. Every function must be
called by all ranks, or by none.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import tempfile
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from itertools import compress
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, distributed

from ftlib.core import infiniband, log
from ftlib.core.job_memory import job_memory
from ftlib.errors import RankLost, UserError
from ftlib.models import sharding
from ftlib.models.loading import device

T = TypeVar("T")
_TIMED_OUT = re.compile("timed out|timeout", re.IGNORECASE)
"""Messages of gloo: "Timed out waiting" or "Application timeout"."""

_CONNECTION_LOST = re.compile(
    "connection (was )?(closed|reset)|broken pipe|ncclRemoteError|remote process exit", re.IGNORECASE
)
"""Messages of gloo, NCCL and the TCP store."""

_peers: list[tuple[str, str, int]] = []
"""Host, PID namespace and PID of every rank."""

_FIRST_PORT, _PORTS = 12_000, 20_000
"""Below Linux's ephemeral ports (32768 and above)."""


@contextlib.contextmanager
def process_group(timeout: float) -> Iterator[None]:
    """Context in which the ranks of this job form one process group, if there are several.

    The variables that torch and accelerate read are derived from Slurm's; MASTER_ADDR and MASTER_PORT may be set.
    jobs/run.sh sets MASTER_ADDR to the first of several nodes.

    Args:
        timeout: seconds until a rank that waits for another fails.

    Raises:
        UserError: several nodes, and MASTER_ADDR is not set; or another program uses the port.
        RankLost: another rank did not respond in time, or has died.
    """
    try:
        _init_process_group(timeout)
        yield
    except RuntimeError as error:
        if log.rank_and_world_size()[1] == 1:
            raise
        if "EADDRINUSE" in str(error):
            problem = (
                f"port {os.environ['MASTER_PORT']}, by which the tasks of this job meet, is in use on {_place()[0]}"
            )
            raise UserError(problem, "Set MASTER_PORT to another one, or submit again.") from error
        if _TIMED_OUT.search(str(error)):
            raise RankLost(f"another task did not respond for {timeout:g} s (training.ddp_timeout)") from error
        if _CONNECTION_LOST.search(str(error)):
            raise RankLost(f"another task of this job is gone{_name_lost()}; {job_memory()}") from error
        raise
    if distributed.is_initialized():  # not after a failure: other ranks might never reach this call
        distributed.destroy_process_group()


def _init_process_group(timeout: float) -> None:
    rank, world = log.rank_and_world_size()
    if world == 1 or distributed.is_initialized():
        return
    if int(os.environ.get("SLURM_STEP_NUM_NODES", 1)) > 1 and "MASTER_ADDR" not in os.environ:
        problem = "this job step runs on several nodes, but MASTER_ADDR is not set"
        raise UserError(problem, "Start it with ftlib submit or jobs/train.sbatch, or set MASTER_ADDR.")
    here = device()
    job, step = (int(os.environ.get(name, 0)) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(here.index or 0))
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", str(_FIRST_PORT + (17 * job + step) % _PORTS))
    if here.type == "cuda":
        torch.cuda.set_device(here)
    with warn_of_sockets() if here.type == "cuda" else contextlib.nullcontext():
        distributed.init_process_group("nccl" if here.type == "cuda" else "gloo", timeout=timedelta(seconds=timeout))
        _peers[:] = [("", "", 0)] * world
        distributed.all_gather_object(_peers, (*_place(), os.getpid()))


@contextlib.contextmanager
def warn_of_sockets(root: Path = Path("/")) -> Iterator[None]:
    """Context for the first communication: warn on the first rank of a job on several nodes if NCCL uses TCP sockets
    although the node has InfiniBand.

    NCCL's choice is read in its log, which goes to a temporary file, unless the user has set NCCL_DEBUG: then what NCCL
    needs for InfiniBand is checked instead.
    """
    several = int(os.environ.get("SLURM_STEP_NUM_NODES", 1)) > 1
    devices = infiniband.active_devices(root) if several and log.is_main_process() else []
    if not devices:
        yield
        return
    network = None
    if "NCCL_DEBUG" in os.environ:
        yield
    else:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            file = Path(folder) / "nccl.log"
            settings = {"NCCL_DEBUG": "INFO", "NCCL_DEBUG_SUBSYS": "INIT", "NCCL_DEBUG_FILE": str(file)}
            os.environ.update(settings)
            try:
                yield
            finally:
                for name in settings:
                    del os.environ[name]
            if file.exists():
                network = infiniband.network_in_log(file.read_text(errors="replace"))
    fault = infiniband.find_obstacle(root)
    if network == "Socket" or (network is None and fault):
        reason = fault or "NCCL_DEBUG=INFO shows why"
        slower = f"several times slower than {', '.join(devices)}"
        log.warning(f"NCCL uses TCP sockets between the nodes, {slower}: {reason}")
        if fault:
            log.warning(infiniband.REMEDY)


def _place() -> tuple[str, str]:
    return socket.gethostname(), str(Path("/proc/self/ns/pid").readlink())


def _name_lost() -> str:
    """Name the tasks whose processes have ended, for a message; of other nodes only the nodes are known."""
    for _ in range(20):  # a killed process closes its connections a moment before it ends
        if lost := [rank for rank, (*place, pid) in enumerate(_peers) if (*place,) == _place() and _has_ended(pid)]:
            return f": task {', '.join(map(str, lost))} on {_place()[0]}"
        time.sleep(0.05)
    elsewhere = sorted({host for host, *_ in _peers} - {_place()[0]})
    return f": one on {' or '.join(elsewhere)}" if elsewhere else ""


def _has_ended(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return True
    return state in ("Z", "X")


def all_reduce_sum(value: Tensor) -> Tensor:
    """Return the sum over all ranks."""
    if distributed.is_initialized():
        value = value.to(device())
        distributed.all_reduce(value)
    return value


def all_reduce_max(*values: int) -> list[int]:
    """Return the maximum of each value over all ranks."""
    if not distributed.is_initialized():
        return list(values)
    shared = torch.tensor(values, device=device())
    distributed.all_reduce(shared, distributed.ReduceOp.MAX)
    found: list[int] = shared.tolist()
    return found


def average_gradients(parameters: Sequence[torch.nn.Parameter]) -> None:
    """Replace gradients by their mean over all ranks, as DDP does.

    A parameter that has a gradient on some ranks only gets zeros on the others.
    """
    used = all_reduce_max(*(int(parameter.grad is not None) for parameter in parameters))
    for parameter in compress(parameters, used):
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    sharding.average_gradients(compress(parameters, used))


def broadcast_object(value: T) -> T:
    """Return rank 0's value."""
    if not distributed.is_initialized():
        return value
    box = [value]
    distributed.broadcast_object_list(box, device=device())
    return box[0]


@contextlib.contextmanager
def in_turns(enabled: bool = True) -> Iterator[None]:
    """Context that the ranks of a node enter one after the other; they must not communicate inside.

    So a node needs memory for loading one whole model, not one for each GPU.
    """
    local, turns = int(os.environ.get("SLURM_LOCALID", 0)), 1
    if enabled and distributed.is_initialized():
        turns = all_reduce_max(local + 1)[0]
    for turn in range(turns):
        if turn == local or turns == 1:
            yield
        if turns > 1:
            barrier()


def barrier() -> None:
    """Wait until all ranks have called this."""
    all_reduce_max(0)
