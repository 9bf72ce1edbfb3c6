"""One rank of a job that runs `ftlib train` several times: `python -m tests.training.sharded_ranks CASES.json`.

Starting Python and importing torch takes longer than training a tiny model, so that one start serves several runs.
A case has `runs` (FTLIB_RUNS), `port`, `arguments`, and optionally

    stop_after   a step in which the last rank gets a signal
    kill_after   a step after which the last rank dies: the last case of a start
    fill_after   a step after which rank 0 can write no file larger than 64 KiB: the last case of a start
    scope        the scope that `choose_sharding` is to choose
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any

from ftlib.cli.main import main
from ftlib.core import signals
from ftlib.memory.search import ShardingChoice
from ftlib.models import sharding
from ftlib.training import train

_log_step, _train_phase, _choose_sharding = train._log_step, train._train_phase, train.choose_sharding


def run_cases(cases: list[dict[str, Any]], rank: int, world: int) -> None:
    """Run the cases one after the other, and print what became of each as a line of JSON."""
    for case in cases:
        os.environ |= {"FTLIB_RUNS": case["runs"], "MASTER_PORT": str(case["port"])}
        signals._pending = None
        seen: dict[str, Any] = {}

        def log_step(run: Any, record: dict[str, Any], update: Any, case: dict[str, Any] = case) -> None:
            _log_step(run, record, update)
            last = rank == world - 1
            if last and record["step"] == case.get("stop_after"):
                os.kill(os.getpid(), signal.SIGUSR1)
            if last and record["step"] == case.get("kill_after"):
                os.kill(os.getpid(), signal.SIGKILL)
            if rank == 0 and record["step"] == case.get("fill_after"):
                resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, resource.RLIM_INFINITY))

        def train_phase(context: Any, trainer: Any, point: Any, seen: dict[str, Any] = seen) -> Any:
            reached = _train_phase(context, trainer, point)
            kept = {
                name: one for name, one in trainer.model.named_parameters() if not isinstance(one, sharding.DTensor)
            }
            seen |= {"sharded": sharding.is_sharded(trainer.model), "whole": sorted(kept)}
            seen["differing"] = sharding.differing_parameters(kept) if seen["sharded"] else []
            return reached

        def choose(*arguments: Any, case: dict[str, Any] = case) -> ShardingChoice:
            if "scope" not in case:
                return _choose_sharding(*arguments)
            return ShardingChoice(case["scope"], world // arguments[-1], "as the test wants")

        train._log_step, train._train_phase, train.choose_sharding = log_step, train_phase, choose
        print(json.dumps({"code": main(["train", *case["arguments"]]), **seen}), flush=True)


if __name__ == "__main__":
    run_cases(
        json.loads(Path(sys.argv[1]).read_text()),
        int(os.environ["SLURM_PROCID"]),
        int(os.environ["SLURM_STEP_NUM_TASKS"]),
    )
