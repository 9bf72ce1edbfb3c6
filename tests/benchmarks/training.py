"""ftlib's training against other recipes: speed, memory, start-up.

Run: `python -m tests.benchmarks.training`. Every measurement is a process of its own, on the same rows with the same
LoRA; all recipes take turns, three times. Prints a table on stderr and JSON on stdout. On a GPU `make gpu` measures
instead.

The seeds' recipe is transformers' Trainer with the processor in the collator, `padding="longest"`, all logits and
gradient checkpointing. The model is a PaliGemma of real widths and vocabulary with 2 language and 3 vision layers, in
float32; `FTLIB_LAYERS=6,3` sets other numbers.

CPU seconds are of the process, so that they tell something on a busy machine. Peak memory is what a micro-batch takes
on top of what stood before it. Ratios are the medians of each turn's ratios.

`FTLIB_PEER=/path/to/another/checkout` measures that checkout's ftlib too; `FTLIB_LLAMAFACTORY=/path/to/python` measures
LLaMA-Factory as it is installed there, with its own defaults (gradient checkpointing among them).
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

from ftlib.core import log
from tests.benchmarks.recipes import bases
from tests.conftest import REPOSITORY

STEPS = 3
MICRO_BATCH = 4
PEER = os.environ.get("FTLIB_PEER", "")
ROUNDS = 3
SEED = "seeds' recipe"
LLAMAFACTORY = os.environ.get("FTLIB_LLAMAFACTORY", "")
LAYERS = tuple(map(int, os.environ.get("FTLIB_LAYERS", "2,3").split(",")))
"""Of the language model and of the vision tower."""

WORKER = Path(__file__).parent / "recipes" / "worker.py"


def main() -> int:
    """Measure and print."""
    log.configure("normal")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        log.info("making a base model with random weights")
        bases.make_paligemma(folder / "base", 224, torch.float32, *LAYERS)
        bases.make_rows(folder / "rows")
        plans = recipes(folder)
        found: dict[str, list[dict[str, float]]] = {name: [] for name in plans}
        for number in range(ROUNDS):
            for name, plan in plans.items():
                found[name].append(run(name, plan, folder / f"{number}"))
    versions = {module.__name__: module.__version__ for module in (torch, transformers, peft)}
    machine = {"threads": torch.get_num_threads(), "load": os.getloadavg(), "cpu_flags": cpu_flags(), **versions}
    log.info(f"\n{table(found)}\n{machine}")
    print(json.dumps({"machine": machine, "layers": LAYERS, "recipes": found}, indent=1))
    return 0


def cpu_flags() -> list[str]:
    """What this CPU has of the instructions that torch's products choose by."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    flags = next((line for line in lines if line.startswith("flags")), "").split()
    return [flag for flag in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16") if flag in flags]


def recipes(folder: Path) -> dict[str, dict[str, Any]]:
    """Name → what `recipes/worker.py` needs to know."""
    common = {
        "base": str(folder / "base"), "rows": str(folder / "rows"), "steps": STEPS, "micro_batch": MICRO_BATCH,
        "output": str(folder / "output"),
    }  # fmt: skip
    plans = {
        "ftlib": {**common, "recipe": "ftlib", "code": str(REPOSITORY)},
        SEED: {**common, "recipe": "seed"},
    }
    if PEER:
        plans["ftlib of the other checkout"] = {**plans["ftlib"], "code": str(Path(PEER).absolute())}
    if LLAMAFACTORY:
        plans["LLaMA-Factory"] = {**common, "recipe": "llamafactory", "python": LLAMAFACTORY}
    return plans


def run(name: str, plan: dict[str, Any], folder: Path) -> dict[str, float]:
    """One process's figures."""
    folder.mkdir(exist_ok=True)
    environment = {
        **os.environ,
        "FTLIB_STORE": str(folder / name / "store"),
        "FTLIB_RUNS": str(folder / name / "runs"),
        "PYTHONPATH": plan.get("code", str(REPOSITORY)),
    }
    if plan["recipe"] == "ftlib":
        plan = {**plan, "config": str(folder / "config.json")}
        Path(plan["config"]).write_text(json.dumps(config(plan)))
        prepare = [sys.executable, "-m", "ftlib", "prepare", plan["config"]]
        subprocess.run(prepare, env=environment, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    (folder / "plan.json").write_text(json.dumps(plan))
    worker = [
        plan.get("python", sys.executable),
        str(Path(plan.get("code", REPOSITORY)) / WORKER),
        str(folder / "plan.json"),
    ]
    done = subprocess.run(worker, env=environment, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    facts: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    log.info(f"{name}: {facts}")
    return {**facts, "rows_per_second": plan["micro_batch"] / facts["seconds"]}


def config(plan: dict[str, Any]) -> dict[str, Any]:
    """ftlib's config of a plan; a YAML file may be JSON."""
    return {
        "name": "bench",
        "task": "caption",
        "model": {"family": "paligemma", "base": plan["base"]},
        "adapter": {"method": "lora", "r": 8, "alpha": 16},
        "training": {"max_steps": STEPS, "per_device_train_batch_size": MICRO_BATCH, "learning_rate": 1e-4},
        "data": {"source": "jsonl", "root": plan["rows"], "split": {"valid": 1, "test": 1}},
        "evaluation": {"before": False},
    }


def table(found: dict[str, list[dict[str, float]]]) -> str:
    """Medians, and ratios to the seeds' recipe."""

    def middle(name: str, key: str) -> float:
        return statistics.median(one[key] for one in found[name])

    def ratio(name: str, key: str) -> float:
        turns = zip(found[name], found[SEED], strict=True)
        return statistics.median(one[key] / seed[key] for one, seed in turns)

    rows = [
        [
            name,
            f"{middle(name, 'cpu_seconds'):.1f}",
            f"{1 / ratio(name, 'cpu_seconds'):.2f}",
            f"{middle(name, 'rows_per_second'):.3f}",
            f"{ratio(name, 'rows_per_second'):.2f}",
            f"{middle(name, 'peak') / 2**30:.2f}",
            f"{ratio(name, 'peak'):.2f}",
            f"{middle(name, 'start_up'):.1f}",
        ]
        for name in found
    ]
    heads = ["recipe", "CPU s", "times as fast", "rows/s", "times as many", "peak GiB", "ratio", "start s"]
    return log.format_table(heads, rows)


if __name__ == "__main__":
    sys.exit(main())
