"""`python3 run_module.py -m MODULE ARGUMENTS…`: as `python3 -m MODULE ARGUMENTS…`, but without the working folder.

With `-m` Python looks for every module in the working folder first: a job would run whatever lies where `ftlib submit`
was called, and the clone as it has become, not its snapshot. Here this file's package comes first, and the working
folder is no place for modules. Only Python 3.11 and later have PYTHONSAFEPATH for that, so this file does it for all;
the variable is set too, for the Pythons that libraries start.
"""

from __future__ import annotations

import os
import site
import sys
from pathlib import Path

_FILE = Path(__file__).absolute()
_PACKAGES = str(_FILE.parent.parent)
"""The folder that holds this package."""


def module_command(module: str, *arguments: str) -> list[str]:
    """The command line that runs a module in a process of its own, with this process's ftlib."""
    return [sys.executable, str(_FILE), "-m", module, *arguments]


def _leave_out_working_folder() -> None:
    """Put the package's folder in the place of this file's own, which Python puts first."""
    if not (sys.flags.isolated or getattr(sys.flags, "safe_path", False)):
        del sys.path[0]
    if _PACKAGES not in site.getsitepackages():  # that stays behind the standard library
        sys.path[:] = [_PACKAGES, *(place for place in sys.path if place != _PACKAGES)]
    os.environ["PYTHONSAFEPATH"] = "1"


if __name__ == "__main__":
    _leave_out_working_folder()
    import runpy

    del sys.argv[: sys.argv.index("-m") + 1]  # submitit puts -u before it, which Python has handled already
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
