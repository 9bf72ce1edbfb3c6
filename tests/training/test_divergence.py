"""Divergence: what counts as one, and a run that starts again by itself, whenever it is interrupted."""

from __future__ import annotations

import math
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from ftlib.config.schema import Guard
from ftlib.core import jsonl
from ftlib.errors import TrainingDiverged
from ftlib.runs.run import Run
from ftlib.training.divergence import MAX_SKIPPED_STEPS, MIN_WINDOW, DivergenceDetector, require_finite
from ftlib.training.resume import TrainingPhase
from tests.conftest import FULL, LORA
from tests.training.test_resume import outcome, run_of

Ftlib = Callable[..., tuple[int, str, str]]

WILD = """\
guard: {max_loss: 8, restarts: 2, learning_rate_factor: 0.01}
checkpoint: {steps: 3, keep: 2}
"""
DIES_AFTER_THE_TRIP = """
import os, signal, sys
from ftlib.runs.run import Run
plain = Run.log_event
def note(self, event, **details):
    plain(self, event, **details)
    if event == "diverged":
        os.kill(os.getpid(), signal.SIGKILL)
Run.log_event = note
from ftlib.cli.main import main
sys.exit(main(["train", sys.argv[1]]))
"""


def tripped(rule: Guard, losses: list[float], warmup: int = 0) -> int | None:
    """The step at which a watch speaks up."""
    watch = DivergenceDetector(rule, warmup, steps=1000)
    return next((step for step, loss in enumerate(losses, 1) if watch.check(step, loss)), None)


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_no_number_trips_at_once(loss: float) -> None:
    assert tripped(Guard(restarts=0), [2.0, loss]) == 2


def test_so_does_a_gradient() -> None:
    assert DivergenceDetector(Guard(), 0, steps=1000).check(1, 2.0, math.inf) == "loss 2.0, gradient norm inf"


def test_a_few_steps_that_fp16_skips_are_daily_work_and_many_in_a_row_are_the_end() -> None:
    watch = DivergenceDetector(Guard(), 0, steps=1000)
    few = [*[True] * (MAX_SKIPPED_STEPS - 1), False, *[True] * (MAX_SKIPPED_STEPS - 1)]
    assert not any(watch.check(step, 2.0, skipped=skipped) for step, skipped in enumerate(few, 1))
    assert (watch.check(len(few) + 1, 2.0, skipped=True) or "").startswith("25 steps in a row skipped")


