"""What tests see of the machine: the programs of a minimal Debian, a home of their own, none of the user's settings.

`tests/conftest.py` calls `hide_machine` before any test is collected. Those of `tests/cluster` see the machine as it
is (`shown`); a test that needs a program of it carries that program's mark (`tests/needs.py`).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

PROGRAMS = (
    "[", "awk", "base64", "basename", "bash", "cat", "chgrp", "chmod", "chown", "cmp", "comm", "cp", "cut", "date",
    "dd", "df", "diff", "dirname", "du", "echo", "env", "expr", "false", "find", "getent", "git", "grep", "gunzip",
    "gzip", "head", "hostname", "id", "install", "kill", "ln", "ls", "md5sum", "mkdir", "mkfifo", "mktemp", "mount",
    "mv", "nice", "nproc", "od", "paste", "printenv", "printf", "pwd", "python3", "readlink", "realpath",
    "rm", "rmdir", "script", "sed", "seq", "setsid", "sh", "sha256sum", "sleep", "sort", "split", "stat", "stdbuf",
    "sync", "tail", "tar", "tee", "test", "timeout", "touch", "tr", "true", "umount", "uname", "uniq", "unshare", "wc",
    "which", "whoami", "xargs",
)  # fmt: skip
"""Those of Debian's essential packages that scripts and tests use, and those that the README asks for."""
KEPT = (
    "CI",
    "COCO_CAPTION_EXAMPLE",
    "FTLIB_DEMO",
    "FTLIB_LOWEST_TRANSFORMERS",
    "FTLIB_REAL",
    "FTLIB_TORCHVISION",
    "LD_LIBRARY_PATH",
    "PYTHONPATH",
    "TMPDIR",
)
KEPT_BEGINNINGS = ("PIP_", "PYTEST_")
NETWORK = ("CURL_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "SSL_CERT_DIR", "SSL_CERT_FILE")
NETWORK += ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy")
"""With pip's settings: a test that installs something does so from where the user does."""
LOCAL = "localhost,127.0.0.1"

_machine: dict[str, str] = {}
_minimal: dict[str, str] = {}


def hide_machine(gpus: bool) -> None:
    """Leave this process a minimal machine; called once, before torch and huggingface_hub are imported.

    Args:
        gpus: leave the GPUs in sight.

    Raises:
        RuntimeError: torch is imported already, and computes with as many threads as the machine has.
    """
    if "torch" in sys.modules:
        raise RuntimeError("a conftest.py imports torch before the machine is hidden")
    _machine.update(os.environ)
    folder = Path(tempfile.mkdtemp(prefix="ftlib-tests-"))
    for name in ("bin", "home"):
        (folder / name).mkdir()
    for name in PROGRAMS:
        if program := shutil.which(name):
            (folder / "bin" / name).symlink_to(program)
    kept = [name for name in _machine if name in (*KEPT, *NETWORK) or name.startswith(KEPT_BEGINNINGS)]
    _minimal.update({name: _machine[name] for name in kept})
    _minimal.update(PATH=str(folder / "bin"), HOME=str(folder / "home"), TZ="UTC", LC_ALL="C.UTF-8")
    _minimal.update(NO_PROXY=LOCAL, no_proxy=LOCAL)
    _minimal.update(OMP_NUM_THREADS="1")  # several test processes compute at once; torch reads it when it is imported
    if not gpus:
        _minimal["CUDA_VISIBLE_DEVICES"] = ""
    own = Path(_machine.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "pip" / "pip.conf"
    if "PIP_CONFIG_FILE" not in _machine and os.access(own, os.R_OK):
        _minimal["PIP_CONFIG_FILE"] = str(own)
    os.umask(0o022)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored by what a script starts in the background
    _replace(_minimal)


def clean_up() -> None:
    """Remove what `hide_machine` made."""
    if _minimal:
        shutil.rmtree(Path(_minimal["HOME"]).parent, ignore_errors=True)


@contextlib.contextmanager
def shown() -> Iterator[None]:
    """The machine as it is."""
    _replace(_machine)
    try:
        yield
    finally:
        _replace(_minimal)


def program_of_machine(*names: str) -> str | None:
    """The path of the first of some programs that the machine has."""
    found = (shutil.which(name, path=_machine.get("PATH")) for name in names)
    return next(filter(None, found), None)


def _replace(environment: dict[str, str]) -> None:
    pytests = {name: value for name, value in os.environ.items() if name.startswith("PYTEST_")}
    os.environ.clear()
    os.environ.update(environment | pytests)
    time.tzset()
