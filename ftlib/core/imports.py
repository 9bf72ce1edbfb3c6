"""How commands import large libraries: without garbage collection, and without packages that they do not need."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Iterator

_unneeded: tuple[str, ...] = ()


@contextlib.contextmanager
def quick_imports() -> Iterator[None]:
    """Context for importing large libraries: without garbage collection and packages of `hide_while_importing`.

    Modules, classes and functions live until the process ends; the collector would walk through them again and again,
    which is a fifth of the CPU time.
    """
    enabled = gc.isenabled()
    hidden = [name for name in _unneeded if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]
    gc.disable()
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]
        if enabled:
            gc.enable()


def hide_while_importing(*names: str) -> None:
    """Let libraries that are imported in `quick_imports` do without these packages, which can be imported later.

    What such a library finds out then it may remember: only for a process that is ftlib's own.
    """
    global _unneeded
    _unneeded = names


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
