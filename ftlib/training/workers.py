"""Explain the death of a DataLoader worker: which one, by which signal, the job's memory, and what to change.

torch only reports a process ID, or a broken pipe if the worker died while it sent rows.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import re
import shutil
import signal
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from ftlib.core.job_memory import job_memory
from ftlib.core.text import format_gib
from ftlib.core.wait import wait_until
from ftlib.errors import UserError

_PATIENCE_SECONDS = 2.0
"""Seconds to wait for a worker's exit code, which arrives a little later than the end of its pipe."""

_OF_WORKERS = re.compile(r"DataLoader worker|Pin memory thread|items of ancdata")
_FULL_SHM = re.compile(r"</torch_|shared memory ?\(shm\)|out of shared memory")
_SHM = Path("/dev/shm")


@contextlib.contextmanager
def explain_worker_death() -> Iterator[None]:
    """Context that turns errors of DataLoader workers into UserErrors, and ends the workers when it is left.

    Otherwise the traceback of an error keeps them, and they ignore the SIGTERM that multiprocessing sends at exit.

    Raises:
        UserError: a worker died, or /dev/shm is full; or the UserError of a worker, without torch's traceback.
    """
    kills, others = job_memory().oom_kills, multiprocessing.active_children()
    try:
        yield
    except UserError as error:
        raise UserError(error.problem.rpartition("ftlib.errors.UserError: ")[2].strip(), error.remedy) from None
    except (RuntimeError, OSError, EOFError) as error:
        full = bool(_FULL_SHM.search(str(error)))
        of_workers = full or isinstance(error, (OSError, EOFError)) or _OF_WORKERS.search(str(error))
        dead = _dead_workers() if of_workers else []
        if not dead and not full:
            raise
        raise _worker_death(dead, full, kills) from None
    finally:
        if set(multiprocessing.active_children()) - set(others):
            for loader in _loaders():
                if not set(loader._workers) & set(others):
                    loader._shutdown_workers()


def _loaders() -> list[_MultiProcessingDataLoaderIter]:
    """Return the iterators with workers; the garbage collector knows them, also if an error keeps them."""
    return [one for one in gc.get_objects() if issubclass(type(one), _MultiProcessingDataLoaderIter)]


def _dead_workers() -> list[tuple[int, BaseProcess]]:
    """Return (number, process) of every worker that failed; torch may raise the error anywhere in a step."""
    workers = [pair for loader in _loaders() for pair in enumerate(loader._workers)]

    def dead() -> list[tuple[int, BaseProcess]]:
        return [(number, process) for number, process in workers if process.exitcode]

    return wait_until(dead, poll=0.05, timeout=_PATIENCE_SECONDS if workers else 0)


def _worker_death(dead: list[tuple[int, BaseProcess]], full: bool, kills: int) -> UserError:
    """Return the error with its likely cause.

    Args:
        full: whether /dev/shm was full.
        kills: the job's OOM kills by the kernel before this error.
    """
    told = "; ".join(_end(number, process) for number, process in dead) or "a data-loading worker failed"
    ends = {process.exitcode for _, process in dead}
    memory = job_memory()
    if memory.oom_kills > kills:
        cause = ": the job's memory ran out"
    elif full or -signal.SIGBUS in ends:
        cause = f": /dev/shm is full{_shm_space()}"
    elif -signal.SIGKILL in ends:
        cause = ": the usual reason is that memory ran out"
    else:
        return UserError(told, "Set training.dataloader_num_workers: 0: the training process then raises the error.")
    return UserError(
        f"{told}{cause}; {memory}",
        "Request more memory with job.mem (sbatch --mem=…), or lower training.dataloader_num_workers or "
        "training.dataloader_prefetch_factor. The same command resumes from the last checkpoint.",
    )


def _end(number: int, process: BaseProcess) -> str:
    code = process.exitcode or 0
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    return f"data-loading worker {number} (process {process.pid}) {how}"


def _shm_space() -> str:
    if not _SHM.is_dir():
        return ""
    size = shutil.disk_usage(_SHM)
    return f" ({size.used / 2**30:.1f} of {format_gib(size.total, 1)})"