def test_a_run_whose_every_step_is_skipped_is_never_done(
    wild: Path, tmp_path: Path, ftlib: Ftlib, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its weights are those it began with, and its losses all finite."""
    steady = ("training.max_steps=30", "training.learning_rate=1e-3", "guard.restarts=0", "guard.max_loss=1e9")
    run = run_of(wild, tmp_path / "runs", *steady)
    monkeypatch.setattr(Accelerator, "optimizer_step_was_skipped", property(lambda accelerator: True))
    code, _, error = ftlib("train", wild, *steady)
    assert code == 1 and "diverged at step 25 of attempt 0: 25 steps in a row skipped" in error
    assert not run.done_marker.exists()


def test_a_short_run_whose_every_step_is_skipped_is_not_done_either(
    wild: Path, tmp_path: Path, ftlib: Ftlib, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twelve steps, interrupted after the seventh: those skipped before count."""
    from ftlib.training import train

    steady = ("training.learning_rate=1e-3", "guard.restarts=0", "guard.max_loss=1e9")
    run = run_of(wild, tmp_path / "runs", *steady)
    monkeypatch.setattr(Accelerator, "optimizer_step_was_skipped", property(lambda accelerator: True))
    with monkeypatch.context() as patch:
        patch.setattr(train, "_log_step", interrupted_after(7))
        assert ftlib("train", wild, *steady)[0] == 130
    code, _, error = ftlib("train", wild, *steady)
    assert code == 1 and "diverged at step 12 of attempt 0: all 12 steps skipped" in error
    assert not run.done_marker.exists()
    assert [line.get("skipped") for line in lines(run)] == [True] * 12


def interrupted_after(step: int) -> Callable[..., None]:
    """In the place of `train._log_step`: Ctrl-C when a step has been logged."""
    from ftlib.training import train

    plain = train._log_step

    def interrupt(run: Run, record: dict[str, Any], update: object) -> None:
        plain(run, record, update)
        if record["step"] == step:
            raise KeyboardInterrupt

    return interrupt


def test_a_short_run_that_is_trained_in_its_last_step_is_done(
    wild: Path, tmp_path: Path, ftlib: Ftlib, monkeypatch: pytest.MonkeyPatch
) -> None:
    steady = ("training.max_steps=3", "training.learning_rate=1e-3", "guard.restarts=0", "guard.max_loss=1e9")
    run = run_of(wild, tmp_path / "runs", *steady)
    answers = iter([True] * 4 + [False] * 99)  # asked twice a step
    monkeypatch.setattr(Accelerator, "optimizer_step_was_skipped", property(lambda accelerator: next(answers)))
    assert ftlib("train", wild, *steady)[0] == 0
    assert [line.get("skipped") for line in lines(run)] == [True, True, None]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_are_no_numbers_are_found(value: float, dtype: torch.dtype) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 300), torch.nn.Embedding(0, 2)).to(dtype)
    require_finite(model)
    with torch.no_grad():
        model[0].weight[250, 1] = value
    with pytest.raises(
        TrainingDiverged, match=r"NaN or infinity in the weights of 1 of 2 parameters, such as 0\.weight"
    ):
        require_finite(model)
    model[0].weight.requires_grad_(False)
    require_finite(model)


INFINITE_STEP = (
    "training.max_steps=1", "training.optim=sgd", "training.weight_decay=1e4", "training.learning_rate=3e38",
    "training.warmup_steps=0",
)  # fmt: skip


