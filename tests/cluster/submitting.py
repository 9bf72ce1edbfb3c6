"""From `sbatch` to the first training step, by part, on the test cluster of tests/cluster.

Run as root: `python -m tests.cluster.submitting`. Prints a table on stderr and JSON on stdout: seconds by the clock,
medians of three rounds. `FTLIB_PEER=/path/to/another/checkout` measures that checkout's ftlib, too, in turns.

A fresh job stages, prepares and trains; the next one has another seed, so that only training is left to do. The model
is tiny. Each code runs from a copy of its clone with lines that note the time: the shell's trace in FTLIB_HOOK, and
`MARKS` at the end of ftlib/__init__.py. The file of the image is in the page cache after the first round.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from ftlib.core import log
from tests.benchmarks.starting import CONFIG
from tests.cluster.conftest import STATE, USER, Cluster
from tests.conftest import REPOSITORY

MARKS = """
import importlib.machinery as _machinery, json as _json, os as _os, sys as _sys, time as _time

_WRAPPED = {
    "ftlib.cli.main": ["main"],
    "ftlib.cli.train": ["main", "exec_pinned_code"],
    "ftlib.training.train": [
        "train_run", "open_prepared", "model_hashes", "_training_dataset", "_validate_images_once", "trainable_model",
        "_log_step",
    ],
    "ftlib.training.trainer": ["ResumableTrainer.train", "ResumableTrainer.training_step"],
}


def _mark(name):
    line = {"mark": name, "step": _os.environ.get("SLURM_STEP_ID"), "job": _os.environ.get("SLURM_JOB_ID")}
    line |= {"time": _time.time(), "cpu": sum(_os.times()[:2])}
    with open(_os.path.join(_os.environ["FTLIB_RUNS"], "marks.jsonl"), "a") as file:
        file.write(_json.dumps(line) + "\\n")


def _wrap(module, names):
    for name in names:
        owner = module
        *path, last = name.split(".")
        for part in path:
            owner = getattr(owner, part)
        def replacement(*arguments, _call=getattr(owner, last), _name=name, **settings):
            _mark(f"{module.__name__} {_name} (")
            try:
                return _call(*arguments, **settings)
            finally:
                _mark(f"{module.__name__} {_name} )")
        setattr(owner, last, replacement)


class _Finder:
    def find_spec(self, name, path=None, target=None):
        if name not in _WRAPPED:
            return None
        spec = _machinery.PathFinder.find_spec(name, path, target)
        execute = spec.loader.exec_module
        def exec_module(module):
            execute(module)
            _mark(f"{name} imported")
            _wrap(module, _WRAPPED[name])
        spec.loader.exec_module = exec_module
        return spec


if _os.environ.get("SLURM_JOB_ID") and "FTLIB_RUNS" in _os.environ:
    _sys.meta_path.insert(0, _Finder())
    _mark("ftlib")
"""
HOOK = """
if [[ -n ${SLURM_JOB_ID:-} && -z ${BASH_XTRACEFD:-} ]]; then
    exec {BASH_XTRACEFD}>>"@FOLDER@/trace-$SLURM_JOB_ID"
    read -r up _ < /proc/uptime
    read -ra of_shell < /proc/$$/stat
    echo "+ $EPOCHREALTIME script $up ${of_shell[21]}" >&$BASH_XTRACEFD
    PS4='+ $EPOCHREALTIME '
    set -x
