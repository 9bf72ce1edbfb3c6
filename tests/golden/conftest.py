"""Commands as processes, and goldens that are compared or written anew (`--update-golden`)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import REPOSITORY
from tests.golden.normal import differences

EXPECTED = Path(__file__).parent / "expected"


@dataclass(frozen=True)
class Result:
    """What a command answered."""

    code: int
    out: str
    err: str

    @property
    def text(self) -> str:
        """All of it, as a golden holds it."""
        parts = (("exit code", f"{self.code}\n"), ("stdout", self.out), ("stderr", self.err))
        return "".join(f"--- {name}\n{text}{'' if text.endswith(chr(10)) else chr(10)}" for name, text in parts if text)


Command = Callable[..., Result]


def environment_of(store: Path, **more: str) -> dict[str, str]:
    """The test process's, with a store and a folder of runs, 100 columns and no colors."""
    left_out = ("FTLIB_", "SLURM_", "SBATCH_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(left_out)}
    here = {"FTLIB_STORE": str(store), "FTLIB_RUNS": str(store / "runs" / "alice"), "COLUMNS": "100", "NO_COLOR": "1"}
    code = {"PYTHONPATH": str(REPOSITORY)}
    return {**kept, **here, **code, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **more}


def run_process(*arguments: object, store: Path, folder: Path, **environment: str) -> Result:
    """`python3 -m ftlib ARGUMENTS…` as a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "ftlib", *map(str, arguments)],
        env=environment_of(store, **environment),
        cwd=folder,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    return Result(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="session")
def heavy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Command]:
    """Run commands that need torch, one after the other, without importing it each time (`server.py`)."""
    folder = tmp_path_factory.mktemp("server")
    with subprocess.Popen(
        [sys.executable, Path(__file__).with_name("server.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment_of(folder),
    ) as server:
        assert server.stdin and server.stdout

        def run(*arguments: object, store: Path, folder: Path, **environment: str) -> Result:
            (folder / "logs").mkdir(exist_ok=True)
            number = len(list((folder / "logs").glob("*.out")))
            files = {name: folder / "logs" / f"{number:03}.{name[3:]}" for name in ("stdout", "stderr")}
            request = {
                "arguments": list(map(str, arguments)),
                "folder": str(folder),
                # as jobs/run.sh does: without /proc a process cannot tell where its messages go
                "environment": environment_of(store, FTLIB_LOG=str(files["stderr"]), **environment),
                **{name: str(path) for name, path in files.items()},
            }
            server.stdin.write(json.dumps(request) + "\n")
            server.stdin.flush()
            answer = server.stdout.readline()
            assert answer, "the server has died"
            return Result(int(answer), files["stdout"].read_text(), files["stderr"].read_text())

        yield run
        server.terminate()  # without its stdin closed: processes that other tests forked may hold that open


class Golden:
    """Compares with what is committed, or writes that anew."""

    def __init__(self, update: bool) -> None:
        self._update = update

    def text(self, name: str, found: str) -> None:
        """Line by line the same."""
        path = EXPECTED / name
        if self._update:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(found, encoding="utf-8")
        assert found.splitlines() == path.read_text(encoding="utf-8").splitlines(), f"tests/golden/expected/{name}"

    def json(self, name: str, found: Any, **tolerances: tuple[float, float]) -> None:
        """The same but for numbers below the keys of `tolerances`: key → (relative, absolute)."""
        path = EXPECTED / name
        if self._update:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        known = json.loads(path.read_text(encoding="utf-8"))
        told = differences(json.loads(json.dumps(found)), known, tolerances)
        assert not told, f"tests/golden/expected/{name}\n" + "\n".join(told[:20])


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Golden:
    return Golden(request.config.getoption("update_golden"))
