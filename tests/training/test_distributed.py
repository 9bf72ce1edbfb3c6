"""Micro-batches are one batch, and two ranks one rank; ranks stop together on a signal, and go on bit for bit.

Two processes with Slurm's variables, joined by gloo, stand for two tasks of a step.
"""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file
from torch import distributed

from ftlib.config.loader import load_experiment
from ftlib.core import jsonl, log
from ftlib.core.paths import Site
from ftlib.data.dataset import PreparedDataset
from ftlib.errors import RankLost, UserError
from ftlib.runs import run as runs
from ftlib.runs.run import Run
from ftlib.training import distributed as training_distributed
from ftlib.training.eval_callback import CheckpointEvaluator
from ftlib.training.resume import ResumePoint, TrainingPhase
from ftlib.training.trainer import ResumableTrainer
from tests.conftest import FULL, start_ftlib
from tests.training.sharded_ranks import free_port
from tests.training.test_divergence import INFINITE_STEP
from tests.training.test_eval_callback import PLAIN, dictate, rewrite
from tests.training.test_resume import outcome, run_of

ONE_BY_TWO = ["training.per_device_train_batch_size=1", "training.gradient_accumulation_steps=2", "job.gpus=2"]
"""The effective batch of four, as micro-batches of one on two ranks."""

SIGNALLED_IN_6 = """
import os, signal, sys
from ftlib.training import train
log_step = train._log_step
def hook(run, record, update):
    log_step(run, record, update)
    if record["step"] == 5 and os.environ["SLURM_PROCID"] == "1":
        os.kill(os.getpid(), signal.SIGUSR1)
train._log_step = hook
from ftlib.cli.main import main
sys.exit(main())
"""

SIGNALLED_IN_LOSS = """
import os, signal, sys
from ftlib.training import validation
plain, calls = validation._loss_sums, 0
def sums(*arguments):
    global calls
    calls += 1
    if calls == 3 and os.environ["SLURM_PROCID"] == "1":
        os.kill(os.getpid(), signal.SIGUSR1)
    return plain(*arguments)
validation._loss_sums = sums
from ftlib.cli.main import main
sys.exit(main())
"""

SCARCE_MEMORY = """
import os, sys, torch
from ftlib.training.trainer import ResumableTrainer
real, room, hooks = ResumableTrainer.compute_loss, ROOMS.get(int(os.environ["SLURM_PROCID"]), {}), []
def full(gradient):
    raise torch.OutOfMemoryError("CUDA out of memory.")
def compute_loss(trainer, model, inputs, *rest, **more):
    loss = real(trainer, model, inputs, *rest, **more)
    while hooks:
        hooks.pop().remove()
    if len(inputs["input_ids"]) > room.get(trainer.state.global_step, 99):
        hooks.append(next(one for one in model.parameters() if one.requires_grad).register_hook(full))
    return loss
ResumableTrainer.compute_loss = compute_loss
from ftlib.cli.main import main
sys.exit(main())
"""


@pytest.fixture
def config(
    store: Path,
    write_config: Callable[..., Path],
    ftlib: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
    shared: Path,
    tmp_path: Path,
) -> Path:
    """37 rows: the last effective batch of an epoch has one row, so that a rank has none."""
    monkeypatch.setenv("FTLIB_RUNS", "")
    base = tmp_path / "no-dropout"
    base.mkdir()
    for file in (shared / "model").iterdir():
        (base / file.name).write_bytes(
            file.read_bytes().replace(b'"attention_dropout": 0.1', b'"attention_dropout": 0.0')
        )
    path = write_config(
        FULL, base=str(base), replace=("split: {valid: 0.2, test: 0.2}", "split: {valid: 11, test: 12}")
    )
    assert ftlib("prepare", path)[0] == 0
    return path


def start_two(*arguments: object, program: Sequence[str] = ("-m", "ftlib")) -> list[subprocess.Popen[str]]:
    return start_ranks(2, *arguments, program=program)


