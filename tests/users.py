"""Other users of this machine, by numbers that no account has: what they can do is tried, not computed."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ftlib.errors import UserError
from tests import needs
from tests.conftest import REPOSITORY


@dataclass(frozen=True)
class User:
    """A user.

    Attributes:
        groups: the first is the primary one.
    """

    number: int
    groups: tuple[int, ...]

    def does(self, what: Callable[..., Any], *arguments: object, umask: int = 0o022) -> Any:
        """What a function answers that this user calls; its UserError and OSError come back as such."""
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            os.setgroups(self.groups)
            os.setgid(self.groups[0])
            os.setuid(self.number)
            os.umask(umask)
            try:
                answer = True, what(*arguments)
            except UserError as error:
                answer = False, (UserError, (error.problem, error.remedy))
            except OSError as error:
                answer = False, (OSError, error.args)
            except BaseException as error:
                answer = False, (AssertionError, (repr(error),))
            os.write(writing, pickle.dumps(answer))
            os._exit(0)
        os.close(writing)
        with os.fdopen(reading, "rb") as pipe:
            done, found = pickle.loads(pipe.read())
        os.waitpid(child, 0)
        if done:
            return found
        kind, told = found
        raise kind(*told)

    def bash(self, script: str, umask: int = 0o022, **environment: object) -> subprocess.CompletedProcess[str]:
        """Run a shell script in the repository as this user."""
        return subprocess.run(
            ["/bin/bash", "-c", script],
            env={"PATH": "/usr/sbin:/usr/bin:/bin", **{name: str(value) for name, value in environment.items()}},
            cwd=REPOSITORY,
            umask=umask,
            user=self.number,
            group=self.groups[0],
            extra_groups=self.groups,
            capture_output=True,
            text=True,
        )


VISION, OTHER = 70_001, 70_002
"""Groups."""
ALICE, BOB = User(70_011, (70_011, VISION)), User(70_012, (70_012, OTHER, VISION))
"""Members of VISION, each with a primary group of their own; Bob is in a third one, too."""


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that every user gets to (pytest's are its user's alone), in which Alice may write."""
    if os.geteuid():
        needs.lack("users")
    for name in ("FTLIB_STORE", "FTLIB_RUNS", "FTLIB_GROUP", "FTLIB_OWNER", "FTLIB_SHARE_RUNS"):
        monkeypatch.delenv(name, raising=False)
    folder = Path(tempfile.mkdtemp(prefix="ftlib-users-"))
    folder.chmod(0o755)
    (folder / "group").mkdir()
    os.chown(folder / "group", ALICE.number, VISION)
    yield folder
    shutil.rmtree(folder)


def hand_down(folder: Path) -> None:
    """Have a folder hand its group down to what is made in it."""
    folder.chmod(0o2775)


def rights(path: Path) -> str:
    """Mode in octal."""
    return f"{path.stat().st_mode & 0o7777:o}"
