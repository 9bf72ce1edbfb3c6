"""Data-loading workers that die: which one, of what, and what to change."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import get_worker_info

from ftlib.core.job_memory import JobMemory
from ftlib.errors import UserError
from ftlib.training import workers
from ftlib.training.data import SupervisedDataset
from ftlib.training.workers import explain_worker_death
from tests.conftest import LORA

Ftlib = Callable[..., tuple[int, str, str]]
TWO = ("training.dataloader_num_workers=2", "training.dataloader_prefetch_factor=1")


def dying(how: Callable[[], Any]) -> Callable[[SupervisedDataset, int], Any]:
    """`SupervisedDataset.__getitem__` with which worker 1 dies at its third row."""
    real, seen = SupervisedDataset.__getitem__, [0]

    def row(rows: SupervisedDataset, index: int) -> Any:
        info = get_worker_info()
        seen[0] += 1
        if info and info.id == 1 and seen[0] == 3:
            how()
        return real(rows, index)

    return row


@pytest.mark.parametrize(
    ("number", "told", "remedy"),
    [
        (signal.SIGKILL, "was killed by SIGKILL: the usual reason is that memory ran out; the job has ", "job.mem"),
        (signal.SIGBUS, "was killed by SIGBUS: /dev/shm is full", "dataloader_num_workers"),
        (signal.SIGSEGV, "was killed by SIGSEGV\n", "dataloader_num_workers: 0"),
    ],
    ids=str,
)
def test_of_a_signal(
    store: Path,
    write_config: Callable[..., Path],
    ftlib: Ftlib,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
    told: str,
    remedy: str,
) -> None:
    config = write_config(LORA)
    assert ftlib("prepare", config)[0] == 0
    monkeypatch.setattr(SupervisedDataset, "__getitem__", dying(lambda: os.kill(os.getpid(), number)))
    code, _, error = ftlib("train", config, *TWO)
    assert code == 2 and "data-loading worker 1 (process " in error and told in error and remedy in error, error
    assert "Traceback" not in error


def test_of_memory_by_the_kernels_count(
    store: Path, write_config: Callable[..., Path], ftlib: Ftlib, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_config(LORA)
    assert ftlib("prepare", config)[0] == 0
    counts = iter([4, 5])
    found = lambda: JobMemory(1 << 30, "memory.max of its cgroup", 1 << 30, 1 << 29, next(counts))  # noqa: E731
    monkeypatch.setattr(workers, "job_memory", found)
    monkeypatch.setattr(SupervisedDataset, "__getitem__", dying(lambda: os.kill(os.getpid(), signal.SIGKILL)))
    code, _, error = ftlib("train", config, *TWO)
    assert code == 2 and "SIGKILL: the job's memory ran out; the job has 1.0 GiB of memory (memory.max" in error
    assert "0.5 GiB are in /dev/shm and other tmpfs, which counts" in error


def test_an_exit_is_told_and_an_error_of_the_rows_own_stays(
    store: Path, write_config: Callable[..., Path], ftlib: Ftlib, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_config(LORA)
    assert ftlib("prepare", config)[0] == 0
    with monkeypatch.context() as context:
        context.setattr(SupervisedDataset, "__getitem__", dying(lambda: os._exit(3)))
        code, _, error = ftlib("train", config, *TWO)
    assert code == 2 and "ended with exit code 3" in error and "Traceback" not in error

    def fail() -> None:
        raise RuntimeError("of its own")

    monkeypatch.setattr(workers, "_PATIENCE_SECONDS", 0.2)
    monkeypatch.setattr(SupervisedDataset, "__getitem__", dying(fail))
    with pytest.raises(RuntimeError, match="of its own"):
        ftlib("train", config, *TWO)


def test_other_errors_stay_and_a_full_shm_needs_no_death() -> None:
    for error in (RuntimeError("CUDA error: device-side assert"), EOFError(), OSError("pipe")):
        with pytest.raises(type(error)) as kept, explain_worker_death():
            raise error
        assert kept.value is error
    for words in (
        "unable to write to file </torch_81_1>: No space left on device (28)",
        "Caught RuntimeError in DataLoader worker process 0.\nunable to allocate shared memory(shm) for </torch_7>",
    ):
        with pytest.raises(UserError, match=r"a data-loading worker failed: /dev/shm is full"), explain_worker_death():
            raise RuntimeError(words)


def test_what_a_worker_finds_is_told_without_a_traceback(
    store: Path, write_config: Callable[..., Path], ftlib: Ftlib, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as a picture that was replaced while the run was training."""
    config = write_config(LORA)
    assert ftlib("prepare", config)[0] == 0

    def replaced() -> None:
        raise UserError("7.png: this is not the picture that was prepared", "Put the old one back.")

    monkeypatch.setattr(SupervisedDataset, "__getitem__", dying(replaced))
    code, _, error = ftlib("train", config, *TWO)
    assert code == 2 and "Traceback" not in error and "UserError" not in error
    assert "7.png: this is not the picture that was prepared\n" in error and "Put the old one back." in error
    assert not multiprocessing.active_children(), "workers that ignore SIGTERM would stay"