@pytest.mark.parametrize("where", ["trainer", "fit"])
def test_what_the_last_update_makes_of_the_weights_is_looked_at(
    wild: Path, tmp_path: Path, ftlib: Ftlib, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Before the checkpoint and, as with one that older code has written, before the result is published."""
    overrides = (*INFINITE_STEP, "guard.restarts=1", "guard.learning_rate_factor=1e-40", "guard.max_loss=1e9")
    run = run_of(wild, tmp_path / "runs", *overrides)
    saved: list[int] = []
    if where == "fit":
        monkeypatch.setattr("ftlib.training.trainer.require_finite", lambda model: saved.append(1))
    code, _, error = ftlib("train", wild, *overrides)
    assert code == 0 and "training diverged at step 1 of attempt 0: NaN or infinity in the weights of " in error
    assert len(saved) == (2 if where == "fit" else 0)
    (trip,) = events(run, "diverged")
    assert math.isfinite(lines(run)[0]["loss"]) and math.isfinite(lines(run)[0]["grad_norm"])
    assert (trip["step"], trip["attempt"], trip["learning_rate"]) == (1, 0, 3e38)
    assert not run.checkpoint_root(0).exists()
    weights = load_file(run.folder / "adapter" / "adapter_model.safetensors")
    assert all(weight.isfinite().all() for weight in weights.values())


def test_above_max_loss_once_is_enough_even_in_the_warm_up() -> None:
    assert tripped(Guard(), [99.0, 100.0, 100.5], warmup=10) == 3
    assert tripped(Guard(max_loss=5), [4.9, 5.1]) == 2


def test_above_trips_after_patience_steps_in_a_row_behind_the_warm_up() -> None:
    rule = Guard(above=1.0, patience=3)
    assert tripped(rule, [1.5, 1.2, 0.9, 1.1, 1.1, 0.8, 1.1, 1.2, 1.3]) == 9
    assert tripped(rule, [3.0, 2.0, 2.0, 2.0, 0.5]) == 3
    assert tripped(rule, [3.0, 2.0, 2.0, 2.0, 0.5], warmup=2) is None
    assert tripped(rule, [3.0, 2.0, 2.0, 2.0, 2.0], warmup=2) == 5
    assert tripped(rule, [1.0] * 20) is None


def test_a_spike_is_measured_by_the_running_median() -> None:
    rule = Guard(spike=4.0, patience=2)
    calm = [0.4, 0.5, 0.6] * 10
    assert tripped(rule, [*calm, 2.1, 0.5, 2.1, 2.1]) == 34
    assert tripped(rule, [*calm, 1.9, 1.9, 1.9]) is None
    assert tripped(rule, [*calm[: MIN_WINDOW - 1], 50.0, 50.0]) is None, "too few losses for a median"
    falling = [10 * 0.95**step for step in range(100)]
    assert tripped(rule, falling) is None
    assert tripped(rule, [*falling, 0.9, 0.9]) == 102, "what was usual long ago is a spike now"


def test_a_long_spike_does_not_become_the_usual() -> None:
    assert tripped(Guard(spike=4.0, patience=60), [*[0.5] * 30, *[5.0] * 60]) == 90


def test_a_healthy_captioning_run_is_never_stopped_by_the_defaults() -> None:
    losses = [3.0 + math.sin(step / 3) * math.cos(step * 1.7) for step in range(5000)]
    assert 2.0 <= min(losses) < 2.1 and 3.9 < max(losses) <= 4.0 and 2.5 < statistics.median(losses) < 3.5
    assert tripped(Guard(), [11.0, 8.0, 6.0, *losses]) is None


def test_every_leg_has_a_seed_of_its_own_and_no_neighbours() -> None:
    assert TrainingPhase().seed(7) == 7
    seeds = [
        TrainingPhase(attempt, number).seed(seed) for seed in range(50) for attempt in range(4) for number in range(3)
    ]
    assert len(set(seeds)) == len(seeds) and all(0 <= seed < 2**32 for seed in seeds)
    assert TrainingPhase(1).seed(7) == 595730560, "a resumed run must find the same one for ever"


@pytest.fixture
def wild(store: Path, write_config: Callable[..., Path], ftlib: Ftlib, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run whose first attempt diverges, and whose second has a reasonable learning rate."""
    monkeypatch.setenv("FTLIB_RUNS", "")
    config = write_config(LORA, replace=("checkpoint: {steps: 3, keep: 2}\n", WILD))
    config.write_text(config.read_text().replace("learning_rate: 1.0e-2", "learning_rate: 3.0"))
    assert ftlib("prepare", config)[0] == 0
    return config


def events(run: Run, *names: str) -> list[dict[str, Any]]:
    return [line for line in jsonl.read_jsonl_log(run.history) if line["event"] in names]


def lines(run: Run) -> list[dict[str, Any]]:
    """Of metrics.jsonl, without the times."""
    records = [{**line, "seconds": 0} for line in jsonl.read_jsonl_log(run.metrics)]
    return [{name: value for name, value in line.items() if name != "checkpoint_seconds"} for line in records]


def test_a_run_that_diverges_recovers_with_the_lower_rate(wild: Path, tmp_path: Path, ftlib: Ftlib) -> None:
    run = run_of(wild, tmp_path / "runs")
    code, _, error = ftlib("train", wild)
    assert code == 0, error
    first, trip, second, done = events(run, "start", "diverged", "restart", "done")
    assert (first["attempt"], first["seed"], first["learning_rate"]) == (0, 3, 3.0)
    assert (trip["event"], trip["attempt"], trip["seed"]) == ("diverged", 0, 3)
    assert "above 8" in trip["reason"] and f"diverged at step {trip['step']} of attempt 0" in error
    assert (second["attempt"], second["seed"]) == (1, TrainingPhase(1).seed(3))
    assert second["learning_rate"] == pytest.approx(0.03) and (done["event"], done["step"]) == ("done", 12)
    losses = {attempt: [line["loss"] for line in lines(run) if line["attempt"] == attempt] for attempt in (0, 1)}
    assert len(losses[0]) == trip["step"] < 12 and losses[0][-1] > 8 > max(losses[0][:-1])
    assert len(losses[1]) == 12 and sum(losses[1][-3:]) < sum(losses[1][:3]), "and it learns"
    assert [path.name for path in (run.folder / "checkpoints").iterdir()] == ["attempt-1"]


def test_interrupted_at_any_point_it_goes_on_in_the_right_attempt(
    wild: Path, tmp_path: Path, ftlib: Ftlib, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ftlib.training import train

    straight = run_of(wild, tmp_path / "straight")
    assert ftlib("train", wild)[0] == 0
    broken = run_of(wild, tmp_path / "broken")
    killed = subprocess.run([sys.executable, "-c", DIES_AFTER_THE_TRIP, wild], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert len(events(broken, "diverged")) == 1 and not events(broken, "restart")
    log_step = train._log_step
    for stop_at in (2, 7):

        def interrupt(run: Run, record: dict[str, Any], update: object, stop_at: int = stop_at) -> None:
            log_step(run, record, update)
            assert record["attempt"] == 1
            if record["step"] == stop_at:
                raise KeyboardInterrupt

        monkeypatch.setattr(train, "_log_step", interrupt)
        assert ftlib("train", wild)[0] == 130
    monkeypatch.setattr(train, "_log_step", log_step)
    code, _, error = ftlib("train", wild)
    assert code == 0 and "resuming from the checkpoint of step 6" in error
    assert outcome(broken)[0] == outcome(straight)[0] and lines(broken) == lines(straight)
    assert len(events(broken, "diverged")) == 1


def test_a_streak_goes_on_after_a_restart(wild: Path, tmp_path: Path, ftlib: Ftlib, monkeypatch) -> None:
    """The losses before the checkpoint count: the fifth in a row trips, not the fifth since."""
    rule = "guard.above=0.001", "guard.patience=5", "guard.max_loss=1e9", "guard.restarts=0"
    steady = ("train", wild, *rule, "training.learning_rate=1e-3", "training.warmup_steps=0")
    from ftlib.training import train

    log_step = train._log_step

    def interrupt(run: Run, record: dict[str, Any], update: object) -> None:
        log_step(run, record, update)
        if record["step"] == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(train, "_log_step", interrupt)
    monkeypatch.setenv("FTLIB_RUNS", str(tmp_path / "runs"))
    assert ftlib(*steady)[0] == 130
    monkeypatch.setattr(train, "_log_step", log_step)
    code, _, error = ftlib(*steady)
    assert code == 1 and "training diverged at step 5 of attempt 0" in error


def test_a_run_that_always_diverges_fails_with_what_was_tried(
    store: Path, write_config: Callable[..., Path], ftlib: Ftlib, tmp_path: Path
) -> None:
    config = write_config(FULL, replace=("checkpoint:", "guard: {restarts: 2}\ncheckpoint:"))
    assert ftlib("prepare", config)[0] == 0
    run = run_of(config, tmp_path / "runs")
    hopeless = ("train", config, "training.learning_rate=1e30", "training.max_grad_norm=0")
    code, output, error = ftlib(*hopeless)
    run = Run(Path(output.strip()))
    assert code == 1 and "Traceback" not in error
    assert "training diverged in every attempt; no result was written" in error
    for attempt in range(3):
        assert f"attempt {attempt} (seed {TrainingPhase(attempt).seed(3)}, learning rate 1e+30): step" in error
    assert not {"DONE", "model", "adapter"} & {path.name for path in run.folder.iterdir()}
    assert [line["attempt"] for line in events(run, "diverged")] == [0, 1, 2]
    code, _, error = ftlib(*hopeless)
    assert code == 1 and "no result was written" in error and len(events(run, "diverged")) == 3
    code, again, error = ftlib(*hopeless, "guard.restarts=3")
    assert code == 1 and again == output, "more restarts are the same run"
    assert [line["attempt"] for line in events(run, "diverged")] == [0, 1, 2, 3]
