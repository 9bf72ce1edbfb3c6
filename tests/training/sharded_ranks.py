"""Ranks of jobs that run `ftlib train` several times; forked from one process, which has imported torch for them all.

Starting Python and importing torch takes far longer than training a tiny model. `Ranks` starts
`python -m tests.training.sharded_ranks`, which reads jobs as lines of JSON, forks their ranks, and writes their PIDs
and then their exit codes. A rank runs its cases one after the other. A case has `runs` (FTLIB_RUNS), `port`,
`arguments`, and optionally

    stop_after   a step after which the last rank gets a signal; the others get it while they gather the checkpoint
    stop_in_loss how many batches of a validation loss the last rank computes before it gets a signal
    kill_after   a step after which the last rank dies: the last case of a job
    fill_after   a step after which a rank, `fill_rank`, can write no file larger than `fill_bytes`: the last case
    scope        the scope that `choose_sharding` is to choose
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import select
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Case = dict[str, Any]


@dataclass(frozen=True)
class Ended:
    """What became of a rank.

    Attributes:
        code: exit code; negative: the signal that killed it.
        seen: of each case that ended, its exit code and what the rank saw of the model.
        error: the end of its messages.
    """

    code: int
    seen: list[dict[str, Any]]
    error: str

    @property
    def codes(self) -> list[int]:
        return [one["code"] for one in self.seen]


def free_port() -> int:
    """A port for a server, below those that the system gives to connections, which any process may take meanwhile."""
    while True:
        port = random.SystemRandom().randrange(22_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


class Ranks:
    """Starts jobs of several ranks on this machine, one job at a time.

    Args:
        folder: for the messages of the ranks.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._pids, self._jobs = folder, list[int](), 0
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.training.sharded_ranks"],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(self, count: int, cases: Sequence[Case], nodes: int = 1) -> list[int]:
        """Start the ranks of a job with this process's environment and return their PIDs."""
        for case in cases:
            case["port"] = free_port()
        self._jobs += 1
        job = {"count": count, "nodes": nodes, "cases": cases, "environment": dict(os.environ), "output": self._output}
        assert self._process.stdin
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        self._pids = self._read(60)
        return self._pids

    def wait(self, seconds: float = 300) -> list[Ended]:
        """Wait until the ranks have ended."""
        codes = self._read(seconds)
        self._pids, ended = [], []
        for rank, code in enumerate(codes):
            out, error = (Path(f"{self._output}-{rank}.{name}").read_text() for name in ("out", "err"))
            seen = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
            ended.append(Ended(code, seen, error[-6000:]))
        return ended

    def run(self, count: int, cases: Sequence[Case], nodes: int = 1) -> list[Ended]:
        """Start a job and wait for its end."""
        self.start(count, cases, nodes)
        return self.wait(600 + 60 * len(cases))

    def close(self) -> None:
        """End the ranks that are left, and the process that forks them."""
        for pid in self._pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.communicate()

    @property
    def _output(self) -> str:
        return str(self._folder / f"job{self._jobs}")

    def _read(self, seconds: float) -> list[int]:
        assert self._process.stdout
        ready, _, _ = select.select([self._process.stdout], [], [], seconds)
        assert ready, f"no answer after {seconds:g} s"
        found: list[int] = json.loads(self._process.stdout.readline())
        return found


def fork_ranks() -> None:
    """Fork the ranks of the jobs that stdin lists."""
    for line in sys.stdin:
        job = json.loads(line)
        pids = [_fork(job, rank) for rank in range(job["count"])]
        print(json.dumps(pids), flush=True)
        codes: dict[int, int] = {}
        while len(codes) < len(pids):
            pid, status = os.wait()
            codes[pid] = os.waitstatus_to_exitcode(status)
            if codes[pid] == 1:  # by a traceback: the others would wait for it
                for other in set(pids) - codes.keys():
                    os.kill(other, signal.SIGKILL)
        print(json.dumps([codes[pid] for pid in pids]), flush=True)


