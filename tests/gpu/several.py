"""What needs several GPUs: NCCL's bandwidth, losses against one GPU, and a rank that is killed.

Run as one task for each GPU: `srun … python3 -m tests.gpu.several SHARED_FOLDER`; jobs/acceptance.sbatch does. The
first task prints one JSON line per result. `FTLIB_GPU_REHEARSAL=cpu` rehearses it on CPUs with gloo.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", TQDM_DISABLE="1")

import torch
from torch import distributed

from ftlib import console
from ftlib.training import ranks
from tests.gpu import models
from tests.gpu.checks import begin, forked, outcome, prepare, train
from tests.gpu.machine import DEVICE, REHEARSAL, seconds

_PHASES = ("bandwidth", "all", "killed", "resumed", "alone")
_PORT = 21_000
"""Each phase meets at a port of its own: a rank of the next one could reach one that is still ending."""


def main(shared: Path, tell: Callable[[dict[str, Any]], None]) -> None:
    """All tasks of the step call this at about the same time.

    Args:
        shared: a folder that all nodes see.
        tell: called by the first task with each result.
    """
    rank, world = console.ranks()
    shared.mkdir(parents=True, exist_ok=True)
    config = shared / "config.yaml"
    if rank == 0:
        usual = begin(models.mixed)()
        adapter = {"method": "lora", "r": 4, "alpha": 8, "freeze": []}  # no dropout: ranks draw random numbers apart
        job = {"gpus": world, "nodes": 1}
        training = {**usual["training"], "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
                    "ddp_timeout": 60}  # fmt: skip
        sections = {"model": usual["model"], "adapter": adapter, "training": training, "job": job}
        prepare(models.write_config(shared, **sections))
        (shared / "ready").touch()
    while not (shared / "ready").exists():
        time.sleep(0.5)

    def phase(name: str, function: Callable[..., Any], *arguments: object) -> int | None:
        os.environ["MASTER_PORT"] = str(
            _PORT + int(os.environ.get("SLURM_JOB_ID", 0)) % 1000 * 10 + _PHASES.index(name)
        )
        return forked(function, *arguments)

    phase("bandwidth", _bandwidth, shared / "bandwidth.json")
    codes = {"all": phase("all", train, config, shared / "straight")}
    last = rank == world - 1
    codes["killed"] = phase("killed", train, config, shared / "broken", 5 if last else 0)
    codes["resumed"] = phase("resumed", train, config, shared / "broken")
    (shared / f"codes-{rank}.json").write_text(json.dumps(codes))
    if rank:
        return
    alone = {"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NUM_NODES": "1", "SLURM_PROCID": "0"}
    os.environ.update(alone)
    one = json.loads(config.read_text())
    one["training"] |= {"gradient_accumulation_steps": 2 * world}
    one["job"] = {"gpus": 1}
    (shared / "one").mkdir()
    config_of_one = shared / "one" / "config.yaml"
    config_of_one.write_text(json.dumps(one))
    (shared / "one" / "store").symlink_to(shared / "store")
    code = phase("alone", train, config_of_one, shared / "alone")
    all_codes = [json.loads(_wait_for(shared / f"codes-{number}.json").read_text()) for number in range(world)]
    tell({"name": "several bandwidth", "ok": True, **json.loads((shared / "bandwidth.json").read_text())})
    expected, together = (outcome(config_of_one, shared / "alone"), outcome(config, shared / "straight"))
    difference = max(abs(a - b) for a, b in zip(expected[0], together[0], strict=True))
    ok = code == 0 and not any(codes["all"] for codes in all_codes) and difference < 2e-2
    tell({"name": "several losses", "ok": ok, "gpus": world, "loss_difference": difference})
    broken = outcome(config, shared / "broken")
    difference = max(abs(a - b) for a, b in zip(together[0], broken[0], strict=True))
    ended = [codes["killed"] for codes in all_codes]
    ok = not any(codes["resumed"] for codes in all_codes) and all(ended) and difference < 1e-3
    tell({"name": "several kill and resume", "ok": ok, "exit_codes_of_the_killed": ended, "loss_difference": difference,
          "same_bytes": broken[1] == together[1]})  # fmt: skip


def _wait_for(path: Path, limit: float = 300) -> Path:
    begun = time.monotonic()
    while not path.exists():
        if time.monotonic() - begun > limit:
            raise TimeoutError(f"{path.name} did not come")
        time.sleep(0.5)
    return path


def _bandwidth(file: Path) -> None:
    """Bus bandwidth of all-reduce, 2 · (n - 1) / n · bytes / seconds: of all GPUs, inside a node, between nodes.

    The formula is nccl-tests' (doc/PERFORMANCE.md), so that the figures compare with theirs.
    """
    with ranks.joined(120):
        rank, world = console.ranks()
        nodes: list[str] = [""] * world
        distributed.all_gather_object(nodes, os.environ.get("SLURM_NODEID", "0"))
        inside = {node: [one for one in range(world) if nodes[one] == node] for node in nodes}
        groups = {"all": list(range(world))}
        groups |= {
            f"inside {node}": members for node, members in inside.items() if len(inside) > 1 and len(members) > 1
        }
        if len(inside) > 1:
            groups["between"] = [members[0] for members in inside.values()]
        found: dict[str, Any] = {"backend": distributed.get_backend(), "gpus": world, "nodes": len(inside)}
        for name, members in groups.items():
            group = distributed.new_group(members)
            for size in (2**20,) if REHEARSAL else (2**20, 2**26, 2**30):
                if rank in members:
                    tensor = torch.ones(size // 4, device=DEVICE)
                    took = seconds(partial(distributed.all_reduce, tensor, group=group), 3 if REHEARSAL else 10, 2)
                    rate = 2 * (len(members) - 1) / len(members) * size / took
                    found[f"{name.split()[0]} {size >> 20} MiB"] = round(rate / 1e9, 2)
        if rank == 0:
            file.write_text(json.dumps({"gb_per_s": found}))


if __name__ == "__main__":
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)

    def tell(result: dict[str, Any]) -> None:
        line = json.dumps(result)
        print(line, flush=True)
        with (Path(sys.argv[1]) / "lines.jsonl").open("a") as file:
            file.write(line + "\n")

    main(Path(sys.argv[1]), tell)
