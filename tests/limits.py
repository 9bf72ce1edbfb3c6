"""Time limits for tests of what once took hours: far from what is right, so that they fail instead of hanging."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator

SECONDS = 60


@contextlib.contextmanager
def time_limit(seconds: int = SECONDS) -> Iterator[None]:
    """Fail the test if the body takes longer; of the main thread, in Python code and regular expressions.

    Raises:
        AssertionError: it did; an OSError, as TimeoutError is, might be taken for one of the code under test.
    """

    def stop(*_: object) -> None:
        raise AssertionError(f"took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