def _fork(job: dict[str, Any], rank: int) -> int:
    from ftlib.core import signals

    if pid := os.fork():
        return pid
    code = 1
    try:
        os.setsid()
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{job['output']}-{rank}.{name}", os.O_WRONLY | os.O_CREAT, 0o600), number)
        count, nodes = job["count"], job["nodes"]
        os.environ.clear()
        os.environ.update(job["environment"])
        os.environ.update(
            MASTER_ADDR="127.0.0.1",
            OMP_NUM_THREADS="1",
            SLURM_LOCALID=str(rank % (count // nodes)),
            SLURM_PROCID=str(rank),
            SLURM_STEP_NUM_NODES=str(nodes),
            SLURM_STEP_NUM_TASKS=str(count),
        )
        signals._process = os.getpid()
        run_cases(job["cases"], rank, count)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run_cases(cases: list[Case], rank: int, world: int) -> None:
    """Run the cases one after the other, and print what became of each as a line of JSON."""
    import torch

    from ftlib.cli.main import main
    from ftlib.core import signals
    from ftlib.memory.search import ShardingChoice
    from ftlib.models import sharding
    from ftlib.training import checkpoints, train, validation

    plain_save, plain_loss_sums = checkpoints.save_trainable_parameters, validation._loss_sums
    plain_log_step, plain_train_phase, plain_choose = train._log_step, train._train_phase, train.choose_sharding
    for case in cases:
        os.environ |= {"FTLIB_RUNS": case["runs"], "MASTER_PORT": str(case["port"])}
        signals._pending = None
        seen: dict[str, Any] = {}

        def log_step(run: Any, record: dict[str, Any], update: Any, case: Case = case) -> None:
            plain_log_step(run, record, update)
            last = rank == world - 1
            if last and record["step"] == case.get("stop_after"):
                os.kill(os.getpid(), signal.SIGUSR1)
            if last and record["step"] == case.get("kill_after"):
                os.kill(os.getpid(), signal.SIGKILL)
            if rank == case.get("fill_rank", 0) and record["step"] == case.get("fill_after"):
                resource.setrlimit(resource.RLIMIT_FSIZE, (case.get("fill_bytes", 1 << 16), resource.RLIM_INFINITY))

        def train_phase(context: Any, trainer: Any, point: Any, seen: dict[str, Any] = seen) -> Any:
            reached = plain_train_phase(context, trainer, point)
            kept = {
                name: one for name, one in trainer.model.named_parameters() if not isinstance(one, sharding.DTensor)
            }
            seen |= {"sharded": sharding.is_sharded(trainer.model), "whole": sorted(kept)}
            seen["differing"] = sharding.differing_parameters(kept) if seen["sharded"] else []
            seen["noticed"] = sharding.differing_parameters({"rank": torch.tensor(rank)}) if world > 1 else []
            return reached

        def choose(*arguments: Any, case: Case = case) -> ShardingChoice:
            if "scope" not in case:
                return plain_choose(*arguments)
            return ShardingChoice(case["scope"], world // arguments[-1], "as the test wants")

        def save(*arguments: Any, case: Case = case) -> Any:
            if case.get("stop_after") and rank < world - 1:
                os.kill(os.getpid(), signal.SIGUSR1)
            return plain_save(*arguments)

        def loss_sums(*arguments: Any, case: Case = case) -> Any:
            case["stop_in_loss"] = case.get("stop_in_loss", 0) - 1
            if case["stop_in_loss"] == 0 and rank == world - 1:
                os.kill(os.getpid(), signal.SIGUSR1)
            return plain_loss_sums(*arguments)

        train._log_step, train._train_phase, train.choose_sharding = log_step, train_phase, choose
        checkpoints.save_trainable_parameters, validation._loss_sums = save, loss_sums
        print(json.dumps({"code": main(["train", *case["arguments"]]), **seen}), flush=True)


if __name__ == "__main__":
    if "FTLIB_TORCHVISION" in os.environ:
        from tests import torchvision_folder

        torchvision_folder.use(os.environ["FTLIB_TORCHVISION"])
    # Imported once, for all ranks.
    import PIL.Image

    import ftlib.cli.main
    import ftlib.evaluation.inference
    import ftlib.metrics.classification
    import ftlib.training.train  # noqa: F401

    PIL.Image.init()
    fork_ranks()
