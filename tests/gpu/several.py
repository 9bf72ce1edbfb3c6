"""What needs several GPUs: NCCL's bandwidth; losses against one GPU, and a rank that is killed, by DDP and sharded.

Run as one task for each GPU: `srun … python3 -m tests.gpu.several SHARED_FOLDER`; jobs/acceptance.sbatch does. The
first task prints one JSON line per result, and appends it to SHARED_FOLDER/lines.jsonl. `FTLIB_GPU_REHEARSAL=cpu`
rehearses it on CPUs with gloo.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ftlib.core import log
from tests.gpu import models
from tests.gpu.checks import outcome, prepare
from tests.gpu.processes import start

_PORT = 21_000
"""Each phase meets at a port of its own: a rank of the next one could reach one that is still ending."""


def kinds(world: int) -> dict[str, dict[str, Any]]:
    """Sections of configs: adapters with DDP, and full training of a model that is sharded over all GPUs."""
    usual = models.mixed()
    # No dropout: ranks draw random numbers apart.
    lora = {"adapter": {"method": "lora", "r": 4, "alpha": 8, "freeze": []}, "model": usual["model"]}
    sharded = {"adapter": {"method": "full"}, "parallel": {"shard": "full"}}
    cut = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "ddp_timeout": 60}
    job = {"job": {"gpus": world}}
    if "bf16" in usual["training"]:  # fp16's scaler is refused with sharded gradients
        sharded |= {"model": usual["model"], "training": usual["training"]}
    return {
        "ddp": {**lora, **job, "training": {**usual["training"], **cut}},
        "sharded": {**sharded, **job, "training": {**sharded.get("training", {}), **cut, "learning_rate": 1e-3}},
    }


def main(shared: Path) -> None:
    """All tasks of the step call this at about the same time.

    Args:
        shared: a folder that all nodes see.
    """
    rank, world = log.rank_and_world_size()
    shared.mkdir(parents=True, exist_ok=True)
    sections = kinds(world)
    configs = {name: shared / name / "config.yaml" for name in sections}
    if rank == 0:
        prepare(models.write_config(shared, **sections["ddp"]))
        for name, one in sections.items():
            models.write_config(shared / name, **one)
            (shared / name / "store").symlink_to(shared / "store")
        (shared / "ready").touch()
    _wait_for(shared / "ready")
    first_port = _PORT + int(os.environ.get("SLURM_JOB_ID", 0)) % 1000 * 10
    rates = start("bandwidth", MASTER_PORT=first_port).result()
    codes: dict[str, dict[str, int]] = {}
    for number, (name, config) in enumerate(configs.items()):
        phases = {"straight": ("straight", 0), "killed": ("broken", 5 if rank == world - 1 else 0),
                  "resumed": ("broken", 0)}  # fmt: skip
        codes[name] = {}
        for phase, (place, dies) in phases.items():
            port = first_port + 1 + number * len(phases) + list(phases).index(phase)
            codes[name][phase] = start("train", config, shared / name / place, dies, MASTER_PORT=port).code()
    (shared / f"codes-{rank}.json").write_text(json.dumps(codes))
    if rank:
        return
    every = [json.loads(_wait_for(shared / f"codes-{number}.json").read_text()) for number in range(world)]

    def tell(name: str, ok: bool, **figures: Any) -> None:
        line = json.dumps({"name": f"several {name}", "ok": ok, **figures})
        print(line, flush=True)
        with (shared / "lines.jsonl").open("a") as file:
            file.write(line + "\n")

    tell("bandwidth", True, gb_per_s=rates)
    for name, config in configs.items():
        _compare(name, config, [codes[name] for codes in every], tell)


def _compare(name: str, config: Path, every: list[dict[str, int]], tell: Callable[..., None]) -> None:
    """Train on one GPU, in more micro-batches, and report what differs between the runs of a kind."""
    places = [config.parent / place for place in ("alone", "straight", "broken")]
    code = start("train", config, places[0], SLURM_STEP_NUM_TASKS=1, SLURM_STEP_NUM_NODES=1).code()
    expected, together, broken = (outcome(config, place) for place in places)
    difference = max(abs(a - b) for a, b in zip(expected[0], together[0], strict=True))
    ok = code == 0 and not any(codes["straight"] for codes in every) and difference < 2e-2
    tell(f"{name} losses", ok, gpus=len(every), loss_difference=difference)
    difference = max(abs(a - b) for a, b in zip(together[0], broken[0], strict=True))
    ended = [codes["killed"] for codes in every]
    ok = not any(codes["resumed"] for codes in every) and all(ended) and difference < 1e-3
    same = broken[1] == together[1]
    tell(f"{name} kill and resume", ok, exit_codes_of_the_killed=ended, loss_difference=difference, same_bytes=same)


def _wait_for(path: Path, limit: float = 300) -> Path:
    begun = time.monotonic()
    while not path.exists():
        if time.monotonic() - begun > limit:
            raise TimeoutError(f"{path.name} did not come")
        time.sleep(0.5)
    return path


if __name__ == "__main__":
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    main(Path(sys.argv[1]))
