"""Wait for another process."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def wait_until(find: Callable[[], T], poll: float, timeout: float = math.inf) -> T:
    """Call `find` every `poll` seconds until its result is true.

    Args:
        poll, timeout: seconds.

    Returns:
        Its last result, which is false if the time is over.
    """
    end = time.monotonic() + timeout
    while not (found := find()) and time.monotonic() < end:
        time.sleep(poll)
    return found
