"""Run again = go on, bit for bit: after Ctrl-C, after kill -9 at random steps and inside checkpoint writing."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ftlib.config.loader import load_experiment
from ftlib.core import files, jsonl
from ftlib.core.paths import find_site
from ftlib.runs.run import Run, create_run
from tests.conftest import FULL, LORA, start_ftlib

DIES_AT = """
import os, signal, sys
fragment, number = sys.argv[1], int(sys.argv[2])
count = 0
def hook(event, arguments):
    global count
    if event in ("open", "os.rename", "os.mkdir") and fragment in str(arguments[0]) and ".tmp-" in str(arguments[0]):
        count += 1
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(hook)
from ftlib.cli.main import main
sys.exit(main(["train", *sys.argv[3:]]))
"""
BASE, WARMUP = "family: paligemma", "  warmup_steps: 2"
KINDS = {
    "full": (FULL, ("", "")),
    "lora": (LORA, ("", "")),
    "dora": (LORA.replace("lora", "dora"), (WARMUP, f"{WARMUP}\n  gradient_checkpointing: true")),
    "attention": ("{method: attention}", (WARMUP, f"{WARMUP}\n  optim: sgd")),
    "attention-bf16": (
        "{method: attention}",
        (f"{BASE}, ", f"{BASE}, dtype: bfloat16, "),
        (WARMUP, f"{WARMUP}\n  bf16: true\n  use_cpu: true"),
    ),
    "full-bf16": (FULL, (f"{BASE}, ", f"{BASE}, dtype: bfloat16, ")),
    "qlora": (
        LORA,
        (f"{BASE}, ", f"{BASE}, dtype: bfloat16, quantization: nf4, "),
        (WARMUP, f"{WARMUP}\n  optim: paged_adamw_8bit"),
    ),
    "galore": (FULL, (WARMUP, f"{WARMUP}\n  optim: galore_adamw\n  optim_target_modules: [mlp]")),
    "apollo": (FULL, (WARMUP, f"{WARMUP}\n  optim: apollo_adamw\n  optim_target_modules: [mlp]")),
    "loraplus": (LORA.replace("r: 4", "r: 4, loraplus_lr_ratio: 16"), ("", "")),
    "pissa": (LORA.replace("r: 4", "r: 4, init_lora_weights: pissa_niter_4"), ("", "")),
    "projector": (LORA.replace("r: 4", "r: 4, modules_to_save: [projector]"), ("", "")),
    "variants": (
        LORA.replace("r: 4", "r: 4, loraplus_lr_ratio: 16, init_lora_weights: pissa, modules_to_save: [projector]"),
        (f"{BASE}, ", f"{BASE}, dropout: 0.1, "),
        (
            WARMUP,
            f"{WARMUP}\n  weight_decay: 0.1\nparts: {{projector: {{learning_rate_factor: 0.1, weight_decay: 0}}}}",
        ),
    ),
    "dropout": (FULL, (f"{BASE}, ", f"{BASE}, dropout: 0.3, "), (WARMUP, f"{WARMUP}\n  gradient_checkpointing: true")),
    "int8": (LORA, (f"{BASE}, ", f"{BASE}, dtype: bfloat16, quantization: int8, ")),
}
"""Adapter section and replacements in the config, for each method."""
MARKS = {"full": [pytest.mark.gates], "lora": [pytest.mark.gates], "qlora": [], "variants": []}
"""Of the methods that are interrupted in every run of the tests; the others are in `make long`."""


def run_of(config: Path, runs: Path, *overrides: str) -> Run:
    os.environ["FTLIB_RUNS"] = str(runs)
    site = find_site()
    return create_run(load_experiment(config, overrides, site), site)


def outcome(run: Run) -> tuple[dict[str, bytes], list[tuple[object, ...]]]:
    """The bytes of every result file, and the logged numbers of every step."""
    folder = next(path for path in (run.folder / "model", run.folder / "adapter") if path.exists())
    content = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != files.COMPLETE_MARKER}
    records = [record for record in jsonl.read_jsonl_log(run.metrics) if "loss" in record]
    return content, [(r["step"], r["epoch"], r["loss"], r["learning_rate"], r["grad_norm"]) for r in records]


@pytest.fixture
def prepared(store: Path, write_config: Callable[..., Path], ftlib: Callable[..., tuple[int, str, str]], monkeypatch):
    monkeypatch.setenv("FTLIB_RUNS", "")

    def prepare(adapter: str, *replacements: tuple[str, str]) -> Path:
        config = write_config(adapter)
        for old, new in replacements:
            assert old in config.read_text()
            config.write_text(config.read_text().replace(old, new))
        assert ftlib("prepare", config)[0] == 0
        return config

    return prepare


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=MARKS.get(kind, pytest.mark.long)) for kind in KINDS])
def test_interrupted_at_any_step_the_result_is_the_same(
    prepared: Callable[..., Path],
    kind: str,
    tmp_path: Path,
    ftlib: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from ftlib.training import train

    config = prepared(*KINDS[kind])
    straight = run_of(config, tmp_path / "straight")
    assert ftlib("train", config)[0] == 0
    broken = run_of(config, tmp_path / "broken")
    log_step = train._log_step
    for stop_at in (2, 5, 8, 12):  # before any checkpoint; within and at the edge of epochs (9 steps); after the last

        def interrupt(run: Run, record: dict[str, object], update: object, stop_at: int = stop_at) -> None:
            log_step(run, record, update)
            if record["step"] == stop_at:
                raise KeyboardInterrupt

        monkeypatch.setattr(train, "_log_step", interrupt)
        code, _, error = ftlib("train", config)
        assert code == 130 and ("run the same command again to resume" in error) == (stop_at > 3), error
        assert not (broken.folder / "owner.json").exists()
    monkeypatch.setattr(train, "_log_step", log_step)
    code, _, error = ftlib("train", config)
    assert code == 0 and "resuming from the checkpoint of step 9" in error
    assert outcome(broken) == outcome(straight)
    assert len(outcome(broken)[1]) == 12
    assert len({loss for _, _, loss, _, _ in outcome(broken)[1]}) == 12
    code, _, error = ftlib("train", config)
    assert code == 0 and "already finished" in error
    types = {
        name: {tensor.dtype for tensor in load_file(next(broken.folder.glob(name))).values()}
        for name in ("checkpoints/attempt-0/checkpoint-12/trainable.safetensors", "*[lr]/*model.safetensors")
    }
    if kind == "full-bf16":
        assert list(types.values()) == [{torch.float32}, {torch.bfloat16}]
        assert files.read_json(broken.folder / "model" / "config.json")["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    "adapter", [pytest.param(FULL, id="full"), pytest.param(LORA, id="lora", marks=pytest.mark.long)]
)
def test_killed_again_and_again_the_result_is_the_same(
    prepared: Callable[[str], Path], adapter: str, tmp_path: Path, ftlib: Callable[..., tuple[int, str, str]]
) -> None:
    config = prepared(adapter)
    straight = run_of(config, tmp_path / "straight")
    assert ftlib("train", config)[0] == 0
    killed = run_of(config, tmp_path / "killed")
    seed = random.randrange(1000)
    print(f"kills drawn from seed {seed}")
    draw = random.Random(seed)
    die_while_writing("checkpoint-3", config, draw)
    kill_at_a_random_step(config, killed, draw)
    die_while_writing("checkpoint-", config, draw)
    die_while_writing("/model" if adapter == FULL else "/adapter", config, draw)
    assert start_ftlib("train", config).wait() == 0
    assert outcome(killed) == outcome(straight)
    assert not list(killed.folder.rglob("*.tmp-*"))
    starts = [record for record in jsonl.read_jsonl_log(killed.history) if record["event"] == "start"]
    assert len(starts) == 5


def die_while_writing(fragment: str, config: Path, draw: random.Random) -> None:
    """Train until a drawn one of the writes and renames of a folder, and die there of SIGKILL."""
    number = str(draw.randint(1, 8))
    done = subprocess.run([sys.executable, "-c", DIES_AT, fragment, number, config], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr


def kill_at_a_random_step(config: Path, run: Run, draw: random.Random) -> None:
    """kill -9 once the log has reached a drawn step, after a drawn fraction of a step."""
    steps = draw.randint(4, 10)
    process = start_ftlib("train", config)
    while process.poll() is None and len(jsonl.read_jsonl_log(run.metrics)) < steps:
        time.sleep(0.005)
    time.sleep(draw.random() * 0.1)
    process.kill()
    process.wait()


def interrupted_at_step_5(config: Path, ftlib: Callable[..., tuple[int, str, str]]) -> None:
    """Train in this process until then; checkpoints are of every third step."""
    from ftlib.training import train

    def interrupt(run: Run, record: dict[str, object], update: object) -> None:
        log_step(run, record, update)
        if record["step"] == 5:
            raise KeyboardInterrupt

    log_step = train._log_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "_log_step", interrupt)
        assert ftlib("train", config)[0] == 130


def test_the_number_of_threads_is_restored(
    prepared: Callable[[str], Path], tmp_path: Path, ftlib: Callable[..., tuple[int, str, str]]
) -> None:
    """Two threads sum in another order than one: a run that began with one goes on with one."""
    config = prepared(FULL)
    assert torch.get_num_threads() == 1
    straight = run_of(config, tmp_path / "straight")
    assert ftlib("train", config)[0] == 0
    run = run_of(config, tmp_path / "more")
    interrupted_at_step_5(config, ftlib)
    assert start_ftlib("train", config, OMP_NUM_THREADS="2").wait() == 0
    assert files.read_json(run.done_marker)["threads"] == 1
    assert outcome(run) == outcome(straight)


def test_changed_data_under_a_run_is_refused(
    prepared: Callable[[str], Path], tmp_path: Path, shared: Path, ftlib: Callable[..., tuple[int, str, str]]
) -> None:
    config = prepared(FULL)
    run = run_of(config, tmp_path / "runs")
    noted = {"source": "jsonl", "splits": {"train": {"rows": 1, "fingerprint": "of other data"}}}
    files.write_json(run.data, noted)
    code, _, error = ftlib("train", config)
    assert code == 2 and "the dataset has changed since this run began" in error
    assert files.read_json(run.data) == noted


def test_a_run_goes_on_with_the_code_it_began_with(
    prepared: Callable[[str], Path], tmp_path: Path, ftlib: Callable[..., tuple[int, str, str]]
) -> None:
    config = prepared(FULL)
    run = run_of(config, tmp_path / "runs")
    interrupted_at_step_5(config, ftlib)
    pinned = run.code / "ftlib" / "training" / "train.py"
    pinned.write_text(pinned.read_text().replace("resuming from the checkpoint", "pinned code goes on from chk"))
    process = start_ftlib("train", config)
    error = process.communicate()[1]
    assert process.returncode == 0, error
    assert "this run was started with a different version of ftlib; resuming with that version" in error
    assert "pinned code goes on from chk of step 3" in error


def test_other_versions_are_told_once(
    prepared: Callable[[str], Path], tmp_path: Path, ftlib: Callable[..., tuple[int, str, str]]
) -> None:
    config = prepared(LORA)
    run = run_of(config, tmp_path / "runs")
    assert ftlib("train", config)[0] == 0
    noted = files.read_json(run.environment)
    torch, peft = (noted[0]["packages"][name] for name in ("torch", "peft"))
    noted[0]["packages"] |= {"torch": "2.0.1", "numpy": "1.0"}
    del noted[0]["packages"]["peft"]
    files.write_json(run.environment, noted)
    for told in (f"so losses may differ slightly: torch 2.0.1 → {torch}, peft none → {peft}\n", ""):
        run.done_marker.unlink()
        code, _, error = ftlib("train", config)
        assert code == 0 and "resuming from the checkpoint of step 12" in error
        assert told in error and ("versions have changed" in error) == bool(told)