fi
"""
TRAIN = {
    "Python and the command line": "ftlib.cli.train main (",
    "config, run folder": "ftlib.cli.train exec_pinned_code (",
    "pinned code": "ftlib.cli.train exec_pinned_code )",
    "imports of torch and transformers": "ftlib.training.train imported",
    "data, hashes of the model": "ftlib.training.train _training_dataset (",
    "processor, lengths of rows": "ftlib.training.train _training_dataset )",
    "images tried": "ftlib.training.train _validate_images_once )",
    "trainer's arguments": "ftlib.training.train trainable_model (",
    "model": "ftlib.training.train trainable_model )",
    "trainer": "ftlib.training.trainer ResumableTrainer.train (",
    "first batch": "ftlib.training.trainer ResumableTrainer.training_step (",
    "first step": "ftlib.training.train _log_step (",
}
"""Part of `ftlib train` → the mark that ends it."""
CPU = "CPU seconds of Python in these commands"
ROUNDS = 3


def main() -> int:
    """Measure and print."""
    log.configure()
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # no user has it
    codes = {"this": REPOSITORY} | ({"peer": Path(os.environ["FTLIB_PEER"])} if "FTLIB_PEER" in os.environ else {})
    clones = {name: make_clone(STATE / "start" / name, code) for name, code in codes.items()}
    found: dict[str, dict[str, list[dict[str, float]]]] = {name: defaultdict(list) for name in codes}
    for _ in range(ROUNDS):
        for name, clone in clones.items():
            shutil.rmtree(clone.store / "runs", ignore_errors=True)
            for made in ("prepared", "models", "datasets", "hashes"):
                shutil.rmtree(clone.store / made, ignore_errors=True)
            for case, seed in {"fresh": 1, "next": 2}.items():
                found[name][case].append(measure(clone, seed))
                log.info(f"{name}, {case}: {json.dumps(found[name][case][-1])}")
    medians = {
        f"{name}, {case}": {part: round(statistics.median(one[part] for one in rounds), 2) for part in rounds[0]}
        for name, cases in found.items()
        for case, rounds in cases.items()
    }
    for each in medians.values():
        each["all"] = round(sum(each.values()) - each[CPU], 2)
        each["without the queue"] = round(each["all"] - each["queue"], 2)
    parts = list(next(iter(medians.values())))
    log.info(
        log.format_table(["part", *medians], [[part, *[str(one[part]) for one in medians.values()]] for part in parts])
    )
    print(json.dumps({"load": os.getloadavg(), **medians}), flush=True)
    return 0


def make_clone(home: Path, code: Path) -> Cluster:
    """The user's clone of a checkout, with lines that note the time, and a store with the image."""
    shutil.rmtree(home, ignore_errors=True)
    clone = Cluster(home)
    clone.image.parent.mkdir(parents=True)
    script = 'source "$1/jobs/lib.sh"; mkdir -p "$2"; copy_tracked "$1" "$2"'
    subprocess.run(["bash", "-c", script, "-", code, home / "ftlib"], check=True)
    with (home / "ftlib" / "ftlib" / "__init__.py").open("a") as file:
        file.write(MARKS)
    (home / "hook").write_text(HOOK.replace("@FOLDER@", str(home)))
    (home / "config.yaml").write_text(CONFIG.replace("METHOD", "lora"))
    os.link(STATE / "ftlib.sif", clone.image)
    subprocess.run(["chown", "-R", f"{USER}:", home], check=True)
    return clone


def measure(clone: Cluster, seed: int) -> dict[str, float]:
    """Part → seconds, of one job."""
    marks = clone.store / "runs" / USER / "marks.jsonl"
    sent = time.time()
    what = f"jobs/ftlib.sbatch stage+prepare+train {clone.home}/config.yaml seed={seed}"
    job = clone.sbatch(what, FTLIB_HOOK=clone.home / "hook")
    if (state := clone.wait(job)) != "COMPLETED":
        raise SystemExit(f"{state}: {clone.log(job)}")
    lines = [json.loads(line) for line in marks.read_text().splitlines()]
    return parts_of(sent, [line for line in lines if line["job"] == job], read_trace(clone.home / f"trace-{job}"))


def read_trace(path: Path) -> list[tuple[float, str]]:
    """(time, command) of what the job script ran; of the first line, when the script began."""
    lines = [line.lstrip("+").split(maxsplit=1) for line in path.read_text().splitlines() if line.startswith("+")]
    found = [(float(line[0]), line[1]) for line in lines if len(line) == 2 and line[0][:1].isdigit()]
    now, (_, up, ticks) = found[0][0], found[0][1].split()
    return [(now - float(up) + int(ticks) / os.sysconf("SC_CLK_TCK"), "script"), *found[1:]]


def parts_of(sent: float, marks: list[dict[str, Any]], trace: list[tuple[float, str]]) -> dict[str, float]:
    """Part → seconds, in order, without gaps."""

    def at(start: str) -> float:
        return next(moment for moment, command in trace if command.startswith(start))

    ends = {"queue": trace[0][0], "job script, before the code is pinned": at("pin ")}
    for command in ("stage", "prepare", "train"):
        if command == "prepare" and not any(line.startswith("run_step prepare") for _, line in trace):
            parts = (f"before {command}", f"srun, container and Python of {command}", command)
            ends |= dict.fromkeys(parts, ends["stage"])  # stage has done it
            continue
        begun = at(f"run_step {command}")
        ends[f"before {command}"] = begun
        (first, *own) = [mark for mark in marks if mark["time"] > begun]
        ends[f"srun, container and Python of {command}"] = first["time"]
        if command != "train":
            ends[command] = max(mark["time"] for mark in own if mark["step"] == first["step"])
    for part, mark in TRAIN.items():
        ends[part] = next(one["time"] for one in own if one["mark"] == mark)
    seconds, before = {}, sent
    for part, end in ends.items():
        seconds[part], before = round(end - before, 2), end
    # the last mark of each command, and of training the one of its first step
    used = {one["step"]: one["cpu"] for one in marks if one["time"] <= end}
    return {**seconds, CPU: round(sum(used.values()), 2)}


if __name__ == "__main__":
    sys.exit(main())
