"""ftlib's training against the seeds' recipe: speed, memory, loading, start-up.

Run: `python -m tests.benchmarks.training [--profile cpu|gpu]`. Every measurement is a process of its own, the recipes
take turns on the same rows with the same LoRA. Prints a table on stderr and JSON on stdout.

The seeds' recipe is transformers' Trainer with the processor in the collator, `padding="longest"`, all logits and
gradient checkpointing; and the same without. Profile cpu: PaliGemma of real widths and vocabulary with 2 language and
3 vision layers, float32. Profile gpu: PaliGemma-3B at 224 and 448 and OpenCALM's 3B and 7B shapes, bfloat16.

CPU seconds are of the process, so that they tell something on a busy machine. Peak memory is what a micro-batch takes
on top of what stood before it (CPU), or reserved memory with CUDA's context (GPU).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

from ftlib import console
from ftlib.errors import EXIT_USER
from tests.benchmarks.recipes import bases, flops

STEPS = {"cpu": 4, "gpu": 12}
ROUNDS = {"cpu": 1, "gpu": 3}
LORA = {"method": "lora", "r": 8, "alpha": 16}


@dataclass(frozen=True)
class Setting:
    """A model and a micro-batch, and how ftlib trains it besides plain LoRA.

    Attributes:
        base: of `BASES`.
        ftlib: variant → fields of the config.
    """

    name: str
    family: str
    base: str
    micro_batch: int
    ftlib: dict[str, dict[str, Any]] = field(default_factory=lambda: {"ftlib": {}})


CHECKPOINTED = {"training": {"gradient_checkpointing": True}}
NF4 = {"model": {"quantization": "nf4"}}
ATTENTION = {"adapter": {"method": "attention"}, "training": {"optim": "sgd", "learning_rate": 0.03}}
GPU_VARIANTS = {
    "ftlib": {},
    "ftlib, checkpointing": CHECKPOINTED,
    "ftlib, nf4": NF4,
    "ftlib, nf4, checkpointing": {**NF4, **CHECKPOINTED},
    "ftlib, attention": ATTENTION,
}
TEXT_VARIANTS = {name: GPU_VARIANTS[name] for name in ("ftlib", "ftlib, nf4", "ftlib, nf4, checkpointing")}
PROFILES = {
    "cpu": [Setting("PaliGemma widths, 2 + 3 layers, 224 px", "paligemma", "small", 4)],
    "gpu": [
        Setting("PaliGemma-3B, 224 px", "paligemma", "paligemma-224", 8, GPU_VARIANTS),
        Setting("PaliGemma-3B, 448 px", "paligemma", "paligemma-448", 4, GPU_VARIANTS),
        Setting("OpenCALM-3B shapes", "causal", "neox-3b", 4, TEXT_VARIANTS),
        Setting("OpenCALM-7B shapes", "causal", "neox-7b", 4, TEXT_VARIANTS),
    ],
}
BASES = {
    "small": lambda folder: bases.make_paligemma(folder, 224, torch.float32, language_layers=2, vision_layers=3),
    "paligemma-224": lambda folder: bases.make_paligemma(folder, 224, torch.bfloat16),
    "paligemma-448": lambda folder: bases.make_paligemma(folder, 448, torch.bfloat16),
    "neox-3b": lambda folder: bases.make_neox(folder, 2560, 32, torch.bfloat16),
    "neox-7b": lambda folder: bases.make_neox(folder, 4096, 32, torch.bfloat16),
}


def main() -> int:
    """Measure and print; exit code 2 where there is no GPU for profile gpu."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.training", description=__doc__)
    parser.add_argument("--profile", choices=list(PROFILES), default="cpu")
    profile = parser.parse_args().profile
    if profile == "gpu" and not torch.cuda.is_available():
        console.say(
            "no GPU here: profile gpu was not measured. On one: python -m tests.benchmarks.training --profile gpu"
        )
        return EXIT_USER
    results = [measure(setting, profile) for setting in PROFILES[profile]]
    versions = {module.__name__: module.__version__ for module in (torch, transformers, peft)}
    machine = {"threads": torch.get_num_threads(), "load": os.getloadavg(), **versions}
    for result in results:
        console.say(f"\n{result['name']}, micro-batch {result['micro_batch']}\n{table(result['recipes'])}")
    console.say(f"\n{machine}")
    print(json.dumps({"profile": profile, "machine": machine, "results": results}, indent=1))
    return 0