def start_ranks(
    count: int, *arguments: object, program: Sequence[str] = ("-m", "ftlib")
) -> list[subprocess.Popen[str]]:
    slurm = {"SLURM_STEP_NUM_TASKS": str(count), "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    places = [{**slurm, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)} for rank in range(count)]
    return [start_ftlib("train", *arguments, program=program, **place) for place in places]


def test_a_port_in_use_is_told(config: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        place = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "MASTER_PORT": port}
        code, error = (one[0] for one in ends_of([start_ftlib("train", config, **place)]))
    assert code == 2 and f"ftlib: port {port}, by which the tasks of this job meet, is in use on" in error
    assert "Set MASTER_PORT to another one" in error and "Traceback" not in error


def ends_of(processes: list[subprocess.Popen[str]]) -> tuple[list[int], list[str]]:
    errors = [process.communicate(timeout=300)[1] for process in processes]
    return [process.returncode for process in processes], errors


def losses_of(run: Run) -> list[float]:
    return [record["loss"] for record in jsonl.read_jsonl_log(run.metrics) if "loss" in record]


@pytest.mark.parametrize("average", ["token", "example"])
def test_accumulated_micro_batches_are_one_batch(
    config: Path, tmp_path: Path, ftlib: Callable[..., tuple[int, str, str]], average: str
) -> None:
    losses = []
    for micro in (4, 1):
        cut = f"training.per_device_train_batch_size={micro}", f"training.gradient_accumulation_steps={4 // micro}"
        run = run_of(config, tmp_path / str(micro), f"loss.average={average}", *cut)
        assert ftlib("train", config, f"loss.average={average}", *cut)[0] == 0
        losses.append(losses_of(run))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("average", ["token", "example"])
def test_two_ranks_are_one(
    config: Path, tmp_path: Path, ftlib: Callable[..., tuple[int, str, str]], average: str
) -> None:
    """They ask together, too; the few rows of valid are one batch, so that the second rank has none."""
    best = ("checkpoint.best={metric: accuracy, every: 6}", "evaluation.batch_size=32")
    asking = (f"loss.average={average}", "checkpoint.steps=6", "evaluation.loss=true", *best)
    one = run_of(config, tmp_path / "one", *asking)
    assert ftlib("train", config, *asking)[0] == 0
    two = run_of(config, tmp_path / "two", *asking, *ONE_BY_TWO)
    codes, errors = ends_of(start_two(config, *asking, *ONE_BY_TWO))
    assert codes == [0, 0], errors
    asked = [[line for line in jsonl.read_jsonl_log(run.metrics) if "split" in line] for run in (one, two)]
    found = [(line["step"], line["metric"]) for line in asked[1]]
    assert found == [(6, "loss"), (6, "accuracy"), (12, "loss"), (12, "accuracy")]
    ours, theirs = ([line["value"] for line in lines if line["metric"] == "loss"] for lines in asked)
    assert theirs == pytest.approx(ours, rel=1e-4), "the weights differ by rounding"
    assert two.folder.name == one.folder.name, "the same run, whatever the number of GPUs"
    assert losses_of(two) == pytest.approx(losses_of(one), rel=1e-5)
    ours, theirs = (load_file(run.result_folder("full") / "model.safetensors") for run in (one, two))
    start = load_file(Path(tmp_path / "no-dropout" / "model.safetensors"))
    for name in ours:
        if "k_proj.bias" in name:  # a shift of all keys cancels in the softmax: its gradient is rounding alone
            continue
        moved = (ours[name] - start[name]).norm()
        assert (ours[name] - theirs[name]).norm() <= 0.01 * moved + 1e-5, name
    assert len([event for event in jsonl.read_jsonl_log(two.history) if event["event"] == "start"]) == 1
    assert "parameters are trained" in errors[0] and "parameters are trained" not in errors[1], "the first rank speaks"


@pytest.mark.parametrize(
    ("rooms", "sizes"),
    [
        pytest.param({1: {2: 2}, 0: {4: 1}}, [2, 1], id="each-once"),
        pytest.param({1: {2: 0}}, None, id="no-row-fits", marks=pytest.mark.long),
    ],
)
def test_memory_that_runs_out_on_one_rank(
    config: Path,
    tmp_path: Path,
    ftlib: Callable[..., tuple[int, str, str]],
    rooms: dict[int, dict[int, int]],
    sizes: Any,
) -> None:
    """In the backward pass of a step's first micro-batch: both ranks repeat the step in halves, or both give up."""
    settings = ("batch.auto=true", "training.max_steps=6", "training.gradient_accumulation_steps=2")
    run = run_of(config, tmp_path / "two", "job.gpus=2", "training.per_device_train_batch_size=4", *settings)
    program = ("-c", SCARCE_MEMORY.replace("ROOMS", str(rooms)))
    codes, errors = ends_of(
        start_two(config, "job.gpus=2", "training.per_device_train_batch_size=4", *settings, program=program)
    )
    told = [line["micro_batch"] for line in jsonl.read_jsonl_log(run.history) if line["event"] == "out of memory"]
    if sizes is None:
        assert codes == [2, 2] and "out of memory with a micro-batch of one row" in errors[0], errors
        return
    assert codes == [0, 0] and told == sizes, errors
    single = run_of(config, tmp_path / "one", "training.per_device_train_batch_size=8", *settings)
    assert ftlib("train", config, "training.per_device_train_batch_size=8", *settings)[0] == 0
    assert losses_of(run) == pytest.approx(losses_of(single), rel=1e-5)


def test_of_several_ranks_the_first_ones_reading_decides(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second reads late: once a line that the first had yet to write, once a file without the newest lines."""
    best = "checkpoint: {steps: 1, keep: 1, best: {metric: accuracy, every: 1, patience: 1}}\n"
    site = Site(tmp_path / "store", tmp_path / "runs")
    experiment = load_experiment(rewrite(config, (PLAIN, best)), [], site, {})
    run, told = runs.run_for(experiment, site), []
    examiner = CheckpointEvaluator(experiment.config, run, cast("PreparedDataset", None), tmp_path, site)
    about = {"attempt": 0, "round": 0, "split": "valid", "metric": "accuracy"}
    for step, value in ((1, 0.5), (2, 0.25)):
        jsonl.append_jsonl(run.metrics, {**about, "step": step, "value": value})
    monkeypatch.setattr(log, "rank_and_world_size", lambda: (1, 2))
    monkeypatch.setattr(training_distributed, "broadcast_object", lambda value: told.pop(0))
    dictate(monkeypatch, [0.25])
    trainer = cast("ResumableTrainer", SimpleNamespace(model=torch.nn.Linear(1, 1)))
    told[:] = [None]
    assert examiner.value(trainer, ResumePoint(TrainingPhase(), 2), "valid", "accuracy") == 0.25 and not told, (
        "it asks with the first"
    )
    told[:] = [{**about, "step": 3, "value": 0.125}, True]
    assert examiner.should_stop_early(trainer, ResumePoint(TrainingPhase(), 3), last=False) and not told
    told[:] = [{**about, "step": 2, "value": 0.25}, False]
    assert not examiner.should_stop_early(trainer, ResumePoint(TrainingPhase(), 2), last=False) and not told


def test_both_ranks_begin_anew_when_weights_are_no_numbers(config: Path, tmp_path: Path) -> None:
    """Master weights of a bfloat16 model, which all ranks round before the first one writes them."""
    again = ("guard.restarts=1", "guard.learning_rate_factor=1e-40", "guard.max_loss=1e9")
    overrides = (*ONE_BY_TWO, *INFINITE_STEP, *again, "model.dtype=bfloat16")
    run = run_of(config, tmp_path / "runs", *overrides)
    codes, errors = ends_of(start_two(config, *overrides))
    assert codes == [0, 0], errors
    (trip,) = [line for line in jsonl.read_jsonl_log(run.history) if line["event"] == "diverged"]
    assert trip["step"] == 1 and "NaN or infinity in the weights" in trip["reason"]
    weights = load_file(run.folder / "model" / "model.safetensors")
    assert all(weight.dtype == torch.bfloat16 and weight.isfinite().all() for weight in weights.values())


def test_a_signal_to_one_rank_stops_both_within_the_loss_on_valid_or_after_the_same_step(
    config: Path, tmp_path: Path, ftlib: Callable[..., tuple[int, str, str]]
) -> None:
    loss = [*ONE_BY_TWO, "evaluation.loss=true"]
    straight = run_of(config, tmp_path / "straight", *loss)
    assert ends_of(start_two(config, *loss))[0] == [0, 0]
    for place, program in (("loss", SIGNALLED_IN_LOSS), ("step", SIGNALLED_IN_6)):
        stopped = run_of(config, tmp_path / place, *loss)
        codes, errors = ends_of(start_two(config, *loss, program=["-c", program]))
        assert codes == [75, 75], errors
        assert all("ended by SIGUSR1" in error and "Traceback" not in error for error in errors)
        if place == "loss":
            assert not asked_in(stopped), "it is computed again"
        else:
            checkpoint = runs.last_checkpoint(stopped.checkpoint_root())
            assert checkpoint is not None and checkpoint[0] == len(losses_of(stopped)) == 6, "the step it came in"
        codes, errors = ends_of(start_two(config, *loss))
        assert codes == [0, 0], errors
        assert len(asked_in(stopped)) == 4 and asked_in(stopped) == asked_in(straight)
        assert outcome(stopped) == outcome(straight)
        assert not list(stopped.folder.rglob("*.tmp-*"))

    # Another number of ranks goes on and says what differs.
    losses = losses_of(stopped)
    shutil.rmtree(runs.checkpoint_folder(stopped.checkpoint_root(), 12))
    stopped.done_marker.unlink()
    code, _, error = ftlib("train", config, *loss)
    assert code == 0, error
    assert "the checkpoint was written by 2 processes, now there are 1" in error
    assert losses_of(stopped) == pytest.approx(losses, rel=1e-5), "without dropout nothing differs but rounding"


def asked_in(run: Run) -> list[tuple[object, ...]]:
    """Step, loss and perplexity on valid, whenever they were computed."""
    lines = [line for line in jsonl.read_jsonl_log(run.metrics) if "split" in line]
    return [(line["step"], line["value"], line["perplexity"]) for line in lines]


def test_the_first_rank_to_fail_tells_the_host_why(config: Path, tmp_path: Path) -> None:
    run_of(config, tmp_path / "runs")
    (tmp_path / "notes").mkdir()
    wrong = start_ftlib("train", config, "training.max_steps=0", FTLIB_JOB_TMP=str(tmp_path / "notes"))
    assert wrong.wait() == 2
    assert (tmp_path / "notes" / "failed").read_text() == "2"
    crashed = start_ftlib("train", "--nonsense", FTLIB_JOB_TMP=str(tmp_path / "notes"))
    assert crashed.wait() == 2 and (tmp_path / "notes" / "failed").read_text() == "2"


def test_several_nodes_need_a_place_to_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with (
        pytest.raises(UserError, match="several nodes, but MASTER_ADDR is not set"),
        training_distributed.process_group(1),
    ):
        pass


@pytest.mark.parametrize("words", ["Timed out waiting 5000ms for recv operation", "Application timeout caused pair"])
def test_a_wait_in_vain_has_one_name(monkeypatch: pytest.MonkeyPatch, words: str) -> None:
    """gloo has several; what another RuntimeError says stays."""
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    with pytest.raises(RankLost, match="another task did not respond for 5 s"), training_distributed.process_group(5):
        raise RuntimeError(words)
    with (
        pytest.raises(RankLost, match="another task of this job is gone; the job has "),
        training_distributed.process_group(5),
    ):
        raise RuntimeError("[/pytorch/third_party/gloo/pair.cc:553] Connection closed by peer [127.0.0.1]:41322")
    with pytest.raises(RuntimeError, match="CUDA runtime"), training_distributed.process_group(5):
        raise RuntimeError("CUDA runtime error")
    monkeypatch.delenv("SLURM_STEP_NUM_TASKS")
    with pytest.raises(RuntimeError, match=words), training_distributed.process_group(5):
        raise RuntimeError(words)


def test_a_rank_that_waits_in_vain_fails(config: Path, tmp_path: Path) -> None:
    """The second rank is stopped and never answers again."""
    long = ("training.ddp_timeout=20", "training.max_steps=4000", *ONE_BY_TWO)
    run = run_of(config, tmp_path / "runs", *long)
    first, second = start_two(config, *long)
    try:
        while len(jsonl.read_jsonl_log(run.metrics)) < 3:
            assert first.poll() is None, first.communicate()[1]
            time.sleep(0.2)
        second.send_signal(signal.SIGSTOP)
        error = first.communicate(timeout=120)[1]
        assert first.returncode == 76, error
        last = jsonl.read_jsonl_log(run.history)[-1]
        reason = "another task did not respond for 20 s (training.ddp_timeout)"
        assert last["event"] == "failed" and last["reason"] == reason
        assert f"ftlib: {reason}" in error and "Traceback" not in error
    finally:
        second.kill()
        second.wait()


def test_a_rank_whose_partner_is_killed_says_so(config: Path, tmp_path: Path) -> None:
    """Before, it ended in a traceback about a closed connection."""
    long = ("training.max_steps=4000", *ONE_BY_TWO)
    run = run_of(config, tmp_path / "runs", *long)
    first, second = start_two(config, *long)
    try:
        while len(jsonl.read_jsonl_log(run.metrics)) < 3:
            assert first.poll() is None, first.communicate()[1]
            time.sleep(0.2)
        second.kill()
        error = first.communicate(timeout=120)[1]
        assert first.returncode == 76 and "ftlib: another task of this job is gone: task 1 on " in error, error
        assert "Traceback" not in error
        assert jsonl.read_jsonl_log(run.history)[-1]["reason"].startswith("another task of this job is gone")
    finally:
        second.wait()


def test_the_group_is_left_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL warns of leaked resources, or hangs, where a process ends without that."""
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    with training_distributed.process_group(5):
        distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    assert not distributed.is_initialized()
