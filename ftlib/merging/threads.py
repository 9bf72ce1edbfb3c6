"""Work shared out among threads, one for each core; torch, numpy, hashing and reading let go of the interpreter."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


def count() -> int:
    """Threads: one for each core that this process may use."""
    return len(os.sched_getaffinity(0))


@contextmanager
def pool() -> Iterator[ThreadPoolExecutor]:
    """A pool whose threads compute on one core each."""
    before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(count(), initializer=torch.set_num_threads, initargs=(1,)) as executor:
            yield executor
    finally:
        torch.set_num_threads(before)


def run(executor: ThreadPoolExecutor, call: Callable[[T], R], items: Iterable[T], stop: threading.Event) -> list[R]:
    """Call on every item; a failure or a signal sets `stop` and cancels what has not begun.

    Raises:
        whatever the first failing call raised.
    """
    futures = [executor.submit(call, item) for item in items]
    try:
        wait(futures, return_when=FIRST_EXCEPTION)
        for future in futures:
            if future.done() and (error := future.exception()):
                raise error
        return [future.result() for future in futures]
    except BaseException:
        stop.set()
        for future in futures:
            future.cancel()
        raise
