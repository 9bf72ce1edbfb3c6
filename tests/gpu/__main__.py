"""The GPU acceptance run: does ftlib train and evaluate rightly on this GPU, and how fast?

Run: `make gpu`, or `python -m tests.gpu [NAME…]` for some of the checks. Every check is a process of its own and is
killed at twice its budget. One JSON line per result goes to stdout as soon as it is there, everything else to stderr; a
failed check does not stop the rest. Exit code 0: all are ok; 1: some are not; 2: there is no GPU. The lines name no
host, no user and no path.

`FTLIB_GPU_REHEARSAL=cpu` runs the same code with tiny shapes on the CPU. tests/benchmarks/README.md explains the lines.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ftlib.run_module import module_command
from tests.gpu.budgets import ALONE, TOGETHER

CHECKS = tuple(module_command("tests.gpu.checks"))
"""The program that runs one check: its name and a folder follow."""

_REHEARSAL = os.environ.get("FTLIB_GPU_REHEARSAL") == "cpu"
_KILLED_AT = 20 if _REHEARSAL else 2
"""Times its budget that a check may take; CPUs are slow, and busy with other tests."""

_AT_ONCE = 1 if _REHEARSAL else 4
_GPU_OR_NOT = "import sys; sys.path[:] = filter(None, sys.path); import torch; sys.exit(not torch.cuda.is_available())"

Tell = Callable[[dict[str, Any]], None]


def main(arguments: Sequence[str]) -> int:
    """Run all checks, or those named; see the module."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu", description=__doc__)
    known = [*TOGETHER, *ALONE]
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(known))
    parser.add_argument("--output", type=Path, help="append the lines to this file, too; exit code 0 whatever they say")
    asked = parser.parse_args(arguments)
    if unknown := sorted(set(asked.names) - set(known)):
        parser.error(f"no such check: {', '.join(unknown)}; there are {', '.join(known)}")
    if not _REHEARSAL and subprocess.run([sys.executable, "-c", _GPU_OR_NOT]).returncode:
        print("no GPU here; FTLIB_GPU_REHEARSAL=cpu rehearses the checks on the CPU", file=sys.stderr)
        return 2

    def tell(result: dict[str, Any]) -> None:
        line = json.dumps(result)
        print(line, flush=True)
        if asked.output:
            with asked.output.open("a") as file:
                file.write(line + "\n")

    started = time.monotonic()
    ok = True
    with tempfile.TemporaryDirectory(prefix="ftlib-gpu-", ignore_cleanup_errors=True) as folder:
        for group, at_once in ((TOGETHER, _AT_ONCE), (ALONE, 1)):
            chosen = {name: budget for name, budget in group.items() if not asked.names or name in asked.names}
            ok &= run_checks(chosen, Path(folder), tell, at_once)
    tell({"name": "all", "ok": ok, "seconds": _since(started)})
    return 0 if ok or asked.output else 1


def run_checks(
    budgets: Mapping[str, float], folder: Path, tell: Tell, at_once: int, program: Sequence[str] = CHECKS
) -> bool:
    """Run checks, so many at once, and tell each result as it comes; whether all of them are ok."""
    lock = threading.Lock()
    oks: list[bool] = []

    def told(result: dict[str, Any]) -> None:
        with lock:
            oks.append(bool(result["ok"]))
            tell(result)

    def run(name: str) -> None:
        begun, limit = time.monotonic(), _KILLED_AT * budgets[name]
        process = subprocess.Popen(
            [*program, name, str(folder / name)],
            env={**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1"},
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # with all that it starts
        )
        killer = threading.Timer(limit, os.killpg, (process.pid, signal.SIGKILL))
        killer.start()
        for line in process.stdout or ():
            told(json.loads(line))
        code = process.wait()
        killer.cancel()
        if code:
            late = _since(begun) >= limit
            error = f"killed after {limit:g} s" if late else f"exit {code}"
            told({"name": name, "ok": False, "seconds": _since(begun), "error": error})

    with ThreadPoolExecutor(at_once) as pool:
        list(pool.map(run, budgets))
    return all(oks)


def _since(begun: float) -> float:
    return round(time.monotonic() - begun, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
