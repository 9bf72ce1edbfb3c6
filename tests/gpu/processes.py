"""What the checks run in processes of their own, since it dies, runs out of memory or needs an untouched CUDA.

`python -m tests.gpu.processes FUNCTION [ARGUMENT…]`; arguments and the result, the last line of stdout, are JSON.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ftlib.run_module import module_command


@dataclass(frozen=True)
class Started:
    """A process at work."""

    process: subprocess.Popen[str]

    def code(self) -> int:
        """Wait for its end; its exit code."""
        self.process.communicate()
        return self.process.returncode

    def result(self) -> Any:
        """Wait for what its function returns.

        Raises:
            RuntimeError: it ended without a result.
        """
        lines = (self.process.communicate()[0] or "").splitlines()
        if self.process.returncode or not lines:
            raise RuntimeError(f"{self.process.args[4]} ended with {self.process.returncode}")  # type: ignore[index]
        return json.loads(lines[-1])


def start(function: str, *arguments: object, **environment: object) -> Started:
    """Begin a function of this module beside this process."""
    texts = [json.dumps(str(one) if isinstance(one, Path) else one) for one in arguments]
    command = module_command("tests.gpu.processes", function, *texts)
    variables = {name: str(value) for name, value in environment.items()}
    return Started(subprocess.Popen(command, env={**os.environ, **variables}, stdout=subprocess.PIPE, text=True))


def mixed() -> dict[str, Any]:
    """Sections of a config that computes in this GPU's 16-bit numbers."""
    from tests.gpu import models

    return models.mixed()


def train(config: str, runs_folder: str, die_at: int = 0) -> int:
    """`ftlib train`, killed after a step if wished."""
    from ftlib.cli.main import main
    from ftlib.runs.run import Run
    from ftlib.training import train as training_train

    os.environ.update(FTLIB_STORE=str(Path(config).parent / "store"), FTLIB_RUNS=runs_folder)
    log_step = training_train._log_step

    def log_and_die(run: Run, record: dict[str, Any], update: Any) -> None:
        log_step(run, record, update)
        if record["step"] == die_at:
            os.kill(os.getpid(), signal.SIGKILL)

    if die_at:
        training_train._log_step = log_and_die
    return main(["train", config])


def train_sharded(config: str, runs_folder: str, die_at: int = 0) -> int:
    """`train` with the model sharded over this process alone; ftlib itself shards over two or more."""
    import torch
    from torch import distributed

    from ftlib.models import sharding
    from ftlib.models.loading import device
    from ftlib.training import train as training_train
    from tests.gpu.machine import REHEARSAL

    if not REHEARSAL:
        torch.cuda.set_device(device())
    backend = "gloo" if REHEARSAL else "nccl"
    distributed.init_process_group(backend, store=distributed.HashStore(), rank=0, world_size=1)
    training_train._sharding_mesh = lambda *arguments: sharding.make_mesh(device(), "full", 1)
    return train(config, runs_folder, die_at)


def train_out_of_memory(config: str, runs_folder: str, place: str) -> int:
    """`ftlib train` that runs out of memory once, in its fifth micro-batch or step."""
    import torch
    from torch import Tensor

    from ftlib.models.loss import answer_loss as plain
    from ftlib.training import trainer

    calls = 0

    def loss(model: torch.nn.Module, batch: dict[str, Tensor], *arguments: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 5 and place == "forward":
            _exhaust_memory()
        value = plain(model, batch, *arguments)
        if calls == 5 and place == "backward":
            value.register_hook(lambda gradient: _exhaust_memory())
        return value

    trainer.answer_loss = loss
    if place == "optimizer":
        step = torch.optim.AdamW.step
        steps = 0

        def stepping(self: Any, *arguments: Any, **more: Any) -> Any:
            nonlocal steps
            steps += 1
            if steps == 5:
                _exhaust_memory()
            return step(self, *arguments, **more)

        torch.optim.AdamW.step = stepping  # type: ignore[method-assign,assignment]
    return train(config, runs_folder)


def evaluate_out_of_memory(config: str, runs_folder: str) -> int:
    """`ftlib evaluate` whose first batch runs out of memory."""
    from ftlib.cli.main import main
    from ftlib.evaluation.model import EvalModel

    def answer(self: EvalModel, rows: Any, settings: Any) -> list[tuple[str, bool]]:
        _exhaust_memory()
        return []

    EvalModel.generate = answer  # type: ignore[method-assign]
    os.environ.update(FTLIB_STORE=str(Path(config).parent / "store"), FTLIB_RUNS=runs_folder)
    return main(["evaluate", config])


def _exhaust_memory() -> None:
    """Ask for more than any GPU has."""
    import torch

    from tests.gpu.machine import DEVICE, REHEARSAL

    if REHEARSAL:
        raise torch.OutOfMemoryError("CUDA out of memory. (a rehearsal)")
    torch.empty(2**50, dtype=torch.uint8, device=DEVICE)


def words_without_memory() -> dict[str, Any]:
    """What torch raises where libraries find no memory: a plain tensor, cuBLAS' handle, cuDNN's workspace."""
    import torch

    from ftlib.core.out_of_memory import is_out_of_memory
    from tests.gpu.machine import DEVICE

    inputs = torch.randn(64, 64, device=DEVICE)
    images, filters = torch.ones(1, 8, 64, 64, device=DEVICE), torch.ones(8, 8, 3, 3, device=DEVICE)
    kept, size = [], torch.cuda.mem_get_info()[0]
    while size > 2**16:
        try:
            kept.append(torch.empty(size, dtype=torch.uint8, device=DEVICE))
        except RuntimeError:
            size //= 2
    found: dict[str, Any] = {"free_at_the_end": torch.cuda.mem_get_info()[0]}
    for name, run in {
        "tensor": lambda: torch.empty(2**24, device=DEVICE),
        "matmul": lambda: inputs @ inputs,
        "convolution": lambda: torch.nn.functional.conv2d(images, filters),
    }.items():
        try:
            run()
            torch.cuda.synchronize()
            found[name] = "nothing was raised"
        except Exception as error:
            known = "" if is_out_of_memory(error) else "not recognized: "
            found[name] = f"{known}{type(error).__name__}: {str(error).splitlines()[0][:120]}"
    return found


def bandwidth() -> dict[str, Any]:
    """Bus bandwidth of all-reduce, 2 · (n - 1) / n · bytes / seconds: of all GPUs, inside a node, between nodes.

    The formula is nccl-tests' (doc/PERFORMANCE.md), so that the figures compare with theirs.
    """
    import torch
    from torch import distributed

    from ftlib.core import log
    from ftlib.training import distributed as training_distributed
    from tests.gpu.machine import DEVICE, REHEARSAL, seconds

    with training_distributed.process_group(120):
        rank, world = log.rank_and_world_size()
        nodes: list[str] = [""] * world
        distributed.all_gather_object(nodes, os.environ.get("SLURM_NODEID", "0"))
        inside = {node: [one for one in range(world) if nodes[one] == node] for node in nodes}
        groups = {"all": list(range(world))}
        groups |= {f"inside {node}": some for node, some in inside.items() if len(inside) > 1 and len(some) > 1}
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
    return found


if __name__ == "__main__":
    answer = globals()[sys.argv[1]](*map(json.loads, sys.argv[2:]))
    if isinstance(answer, int):
        sys.exit(answer)
    print(json.dumps(answer), flush=True)
