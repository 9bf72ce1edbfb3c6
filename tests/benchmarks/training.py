"""ftlib's training against the seeds' recipe: speed, memory, loading, start-up.

Run: `python -m tests.benchmarks.training`. Every measurement is a process of its own, on the same rows with the same
LoRA. Prints a table on stderr and JSON on stdout. On a GPU `make gpu` measures instead.

The seeds' recipe is transformers' Trainer with the processor in the collator, `padding="longest"`, all logits and
gradient checkpointing; and the same without. The model is a PaliGemma of real widths and vocabulary with 2 language and
3 vision layers, in float32.

CPU seconds are of the process, so that they tell something on a busy machine. Peak memory is what a micro-batch takes
on top of what stood before it.

`FTLIB_PEER=/path/to/another/checkout` measures that checkout's ftlib too, in the same run.
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

STEPS = 4
MICRO_BATCH = 4
PEER = os.environ.get("FTLIB_PEER", "")
ROUNDS = 3 if PEER else 1
WORKER = Path("tests", "benchmarks", "recipes", "worker.py")
"""In a checkout: it calls its own ftlib."""


def main() -> int:
    """Measure and print."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        log.info("making a base model with random weights")
        bases.make_paligemma(folder / "base", 224, torch.float32, language_layers=2, vision_layers=3)
        bases.make_rows(folder / "rows")
        plans = recipes(folder)
        found: dict[str, list[dict[str, float]]] = {name: [] for name in plans}
        for number in range(ROUNDS):
            for name, plan in plans.items():
                if number == 0 or plan["recipe"] == "ftlib":
                    found[name].append(run(name, plan, folder / f"{number}"))
    medians = {name: middle(facts) for name, facts in found.items()}
    versions = {module.__name__: module.__version__ for module in (torch, transformers, peft)}
    machine = {"threads": torch.get_num_threads(), "load": os.getloadavg(), "cpu_flags": cpu_flags(), **versions}
    log.info(f"\n{table(medians)}\n{machine}")
    print(json.dumps({"machine": machine, "recipes": medians}, indent=1))
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
        "seed, checkpointing": {**common, "recipe": "seed", "checkpointing": True},
        "seed": {**common, "recipe": "seed", "checkpointing": False},
        "ftlib": {**common, "recipe": "ftlib", "code": str(REPOSITORY)},
    }
    if PEER:
        plans["ftlib of the other checkout"] = {**plans["ftlib"], "code": str(Path(PEER).absolute())}
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
    worker = [sys.executable, str(Path(plan.get("code", REPOSITORY)) / WORKER), str(folder / "plan.json")]
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


def middle(facts: list[dict[str, float]]) -> dict[str, float]:
    """Medians over the rounds."""
    return {name: statistics.median(one[name] for one in facts) for name in facts[0]}


def table(results: dict[str, dict[str, float]]) -> str:
    """Everything as ratios to the seeds' recipe with gradient checkpointing, beside the plain numbers."""
    base = results["seed, checkpointing"]
    rows = [
        [
            name,
            f"{one['rows_per_second']:.3f}",
            f"{one['rows_per_second'] / base['rows_per_second']:.2f}",
            f"{base['cpu_seconds'] / one['cpu_seconds']:.2f}",
            f"{one['peak'] / 2**30:.2f}",
            f"{one['peak'] / base['peak']:.2f}",
            f"{one['loading']:.0f}",
            f"{one['start_up']:.1f}",
        ]
        for name, one in results.items()
    ]
    heads = ["recipe", "rows/s", "ratio", "ratio by CPU time", "peak GiB", "ratio", "loads rows/s/core", "start s"]
    return log.format_table(heads, rows)


if __name__ == "__main__":
    sys.exit(main())
