"""Several GPUs, of one node or more: a process for each, started by Slurm as the tasks of a step.

They are joined by torch.distributed. Alone, everything here does nothing. Every function must be called by all ranks,
or by none.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from datetime import timedelta
from typing import TypeVar

import torch
from torch import Tensor, distributed

from ftlib.core import log
from ftlib.core.job_memory import job_memory
from ftlib.errors import RankLost, UserError
from ftlib.models.loading import device

T = TypeVar("T")
_TIMED_OUT = re.compile("timed out|timeout", re.IGNORECASE)
"""gloo says "Timed out waiting" or "Application timeout", as it happens."""

_CONNECTION_LOST = re.compile(
    "connection (was )?(closed|reset)|broken pipe|ncclRemoteError|remote process exit", re.IGNORECASE
)
"""Of gloo's, NCCL's and the store's words."""

_FIRST_PORT, _PORTS = 12_000, 20_000
"""Below the ports that Linux hands out by itself (32768 and above)."""


@contextlib.contextmanager
def process_group(timeout: float) -> Iterator[None]:
    """What is done inside, the ranks of this job do as one group, if there are several.

    The variables that torch and accelerate look for follow from Slurm's; MASTER_ADDR and MASTER_PORT may be set.
    jobs/run.sh names the first of several nodes as MASTER_ADDR.

    Args:
        timeout: seconds until a rank that waits for another in vain fails.

    Raises:
        UserError: several nodes, and no word of where they meet.
        RankLost: another rank did not come in time, or is gone.
    """
    try:
        _init_process_group(timeout)
        yield
    except RuntimeError as error:
        if log.rank_and_world_size()[1] == 1:
            raise
        if _TIMED_OUT.search(str(error)):
            raise RankLost(f"another task did not answer for {timeout:g} s (training.ddp_timeout)") from error
        if _CONNECTION_LOST.search(str(error)):
            raise RankLost(f"another task of this job is gone; {job_memory()}") from error
        raise
    if distributed.is_initialized():  # after a failure the others might never come to it
        distributed.destroy_process_group()


def _init_process_group(timeout: float) -> None:
    rank, world = log.rank_and_world_size()
    if world == 1 or distributed.is_initialized():
        return
    if int(os.environ.get("SLURM_STEP_NUM_NODES", 1)) > 1 and "MASTER_ADDR" not in os.environ:
        problem = "this step is on several nodes, and MASTER_ADDR is not set"
        raise UserError(problem, "Start it by ftlib submit or jobs/train.sbatch, or set MASTER_ADDR to the first node.")
    here = device()
    job, step = (int(os.environ.get(name, 0)) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(here.index or 0))
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", str(_FIRST_PORT + (17 * job + step) % _PORTS))
    if here.type == "cuda":
        torch.cuda.set_device(here)
    distributed.init_process_group("nccl" if here.type == "cuda" else "gloo", timeout=timedelta(seconds=timeout))


def all_reduce_sum(value: Tensor) -> Tensor:
    """The sum of all ranks' values."""
    if distributed.is_initialized():
        value = value.to(device())
        distributed.all_reduce(value)
    return value


def all_reduce_max(*values: int) -> list[int]:
    """Of each value the highest that any rank has."""
    if not distributed.is_initialized():
        return list(values)
    shared = torch.tensor(values, device=device())
    distributed.all_reduce(shared, distributed.ReduceOp.MAX)
    return [int(value) for value in shared]


def broadcast_object(value: T) -> T:
    """The first rank's value."""
    if not distributed.is_initialized():
        return value
    box = [value]
    distributed.broadcast_object_list(box, device=device())
    return box[0]


def barrier() -> None:
    """Go on when all ranks have come here."""
    all_reduce_max(0)
