"""Memory of full training with a sharded model on 1, 2 and 4 ranks, joined by gloo on CPUs.

Run: `python -m tests.benchmarks.sharding`; it needs 9 GB of memory and 7 GB in the temporary folder. A Llama with 0.4
billion random float32 weights is loaded, trained for one step with AdamW and saved by ftlib's own code.
Every number of ranks is a start of its own. Prints a table on stderr and JSON on stdout.

Peaks are the kernel's (VmHWM, reset before each phase), without what the process had in memory before the phase; of
ranks, the largest.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from ftlib.config.schema import Config
from ftlib.core import log
from ftlib.models import sharding
from ftlib.training import checkpoints, distributed
from ftlib.training.initialize import trainable_model
from tests.conftest import REPOSITORY
from tests.training.sharded_ranks import free_port

SHAPES = LlamaConfig(
    vocab_size=4096, hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16
)
WORLDS = (1, 2, 4)


def main() -> int:
    """Measure and print."""
    log.configure()
    log.info(f"{os.sysconf('SC_AVPHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.1f} GiB of memory are free")
    with tempfile.TemporaryDirectory() as temporary:
        base = Path(temporary) / "base"
        with torch.device("meta"):
            model = LlamaForCausalLM(SHAPES)
        model.to_empty(device="cpu")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.02)
        model.save_pretrained(base)
        del model
        results = {world: run(world, base) for world in WORLDS}
    log.info("\n" + table(results))
    print(json.dumps({"torch": torch.__version__, "ranks": results}, indent=1))
    return 0


def run(world: int, base: Path) -> dict[str, float]:
    """The largest figure of all ranks."""
    environment = {
        **os.environ,
        "MASTER_PORT": str(free_port()),
        "PYTHONPATH": str(REPOSITORY),
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "SLURM_STEP_NUM_TASKS": str(world),
    }
    command = [sys.executable, "-m", "tests.benchmarks.sharding", str(base)]
    ranks = [
        subprocess.Popen(command, env={**environment, "SLURM_PROCID": str(rank)}, stdout=subprocess.PIPE, text=True)
        for rank in range(world)
    ]
    outputs = [rank.communicate()[0] for rank in ranks]
    if any(rank.returncode for rank in ranks):
        raise SystemExit(f"a rank failed: {[rank.returncode for rank in ranks]}")
    facts = [json.loads(output.splitlines()[-1]) for output in outputs]
    found = {name: max(one[name] for one in facts) for name in facts[0]}
    log.info(f"{world}: {found}")
    return found


def measure(base: Path) -> dict[str, float]:
    """What one rank sees."""
    world = log.rank_and_world_size()[1]
    config = Config.model_validate(
        {
            "name": "bench",
            "task": "instruct",
            "model": {"family": "causal", "base": str(base), "dtype": "float32"},
            "adapter": {"method": "full"},
            "data": {"source": "instructions", "root": str(base)},
        }
    )
    facts: dict[str, float] = {}
    with distributed.process_group(600):
        cpu = torch.device("cpu")
        mesh = sharding.make_mesh(cpu, "full", 1) if world > 1 else None
        before = reset_peak()
        set_seed(0)
        model = trainable_model(config, None, base, None, mesh)  # type: ignore[arg-type]
        if mesh:
            sharding.shard(model, mesh, cpu)
        facts["part"] = held(model.parameters())
        facts["loading"] = peak() - before
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
        before = reset_peak()
        ids = torch.arange(16).reshape(1, 16)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        states = [value for state in optimizer.state.values() for value in state.values() if value.dim()]
        facts |= {"gradients": held(gradients), "optimizer": held(states)}
        facts["state"] = facts["part"] + facts["gradients"] + facts["optimizer"]
        facts["training"], facts["resident"] = peak() - before, peak()
        optimizer.zero_grad()
        folder = base.parent / f"checkpoint-{world}" if log.is_main_process() else None
        if folder:
            folder.mkdir()
        before = reset_peak()
        checkpoints.save_trainable_parameters(model, folder, {})
        sharding.write_optimizer_state(optimizer, folder and folder / "optimizer.pt")
        distributed.barrier()
        facts["saving"] = peak() - before
    return facts


def held(tensors: Iterable[Tensor]) -> int:
    """Bytes of this rank's part."""
    return sum(local.numel() * local.element_size() for local in map(sharding.local_part, tensors))


def reset_peak() -> int:
    """Reset the peak of resident memory; return what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak() -> int:
    """Bytes of the peak of resident memory since the last reset."""
    return _status("VmHWM")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


def table(results: dict[int, dict[str, Any]]) -> str:
    """All figures in GiB but for ratios."""
    rows = []
    for world, one in results.items():
        sizes = [one[name] / 2**30 for name in ("part", "gradients", "optimizer", "state")]
        ratio = one["state"] / results[1]["state"]
        peaks = [one[name] / 2**30 for name in ("loading", "training", "resident", "saving")]
        loading = one["loading"] / one["part"]
        rows.append([str(world), *(f"{size:.2f}" for size in sizes), f"{ratio:.3f}"])
        rows[-1] += [f"{peaks[0]:.2f}", f"{loading:.2f}", *(f"{size:.2f}" for size in peaks[1:])]
    heads = ["ranks", "weights", "gradients", "optimizer", "together", "of one", "loading", "of weights"]
    return log.format_table([*heads, "training", "resident", "saving"], rows)


if __name__ == "__main__":
    if len(sys.argv) == 1:
        sys.exit(main())
    print(json.dumps(measure(Path(sys.argv[1]))))
