"""A sharded model (FSDP2) trains as one process does, and its checkpoints are those of one process.

Processes with Slurm's variables, joined by gloo, stand for the tasks of a step.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ftlib.core import jsonl
from ftlib.runs import run as runs
from ftlib.runs.run import Run
from tests.conftest import FULL, LORA, start_ftlib
from tests.models import tiny_causal, tiny_paligemma
from tests.training.test_resume import run_of

Ftlib = Callable[..., tuple[int, str, str]]

CAUSAL = """\
name: tiny
task: instruct
seed: 3
model: {family: causal, base: BASE}
adapter: ADAPTER
data: {source: instructions, root: ROOT, file: data.jsonl, split: {valid: 7, test: 0}}
training: {max_steps: 8, per_device_train_batch_size: 1, gradient_accumulation_steps: 4, learning_rate: 1.0e-2}
evaluation: {splits: [valid], loss: true}
checkpoint: {steps: 4, keep: 9}
"""
WAIT = "training.ddp_timeout=60"


def job(count: int, shard: str = "full") -> list[str]:
    """The effective batch of four as micro-batches of one row on some ranks."""
    cut = f"training.gradient_accumulation_steps={4 // count}"
    return [f"job.gpus={count}", "training.per_device_train_batch_size=1", cut, f"parallel.shard={shard}", WAIT]


def case(runs: Path, arguments: Sequence[object], stop_after: int = 0) -> dict[str, Any]:
    return {"runs": str(runs), "arguments": [*map(str, arguments)], "stop_after": stop_after}


def train_on(count: int, cases: list[dict[str, Any]], folder: Path, expect: Sequence[int] = ()) -> list[dict[str, Any]]:
    """Run cases on some ranks; return what the first rank saw of each."""
    for one in cases:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            one["port"] = probe.getsockname()[1]
    file = folder / "cases.json"
    file.write_text(json.dumps(cases))
    place = {"SLURM_STEP_NUM_TASKS": str(count), "OMP_NUM_THREADS": "1"}
    program = ("-m", "tests.training.sharded_ranks")
    ranks = [
        start_ftlib(file, program=program, **place, SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank))
        for rank in range(count)
    ]
    try:
        ended = [rank.communicate(timeout=300 + 60 * len(cases)) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    found = [[json.loads(line) for line in out.splitlines() if line.startswith("{")] for out, _ in ended]
    errors = "\n---\n".join(error[-4000:] for _, error in ended)
    wanted = list(expect) or [0] * len(cases)
    assert [[one["code"] for one in seen] for seen in found] == [wanted] * count, errors
    for one, seen in zip(cases, found[0], strict=True):
        if "parallel.shard=full" in one["arguments"] and "sharded" in seen:
            assert seen["sharded"] and not seen["differing"], "all ranks hold the same adapters"
            assert not [name for name in seen["whole"] if not ("lora_" in name or "modules_to_save" in name)]
    return found[0]


def values_of(run: Run, name: str) -> list[float]:
    return [line[name] for line in jsonl.read_jsonl_log(run.metrics) if "grad_norm" in line]


def evaluations_of(run: Run) -> list[tuple[int, str, float]]:
    return [
        (line["step"], line["metric"], line["value"]) for line in jsonl.read_jsonl_log(run.metrics) if "split" in line
    ]


def assert_same(ours: Run, theirs: Run) -> None:
    """Losses, gradient norms and evaluations are equal up to rounding; checkpoints and results have the same layout."""
    assert ours.folder.name == theirs.folder.name, "sharding is not part of a run's identity"
    for name, tolerance in (("loss", 1e-6), ("grad_norm", 1e-5)):
        values, wanted = values_of(ours, name), values_of(theirs, name)
        assert values[:2] == pytest.approx(wanted[:2], rel=tolerance), name
        assert values == pytest.approx(wanted, rel=100 * tolerance), f"{name}: Adam amplifies rounding"
    for one, other in zip(evaluations_of(ours), evaluations_of(theirs), strict=True):
        assert one[:2] == other[:2] and one[2] == pytest.approx(other[2], rel=1e-4, abs=1e-6)
    for folder, file in ((checkpoint_of(ours), "trainable.safetensors"), (result_of(ours), "*.safetensors")):
        there = checkpoint_of(theirs) if folder == checkpoint_of(ours) else result_of(theirs)
        weights, wanted = (load_file(next(iter(place.glob(file)))) for place in (folder, there))
        assert {name: (one.shape, one.dtype) for name, one in weights.items()} == {
            name: (one.shape, one.dtype) for name, one in wanted.items()
        }
        # Adam turns a gradient that is rounding alone into a step of the learning rate: compare what has moved.
        far = [name for name in wanted if (weights[name] - wanted[name]).norm() > 0.01 * wanted[name].norm() + 1e-3]
        assert not [name for name in far if "k_proj.bias" not in name and "query_key_value.bias" not in name], far
    names = sorted(path.name for path in result_of(theirs).iterdir())
    assert sorted(path.name for path in result_of(ours).iterdir()) == names
    settings = [json.loads(next(result_of(run).glob("*config.json")).read_text()) for run in (ours, theirs)]
    assert settings[0] == settings[1]
    states = [torch.load(checkpoint_of(run) / "optimizer.pt", weights_only=True) for run in (ours, theirs)]
    shapes = [
        {number: {key: value.shape for key, value in own.items()} for number, own in state["state"].items()}
        for state in states
    ]
    assert shapes[0] == shapes[1], "the optimizer's file holds whole tensors"


def exact(run: Run) -> tuple[dict[str, bytes], list[dict[str, object]]]:
    """The bytes of every file of weights and settings, and every logged number of a step but times."""
    found = [path for folder in (result_of(run), checkpoint_of(run)) for path in folder.glob("*.safetensors")]
    lines = [
        {name: value for name, value in line.items() if not name.endswith("seconds")}
        for line in jsonl.read_jsonl_log(run.metrics)
        if "grad_norm" in line
    ]
    return {str(path.relative_to(run.folder)): path.read_bytes() for path in found}, lines


def checkpoint_of(run: Run) -> Path:
    found = runs.last_checkpoint(run.checkpoint_root())
    assert found
    return found[1]


def result_of(run: Run) -> Path:
    return next(path for path in (run.folder / "model", run.folder / "adapter") if path.exists())


def causal_config(folder: Path, architecture: str, adapter: str, ftlib: Ftlib) -> Path:
    """Questions of several lengths for a tiny causal model."""
    folder.mkdir()
    model = tiny_causal.save(architecture, folder / "model")
    rows = [
        {"instruction": f"{a} + {b * 7}", "input": "now" * (a % 3), "output": str(a + b * 7)}
        for a in range(6)
        for b in range(6)
    ]
    (folder / "data").mkdir()
    (folder / "data" / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = folder / "config.yaml"
    text = CAUSAL.replace("BASE", str(model)).replace("ADAPTER", adapter).replace("ROOT", str(folder / "data"))
    path.write_text(text)
    assert ftlib("prepare", path)[0] == 0
    return path


@pytest.fixture
def paligemma(
    store: Path, write_config: Callable[..., Path], ftlib: Ftlib, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[Callable[..., Path]]:
    """Make a config on tiny PaliGemmas without dropout; 37 rows: in an epoch's last batch a rank has none."""
    monkeypatch.setenv("FTLIB_RUNS", "")

    def make(adapter: str, generation: int = 1) -> Path:
        base = tiny_paligemma.save(tmp_path / f"paligemma{generation}", generation)
        rows = ("split: {valid: 0.2, test: 0.2}", "split: {valid: 11, test: 12}")
        path = write_config(adapter.replace("dropout: 0.1", "dropout: 0.0"), base=str(base), replace=rows)
        path = path.rename(tmp_path / f"config-{len(list(tmp_path.glob('config-*')))}.yaml")
        assert ftlib("prepare", path)[0] == 0
        return path

    yield make