def measure(setting: Setting, profile: str) -> dict[str, Any]:
    """All recipes of a setting, in turns; medians over the rounds."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        console.say(f"making {setting.name} with random weights")
        BASES[setting.base](folder / "base")
        bases.make_rows(folder / "rows", images=setting.family == "paligemma")
        plans = recipes(setting, profile, folder)
        found: dict[str, list[dict[str, float]]] = {name: [] for name in plans}
        for number in range(ROUNDS[profile]):
            for name, plan in plans.items():
                found[name].append(run(plan, folder / f"{number}"))
        medians = {name: middle(facts) for name, facts in found.items() if all(facts)}
        if profile == "gpu":
            flops.add_mfu(medians, setting.family, folder / "base")
    failed = [name for name in found if name not in medians]
    return {"name": setting.name, "micro_batch": setting.micro_batch, "recipes": medians, "out_of_memory": failed}


def recipes(setting: Setting, profile: str, folder: Path) -> dict[str, dict[str, Any]]:
    """Name → what `recipes/worker.py` needs to know."""
    dtype = "bfloat16" if profile == "gpu" else "float32"
    common = {
        "family": setting.family, "base": str(folder / "base"), "rows": str(folder / "rows"), "dtype": dtype,
        "steps": STEPS[profile], "micro_batch": setting.micro_batch, "output": str(folder / "output"),
    }  # fmt: skip
    plans = {
        "seed, checkpointing": {**common, "recipe": "seed", "checkpointing": True},
        "seed": {**common, "recipe": "seed", "checkpointing": False},
    }
    for name, fields in setting.ftlib.items():
        plans[name] = {**common, "recipe": "ftlib", "fields": fields}
    return plans


def run(plan: dict[str, Any], folder: Path) -> dict[str, float]:
    """One process; empty: it ran out of memory."""
    folder.mkdir(exist_ok=True)
    environment = {
        **os.environ,
        "FTLIB_STORE": str(folder / "store"),
        "FTLIB_RUNS": str(folder / "runs" / os.urandom(4).hex()),
    }
    if plan["recipe"] == "ftlib":
        plan = {**plan, "config": str(folder / "config.json")}
        Path(plan["config"]).write_text(json.dumps(config(plan)))
        prepare = [sys.executable, "-m", "ftlib", "prepare", plan["config"]]
        subprocess.run(prepare, env=environment, check=True, stdout=subprocess.DEVNULL)
    (folder / "plan.json").write_text(json.dumps(plan))
    worker = [sys.executable, "-m", "tests.benchmarks.recipes.worker", str(folder / "plan.json")]
    done = subprocess.run(worker, env=environment, capture_output=True, text=True)
    if done.returncode and "out of memory" in done.stderr.lower():
        return {}
    if done.returncode:
        raise SystemExit(done.stderr)
    facts: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    console.say(f"{plan['recipe']} {plan.get('fields', plan.get('checkpointing'))}: {facts}")
    return {**facts, "rows_per_second": plan["micro_batch"] / facts["seconds"]}


def config(plan: dict[str, Any]) -> dict[str, Any]:
    """ftlib's config of a plan; a YAML file may be JSON."""
    text = plan["family"] == "causal"
    fields: dict[str, dict[str, Any]] = {
        "model": {"family": plan["family"], "base": plan["base"], "dtype": plan["dtype"]},
        "adapter": {**LORA, "targets": ["query_key_value"]} if text else LORA,
        "training": {"max_steps": plan["steps"], "per_device_train_batch_size": plan["micro_batch"],
                     "learning_rate": 1e-4, "bf16": plan["dtype"] == "bfloat16"},
    }  # fmt: skip
    for section, values in plan["fields"].items():
        fields[section] = values if section == "adapter" else {**fields[section], **values}
    loss = {"on": "everything"} if text else {}
    data = {"source": "jsonl", "root": plan["rows"], "split": {"valid": 1, "test": 1}}
    task = "instruct" if text else "caption"
    return {"name": "bench", "task": task, **fields, "loss": loss, "data": data, "evaluation": {"before": False}}


def middle(facts: list[dict[str, float]]) -> dict[str, float]:
    """Medians over the rounds."""
    return {name: statistics.median(one[name] for one in facts) for name in facts[0]}


def table(results: dict[str, dict[str, float]]) -> str:
    """Everything as ratios to the seeds' recipe with gradient checkpointing, beside the plain numbers."""
    base = results.get("seed, checkpointing") or next(iter(results.values()))
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
            f"{one['mfu']:.0%}" if "mfu" in one else "",
        ]
        for name, one in results.items()
    ]
    heads = [
        "recipe",
        "rows/s",
        "ratio",
        "ratio by CPU time",
        "peak GiB",
        "ratio",
        "loads rows/s/core",
        "start s",
        "MFU",
    ]
    return console.table(heads, rows)


if __name__ == "__main__":
    sys.exit(main())
