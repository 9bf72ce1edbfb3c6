"""Out of memory at drawn steps: the same losses and weights as undisturbed, told in the history."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ftlib.config.schema import Config, Model
from ftlib.core import jsonl
from ftlib.errors import UserError
from ftlib.evaluation.model import EvalModel
from ftlib.runs.run import Run
from ftlib.training.oom import MicroBatchSplitter
from ftlib.training.trainer import ResumableTrainer
from tests.conftest import LORA
from tests.training.test_resume import run_of

Ftlib = Callable[..., tuple[int, str, str]]


@pytest.fixture(params=["token", "example"])
def config(request: pytest.FixtureRequest, store: Path, write_config: Callable[..., Path], ftlib: Ftlib) -> Path:
    path = write_config(LORA.replace("dropout: 0.1", "dropout: 0.0"), base="ftlib/tiny-paligemma")
    text = path.read_text().replace("batch_size: 2\n", "batch_size: 4\n").replace("max_steps: 12", "max_steps: 6")
    path.write_text(f"{text}loss: {{average: {request.param}}}\nbatch: {{auto: true}}\n")
    assert ftlib("stage", path)[0] == 0 and ftlib("prepare", path)[0] == 0
    return path


ERRORS = {
    "torch": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "cuBLAS": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "driver": RuntimeError("CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation' in …"),
    "host": RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"),
}


class ScarceMemory:
    """compute_loss of a GPU that at some steps has no room for more than so many rows, in forward or in backward."""

    def __init__(self, rooms: dict[int, int], backward: bool, error: str) -> None:
        self.rooms = rooms
        self.error = ERRORS[error]
        self.backward = backward
        self.real = ResumableTrainer.compute_loss
        self.failures = 0

    def __call__(self, trainer: ResumableTrainer, model: Any, inputs: dict[str, Any], *rest: Any, **more: Any) -> Any:
        done = trainer.state.global_step
        # The first micro-batch of a step goes through: its gradients are there when the second fails.
        scarce = len(inputs["input_ids"]) > self.rooms.get(done, 99) and trainer.model_gradients()
        if scarce and not self.backward:
            self._fail(None)
        loss = self.real(trainer, model, inputs, *rest, **more)
        if scarce:
            last = next(p for name, p in model.named_parameters() if p.requires_grad and ".0." in name)
            self.handle = last.register_hook(self._fail)
        return loss

    def _fail(self, gradient: Any) -> None:
        self.failures += 1
        if self.backward:
            self.handle.remove()
        raise self.error


def has_gradients(trainer: ResumableTrainer) -> bool:
    return any(parameter.grad is not None for parameter in trainer.model.parameters())


def results(run: Run) -> tuple[list[float], dict[str, torch.Tensor]]:
    losses = [record["loss"] for record in jsonl.read_jsonl_log(run.metrics)]
    return losses, load_file(run.folder / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("backward", "error"),
    [(False, "torch"), (True, "torch"), (False, "cuBLAS"), (True, "driver"), (False, "host")],
    ids=["forward", "backward", "forward-cublas", "backward-driver", "forward-host"],
)
def test_losses_and_weights_are_those_of_the_undisturbed_run(
    config: Path, tmp_path: Path, ftlib: Ftlib, monkeypatch: pytest.MonkeyPatch, backward: bool, error: str
) -> None:
    straight = run_of(config, tmp_path / "straight")
    assert ftlib("train", config)[0] == 0
    first, second = sorted(random.sample(range(6), 2))
    print(f"memory runs out in steps {first + 1} and {second + 1}")
    memory = ScarceMemory({first: 2, second: 1}, backward, error)
    monkeypatch.setattr(ResumableTrainer, "compute_loss", lambda *given, **more: memory(*given, **more))
    monkeypatch.setattr(ResumableTrainer, "model_gradients", has_gradients, raising=False)
    scarce = run_of(config, tmp_path / "scarce")
    code, _, said = ftlib("train", config)
    assert code == 0 and memory.failures == 2, said
    assert "out of memory; repeating the step with micro-batches of 2" in said
    losses, weights = results(straight)
    again, same = results(scarce)
    assert again == pytest.approx(losses, rel=1e-5)
    for name, tensor in weights.items():
        torch.testing.assert_close(same[name], tensor, rtol=1e-3, atol=1e-5)
    told = [line["micro_batch"] for line in jsonl.read_jsonl_log(scarce.history) if line["event"] == "out of memory"]
    assert told == [2, 1]


def test_a_single_row_that_does_not_fit_is_the_end(
    config: Path, tmp_path: Path, ftlib: Ftlib, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> Iterator[None]:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    run = run_of(config, tmp_path / "runs")
    monkeypatch.setattr(ResumableTrainer, "compute_loss", never)
    code, _, error = ftlib("train", config)
    assert code == 2 and "out of memory with a micro-batch of one row" in error and "Traceback" not in error
    assert not run.done_marker.exists()
    config.write_text(config.read_text().replace("auto: true", "auto: false"))
    code, _, error = ftlib("train", config)
    assert code == 2 and "Set batch.auto: true" in error


@pytest.mark.parametrize("place", ["_move_model_to_device", "create_optimizer"])
def test_a_model_or_optimizer_that_does_not_fit_is_told_plainly(
    config: Path, tmp_path: Path, ftlib: Ftlib, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """Smaller micro-batches would not help, and `batch.auto` is on already."""
    run_of(config, tmp_path / "runs")
    monkeypatch.setattr(ResumableTrainer, place, full)
    code, _, error = ftlib("train", config)
    assert code == 2 and "out of GPU memory: CUDA out of memory." in error and "Traceback" not in error
    assert "Set model.quantization: nf4, or take a larger GPU" in error and "batch.auto" not in error


def test_so_is_a_model_that_is_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    settings = Model(family="paligemma", base="base")
    monkeypatch.setattr(torch.nn.Module, "to", full)
    monkeypatch.setattr("ftlib.models.loading.load_model", lambda *_: torch.nn.Linear(1, 1))
    subject = EvalModel("base", tmp_path, Config.model_construct(model=settings))
    with pytest.raises(UserError, match="out of GPU memory: CUDA out of memory"):
        _ = subject.model


def full(*_: object, **__: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory.")


def test_another_attempt_computes_nothing_of_the_one_before(
    config: Path, tmp_path: Path, ftlib: Ftlib, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first diverges in its first step, and in the second's first step memory runs out."""
    real, computed = ResumableTrainer.compute_loss, []

    def compute_loss(trainer: ResumableTrainer, model: Any, inputs: dict[str, Any], *rest: Any, **more: Any) -> Any:
        computed.append((trainer.phase.attempt, len(inputs["input_ids"])))
        if computed[-1] == (1, 4):
            raise torch.OutOfMemoryError("CUDA out of memory.")
        loss = real(trainer, model, inputs, *rest, **more)
        return loss if trainer.phase.attempt else loss * float("nan")

    run_of(config, tmp_path / "runs")
    monkeypatch.setattr(ResumableTrainer, "compute_loss", compute_loss)
    code, _, error = ftlib("train", config)
    assert code == 0, error
    assert [size for attempt, size in computed if attempt == 0] == [4, 4]
    sizes = [size for attempt, size in computed if attempt == 1]
    assert sizes == [4, *[2] * 22], "two epochs of 22 rows"


def test_the_random_state_is_that_of_the_steps_start() -> None:
    """Each row draws a number; after a failure the step's first rows draw the same ones again."""
    drawn: list[list[float]] = []
    halving = MicroBatchSplitter()

    def compute(rows: dict[str, torch.Tensor]) -> torch.Tensor:
        numbers = torch.rand(len(rows["x"]))
        drawn.append(numbers.tolist())
        if len(drawn) == 3:
            raise torch.OutOfMemoryError
        return numbers.sum()

    torch.manual_seed(1)
    batch = {"x": torch.zeros(4)}
    halving.run(0, batch, compute, lambda: None)
    torch.rand(5)
    halving.run(1, batch, compute, lambda: None)
    halving.run(1, batch, compute, lambda: None)
    assert [len(numbers) for numbers in drawn] == [4, 4, 4, 2, 2, 2, 2]
    assert drawn[3] + drawn[4] == drawn[1]
