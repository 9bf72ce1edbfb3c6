"""How commands import large libraries: without garbage collection, and without packages that they do not need."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Context for importing large libraries, which takes a fifth less CPU time in it.

    Modules, classes and functions live until the process ends; the collector would walk through them again and again.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def exempt_from_collection() -> None:
    """Leave what has been imported out of all further collections.

    Each one that looks through torch's and transformers' objects takes half a second, and libraries ask for several.
    Later calls change nothing: in a process that trains several times, garbage of the first training must be freed.
    """
    if not gc.get_freeze_count():
        gc.freeze()


def hide_package(name: str) -> None:
    """Make a package look as if it were not installed, for the rest of the process, unless it is imported already.

    Libraries that would use the package where it is installed then do without it: both `import` and `find_spec` heed
    `None` in `sys.modules`.
    """
    sys.modules.setdefault(name, None)  # type: ignore[arg-type]
