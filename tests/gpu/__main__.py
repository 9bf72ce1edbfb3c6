"""The GPU acceptance run: does ftlib train and evaluate rightly on this GPU, and how fast?

Run: `make gpu`, or `python -m tests.gpu [NAME…]` for some of the checks. Every check is a process of its own, forked
after the imports, and is killed at twice its budget. One JSON line per result goes to stdout as soon as it is there,
everything else to stderr; a failed check does not stop the rest. Exit code 0: all are ok; 1: some are not; 2: there is
no GPU. The lines name no host, no user and no path.

`FTLIB_GPU_REHEARSAL=cpu` runs the same code with tiny shapes on the CPU. tests/benchmarks/README.md explains the lines.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path

os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # otherwise to ask for GPUs would forbid CUDA after a fork
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", TQDM_DISABLE="1")

from ftlib.out_of_memory import is_out_of_memory
from tests.gpu.checks import CHECKS, Check
from tests.gpu.machine import REHEARSAL

_FORK = multiprocessing.get_context("fork")
_TOGETHER = 4
"""Checks of correctness that run at the same time; those that measure run alone."""

_KILLED_AT = 8 if REHEARSAL else 2
"""Times its budget that a check may take; CPUs are slow, and busy with other tests."""

Tell = Callable[[dict[str, object]], None]


def main(arguments: Sequence[str]) -> int:
    """Run all checks, or those named; see the module."""
    import torch

    parser = argparse.ArgumentParser(prog="python -m tests.gpu", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(check.name for check in CHECKS))
    parser.add_argument("--output", type=Path, help="append the lines to this file, too; exit code 0 whatever they say")
    asked = parser.parse_args(arguments)
    if unknown := sorted(set(asked.names) - {check.name for check in CHECKS}):
        parser.error(f"no such check: {', '.join(unknown)}; there are {', '.join(check.name for check in CHECKS)}")
    if not REHEARSAL and not torch.cuda.is_available():
        print("no GPU here; FTLIB_GPU_REHEARSAL=cpu rehearses the checks on the CPU", file=sys.stderr)
        return 2

    def tell(result: dict[str, object]) -> None:
        line = json.dumps(result)
        print(line, flush=True)
        if asked.output:
            with asked.output.open("a") as file:
                file.write(line + "\n")

    chosen = [check for check in CHECKS if not asked.names or check.name in asked.names]
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="ftlib-gpu-") as folder:
        ok = run_checks([check for check in chosen if not check.alone], Path(folder), tell, _TOGETHER)
        ok &= run_checks([check for check in chosen if check.alone], Path(folder), tell, 1)
    tell({"name": "all", "ok": ok, "seconds": _since(started)})
    return 0 if ok or asked.output else 1


def run_checks(checks: Sequence[Check], folder: Path, tell: Tell, at_once: int) -> bool:
    """Run checks, so many at once, and tell each result as it comes; whether all of them are ok."""
    ok, waiting = True, list(checks)
    running: dict[Connection, tuple[Check, multiprocessing.process.BaseProcess, float]] = {}

    def told(result: dict[str, object]) -> None:
        nonlocal ok
        ok &= bool(result["ok"])
        tell(result)

    while waiting or running:
        while waiting and len(running) < at_once:
            check = waiting.pop(0)
            here, there = _FORK.Pipe(duplex=False)
            process = _FORK.Process(target=_child, args=(check, folder / check.name, there))
            process.start()
            there.close()
            running[here] = (check, process, time.monotonic())
        for end in wait(list(running), timeout=1):
            try:
                told(end.recv())  # type: ignore[union-attr]
            except EOFError:
                check, process, begun = running.pop(end)  # type: ignore[arg-type]
                process.join()
                if process.exitcode:
                    limit = _KILLED_AT * check.budget
                    error = f"killed after {limit} s" if _since(begun) > limit else f"exit {process.exitcode}"
                    told({"name": check.name, "ok": False, "seconds": _since(begun), "error": error})
        for check, process, begun in running.values():
            if process.is_alive() and time.monotonic() - begun > _KILLED_AT * check.budget:
                os.killpg(process.pid or 0, signal.SIGKILL)
    return ok


def _child(check: Check, folder: Path, results: Connection) -> None:
    """The process of a check: sends its results, whatever becomes of it."""
    os.setpgid(0, 0)
    os.dup2(2, 1)  # what ftlib prints is no result
    folder.mkdir()
    begun = time.monotonic()
    try:
        for name, ok, figures in check.run(folder):
            results.send({"name": name, "ok": ok, "seconds": _since(begun), **figures})
            begun = time.monotonic()
    except BaseException as error:
        traceback.print_exc()
        # What a smaller GPU has no room to measure is no fault; training itself must answer in its own words.
        fits = not (check.alone and isinstance(error, Exception) and is_out_of_memory(error))
        facts = {"error": _without_paths(error)} if fits else {"does_not_fit": True}
        results.send({"name": check.name, "ok": not fits, "seconds": _since(begun), **facts})
    results.close()
    sys.stderr.flush()
    os._exit(0)  # threads of data loading and compiling are not waited for


def _without_paths(error: BaseException) -> str:
    """The error and the line of the check that it came through."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "tests" in Path(frame.filename).parts]
    where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return re.sub(r"(?<![\w.])/[^\s:'\"]+", "…", f"{type(error).__name__}: {error}")[:500] + where


def _since(begun: float) -> float:
    return round(time.monotonic() - begun, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