def test_two_sharded_ranks_are_one(paligemma: Callable[..., Path], tmp_path: Path, ftlib: Ftlib) -> None:
    """PaliGemma fully trained, with evaluations by loss and by generation between the steps, stopped by a signal and
    resumed; then Llama with LoRA. 11 rows of valid are two batches for generation and eleven for the loss.
    """
    full = paligemma(FULL)
    asked = ["checkpoint.steps=6", "checkpoint.keep=9", "evaluation.loss=true"]
    asked += ["checkpoint.best={metric: accuracy, every: 6}"]
    lora = causal_config(tmp_path / "llama", "llama", LORA.replace("dropout: 0.1", "dropout: 0.0"), ftlib)
    places = {name: tmp_path / name for name in ("full", "full-two", "full-stopped", "lora", "lora-two")}
    one = run_of(full, places["full"], *asked)
    assert ftlib("train", full, *asked)[0] == 0
    small = run_of(lora, places["lora"])
    assert ftlib("train", lora)[0] == 0
    two = run_of(full, places["full-two"], *asked, *job(2))
    stopped = run_of(full, places["full-stopped"], *asked, *job(2))
    small_two = run_of(lora, places["lora-two"], *job(2))
    cases = [
        case(places["full-two"], [full, *asked, *job(2)]),
        case(places["full-stopped"], [full, *asked, *job(2)], stop_after=8),
        case(places["full-stopped"], [full, *asked, *job(2)]),
        case(places["lora-two"], [lora, *job(2)]),
    ]
    train_on(2, cases, tmp_path, [0, 75, 0, 0])
    assert [found[:2] for found in evaluations_of(two)] == [
        (6, "loss"), (6, "accuracy"), (12, "loss"), (12, "accuracy")
    ]  # fmt: skip
    assert_same(two, one)
    assert exact(stopped) == exact(two), "the same number of ranks resumes bit for bit"
    assert_same(small_two, small)
