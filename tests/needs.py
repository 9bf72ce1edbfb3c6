"""What some tests need of the machine: how a lack is told, and the list of what was skipped.

A test marked `cluster`, `java` or `browser` sees that part of the machine, which is hidden from all others
(`tests/isolation.py`). Where it is missing the test is skipped; under CI it fails.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

import pytest

from tests import isolation

NEEDS = {
    "cluster": ("no test cluster", "make cluster   # Debian, as root"),
    "java": ("no Java, which the official caption programs run on", "apt install default-jre-headless"),
    "browser": ("no browser to look at reports with", "apt install chromium"),
    "mount": ("file systems cannot be mounted", "sudo make test"),
    "users": ("other users cannot be tried", "sudo make test"),
    "gpu": ("no GPU", "make long   # on a machine with one"),
    "example": ("no public example of coco-caption", "COCO_CAPTION_EXAMPLE=/folder/of/it make long"),
    "lowest": ("the lowest supported transformers is not installed", "make test"),
}
"""Word → what is missing, and the command that enables the tests."""
PROGRAMS = {"java": ("java",), "browser": ("chromium", "google-chrome")}
"""Mark → the programs that do; the first is the name that the tests call."""


def lack(name: str, detail: str = "") -> NoReturn:
    """Skip the test for want of one of NEEDS; under CI it fails.

    Raises:
        pytest.skip.Exception, pytest.fail.Exception: always.
    """
    reason = NEEDS[name][0] + (f" ({detail})" if detail else "")
    if "CI" in os.environ:
        pytest.fail(f"{reason}: {NEEDS[name][1]}", pytrace=False)
    pytest.skip(reason)


def path_with(name: str, folder: Path) -> str:
    """A PATH on which the program of a mark lies, too; without that program see `lack`."""
    program = isolation.program_of_machine(*PROGRAMS[name])
    if program is None:
        lack(name)
    folder.mkdir()
    (folder / PROGRAMS[name][0]).symlink_to(program)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


def summary(reasons: Iterable[str], without_long: bool) -> list[str]:
    """Lines about skipped tests, grouped by cause, with the command that enables each.

    Args:
        reasons: of each skipped test.
        without_long: those that take long were not asked for.
    """
    lines = []
    for reason, number in Counter(reasons).most_common():
        commands = [command for what, command in NEEDS.values() if reason.startswith(what)]
        lines.append(f"{number:5} {reason}" + "".join(f": {command}" for command in commands))
    return [*lines, *["  all that take long: make long"] * without_long]
