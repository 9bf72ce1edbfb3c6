"""The GPU acceptance run: does ftlib train and evaluate rightly on this GPU, and how fast?

Run: `make gpu`, or `python -m tests.gpu [NAME…]` for some of the checks. Every check is a process of its own, forked
after the imports, and is killed at twice its budget; one JSON line per result goes to stdout as soon as it is there,
everything else to stderr. A failed check does not stop the rest. Exit code 0: all are ok; 1: some are not;
2: there is no GPU.

`FTLIB_GPU_REHEARSAL=cpu` runs the same code with tiny shapes on the CPU. tests/benchmarks/README.md explains the lines.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from multiprocessing.connection import Connection, wait
from pathlib import Path

os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # otherwise to ask for GPUs would forbid CUDA after a fork
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", TQDM_DISABLE="1")

from tests.gpu.checks import CHECKS, Check
from tests.gpu.machine import REHEARSAL

_FORK = multiprocessing.get_context("fork")
_TOGETHER = 4
"""Checks of correctness that run at the same time; those that measure run alone."""


def main(names: list[str]) -> int:
    """Run all checks, or those named; see the module."""
    import torch

    if unknown := sorted(set(names) - {check.name for check in CHECKS}):
        known = ", ".join(check.name for check in CHECKS)
        print(f"no such check: {', '.join(unknown)}; there are {known}", file=sys.stderr)
        return 2
    if not REHEARSAL and not torch.cuda.is_available():
        print("no GPU here; FTLIB_GPU_REHEARSAL=cpu rehearses the checks on the CPU", file=sys.stderr)
        return 2
    chosen = [check for check in CHECKS if not names or check.name in names]
    started = time.monotonic()
    ok = True
    with tempfile.TemporaryDirectory(prefix="ftlib-gpu-") as folder:
        together = [check for check in chosen if not check.alone]
        ok &= _run(together, Path(folder), 1 if REHEARSAL else _TOGETHER)
        for check in chosen:
            if check.alone:
                ok &= _run([check], Path(folder), 1)
    _print({"name": "all", "ok": ok, "seconds": round(time.monotonic() - started, 1)})
    return 0 if ok else 1


def _run(checks: list[Check], folder: Path, at_once: int) -> bool:
    """Run checks, so many at once; whether all of their results are ok."""
    ok, waiting = True, list(checks)
    running: dict[Connection, tuple[Check, multiprocessing.Process, float]] = {}
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
                result = end.recv()  # type: ignore[union-attr]
                ok &= result["ok"]
                _print(result)
            except EOFError:
                check, process, begun = running.pop(end)  # type: ignore[arg-type]
                process.join()
                if process.exitcode:
                    ok = False
                    error = f"the process ended with {process.exitcode}"
                    _print({"name": check.name, "ok": False, "seconds": _since(begun), "error": error})
        for check, process, begun in running.values():
            if process.is_alive() and time.monotonic() - begun > 2 * check.budget:
                os.killpg(process.pid or 0, signal.SIGKILL)
    return ok


def _child(check: Check, folder: Path, results: Connection) -> None:
    """The process of a check: sends its results, whatever becomes of it."""
    os.setpgid(0, 0)
    os.dup2(2, 1)  # what ftlib prints is not ours
    folder.mkdir()
    begun = time.monotonic()
    try:
        for name, ok, figures in check.run(folder):
            results.send({"name": name, "ok": ok, "seconds": _since(begun), **figures})
            begun = time.monotonic()
    except BaseException as error:
        traceback.print_exc()
        where = traceback.extract_tb(error.__traceback__)[-1]
        text = f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"
        results.send({"name": check.name, "ok": False, "seconds": _since(begun), "error": text[:500]})
    results.close()
    sys.stderr.flush()
    os._exit(0)  # threads of data loading and compiling are not waited for


def _since(begun: float) -> float:
    return round(time.monotonic() - begun, 1)


def _print(result: dict[str, object]) -> None:
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
