"""What needs several GPUs: NCCL's bandwidth, losses against one GPU, and a rank that is killed.

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
from pathlib import Path
from typing import Any

from ftlib.core import log
from tests.gpu import models
from tests.gpu.checks import outcome, prepare
from tests.gpu.processes import Started, start

_PHASES = ("bandwidth", "all", "killed", "resumed", "alone")
_PORT = 21_000
"""Each phase meets at a port of its own: a rank of the next one could reach one that is still ending."""


def main(shared: Path) -> None:
    """All tasks of the step call this at about the same time.

    Args:
        shared: a folder that all nodes see.
    """
    rank, world = log.rank_and_world_size()
    shared.mkdir(parents=True, exist_ok=True)
    config = shared / "config.yaml"
    if rank == 0:
        usual = models.mixed()
        adapter = {"method": "lora", "r": 4, "alpha": 8, "freeze": []}  # no dropout: ranks draw random numbers apart
        training = {**usual["training"], "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
                    "ddp_timeout": 60}  # fmt: skip
        sections = {"model": usual["model"], "adapter": adapter, "training": training}
        prepare(models.write_config(shared, **sections, job={"gpus": world}))
        (shared / "ready").touch()
    _wait_for(shared / "ready")

    def phase(name: str, *call: object, **environment: object) -> Started:
        port = _PORT + int(os.environ.get("SLURM_JOB_ID", 0)) % 1000 * 10 + _PHASES.index(name)
        return start(*call, MASTER_PORT=port, **environment)  # type: ignore[arg-type]

    rates = phase("bandwidth", "bandwidth").result()
    codes = {"all": phase("all", "train", config, shared / "straight").code()}
    dies = 5 if rank == world - 1 else 0
    codes["killed"] = phase("killed", "train", config, shared / "broken", dies).code()
    codes["resumed"] = phase("resumed", "train", config, shared / "broken").code()
    (shared / f"codes-{rank}.json").write_text(json.dumps(codes))
    if rank:
        return
    one = models.write_config(
        shared / "one", **{**sections, "training": {**training, "gradient_accumulation_steps": 2 * world}}
    )
    (shared / "one" / "store").symlink_to(shared / "store")
    alone = {"SLURM_STEP_NUM_TASKS": 1, "SLURM_STEP_NUM_NODES": 1}
    code = phase("alone", "train", one, shared / "alone", **alone).code()
    every = [json.loads(_wait_for(shared / f"codes-{number}.json").read_text()) for number in range(world)]

    def tell(name: str, ok: bool, **figures: Any) -> None:
        line = json.dumps({"name": f"several {name}", "ok": ok, **figures})
        print(line, flush=True)
        with (shared / "lines.jsonl").open("a") as file:
            file.write(line + "\n")

    tell("bandwidth", True, gb_per_s=rates)
    expected, together, broken = (
        outcome(one, shared / "alone"), outcome(config, shared / "straight"), outcome(config, shared / "broken")
    )  # fmt: skip
    difference = max(abs(a - b) for a, b in zip(expected[0], together[0], strict=True))
    ok = code == 0 and not any(codes["all"] for codes in every) and difference < 2e-2
    tell("losses", ok, gpus=world, loss_difference=difference)
    difference = max(abs(a - b) for a, b in zip(together[0], broken[0], strict=True))
    ended = [codes["killed"] for codes in every]
    ok = not any(codes["resumed"] for codes in every) and all(ended) and difference < 1e-3
    same = broken[1] == together[1]
    tell("kill and resume", ok, exit_codes_of_the_killed=ended, loss_difference=difference, same_bytes=same)


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
