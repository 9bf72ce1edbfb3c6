"""What the start of each command costs: a job of one step and a few answers, each command fresh and when it is done.

Run: `python -m tests.benchmarks.starting [full] [lora]`, the adapter methods; by default both. Prints a line of JSON
for each: for every command the CPU seconds (user and system) of the whole process, the median of three rounds.
`FTLIB_PEER=/path/to/another/checkout` measures that checkout's ftlib, too, in turns with this one.

The model is tiny, so nearly everything is start-up: Python, imports, configuration, checks, model, first batch.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

from ftlib.core import log
from tests.conftest import REPOSITORY

CONFIG = """
name: start
task: classify
model: {family: paligemma, base: ftlib/tiny-paligemma}
adapter: {method: METHOD}
data: {source: digits, root: "${store}/datasets/digits", prompt: "{prefix}", split: {valid: 0.02, test: 0.1}}
training: {max_steps: 1, per_device_train_batch_size: 4, learning_rate: 1.0e-3}
evaluation: {splits: [valid], max_new_tokens: 4, batch_size: 64}
"""
STAGES = ("stage", "prepare", "train", "evaluate")
COMMANDS = [(name, [name, "config.yaml"]) for name in STAGES]
COMMANDS += [(f"{name} again", [name, "config.yaml"]) for name in STAGES]
COMMANDS += [
    ("status", ["status"]),
    ("submit", ["submit", "config.yaml", "--dry-run"]),
    ("report", ["report", "start"]),
]
ROUNDS = 3


def main() -> int:
    """Measure and print."""
    log.configure()
    codes = {"this": str(REPOSITORY)}
    if "FTLIB_PEER" in os.environ:
        codes["peer"] = os.environ["FTLIB_PEER"]
    for method in sys.argv[1:] or ["full", "lora"]:
        found: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in codes}
        for _ in range(ROUNDS):
            for name, code in codes.items():
                with tempfile.TemporaryDirectory() as folder:
                    Path(folder, "config.yaml").write_text(CONFIG.replace("METHOD", method))
                    for command, arguments in COMMANDS:
                        found[name][command].append(cpu_seconds(arguments, Path(folder), code))
                        log.info(f"{name}: {command}: {found[name][command][-1]:.2f} s")
        for name, seconds in found.items():
            medians = {command: round(statistics.median(each), 2) for command, each in seconds.items()}
            print(json.dumps({"adapter": method, "code": name, **medians}), flush=True)
    return 0


def cpu_seconds(arguments: list[str], folder: Path, code: str) -> float:
    """The CPU seconds of one command, with one thread."""
    environment = {**os.environ, "PYTHONPATH": code, "FTLIB_STORE": str(folder / "store"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "ftlib", *arguments]
    with (folder / "output").open("w") as output:
        started = subprocess.Popen(command, env=environment, cwd=folder, stdout=output, stderr=output)
        _, status, used = os.wait4(started.pid, 0)
    if status:
        raise SystemExit(f"{code}: ftlib {arguments[0]} failed: {(folder / 'output').read_text()[-500:]}")
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    sys.exit(main())
