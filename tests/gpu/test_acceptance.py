"""The acceptance run, rehearsed on the CPU: every check runs, and what is wrong is told."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.conftest import REPOSITORY
from tests.gpu.flops import neox_flops, paligemma_flops

REHEARSAL = {"FTLIB_GPU_REHEARSAL": "cpu", "PYTHONPATH": str(REPOSITORY)}
NAMES = {
    "environment", "sdpa", "agreement", "resume", "sharding", "numbers", "out_of_memory", "synchronisation", "plan",
    "words_without_memory",
    "paligemma_224", "paligemma_448", "nf4", "generation", "neox", "compile", "all",
}  # fmt: skip


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What a whole rehearsal prints."""
    folder = tmp_path_factory.mktemp("rehearsal")
    environment = {**os.environ, **REHEARSAL, "HOME": str(folder)}
    command = [sys.executable, "-m", "tests.gpu"]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, [line for line in found if not line["ok"]] or done.stderr[-3000:]
    return found


@pytest.mark.long
def test_every_check_runs_and_is_ok(lines: list[dict[str, Any]]) -> None:
    assert {line["name"].split()[0] for line in lines} == NAMES
    assert all(line["ok"] for line in lines)
    resumed = [line for line in lines if line["name"].startswith(("resume", "sharding"))]
    assert all(line["exit_codes"] == [0, -signal.SIGKILL, 0] and line["same_bytes"] for line in resumed)


@pytest.mark.long
def test_lines_name_no_host_no_user_and_no_path(lines: list[dict[str, Any]]) -> None:
    text = json.dumps(lines)
    assert os.uname().nodename not in text
    assert str(REPOSITORY) not in text and "/tmp" not in text and sys.prefix not in text


@pytest.mark.long
def test_the_page_tells_every_check(lines: list[dict[str, Any]], tmp_path: Path) -> None:
    from tests.gpu.page import main

    log, none = tmp_path / "one.jsonl", tmp_path / "several.jsonl"
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(tmp_path / "page", [log, none]) == 0
    page = (tmp_path / "page.html").read_text()
    assert all(
        line["name"] in page.replace("&#39;", "'") for line in lines if line["name"] not in ("all", "environment")
    )
    assert "not measured" in page and '<td class="l">reached' not in page  # a rehearsal reaches no goal
    failed = [*lines, {"name": "resume of a stranger", "ok": False, "seconds": 1, "error": "<b>"}]
    log.write_text("".join(json.dumps(line) + "\n" for line in failed))
    assert main(tmp_path / "page", [log, none]) == 1
    assert "FAILED" in (tmp_path / "page.html").read_text() and "<b>" not in (tmp_path / "page.html").read_text()


def test_goals_are_compared_with_the_best_line() -> None:
    from tests.gpu.page import page

    machine = {"name": "environment", "ok": True, "gpu": "some H200", "data_sheet_tflops": 989}
    speeds = [{"name": f"paligemma_224 lora {n}", "ok": True, "model_tflops": n} for n in (390, 410)]
    reached, missed = (re.sub(r">\s+<", "><", page(lines)) for lines in ([machine, *speeds], [machine, speeds[0]]))
    assert '<td class="r">410</td><td class="l">reached</td>' in reached
    assert '<td class="r">390</td><td class="l">not reached</td>' in missed


CHECKS = """
import os, time
from tests.gpu import checks

def raises(folder):
    raise ValueError("/some/path: no")

def hangs(folder):
    yield "hangs before", True, {}
    time.sleep(600)

def dies(folder):
    os.kill(os.getpid(), 11)

def nf4(folder):
    raise MemoryError

def good(folder):
    print("this is no result")
    yield "good", True, {"value": 1}

import sys
from pathlib import Path
vars(checks).update(raises=raises, hangs=hangs, dies=dies, nf4=nf4, good=good)
checks.main(sys.argv[1], Path(sys.argv[2]))
"""


def test_a_check_that_fails_hangs_or_dies_is_told_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in REHEARSAL.items():
        monkeypatch.setenv(name, value)
    from tests.gpu import __main__

    monkeypatch.setattr(__main__, "_KILLED_AT", 8)
    results: list[dict[str, Any]] = []
    budgets = {"raises": 30, "hangs": 4, "dies": 30, "nf4": 30, "good": 30}
    ok = __main__.run_checks(budgets, tmp_path, results.append, 2, program=(sys.executable, "-c", CHECKS))
    found = {line["name"]: line for line in results}
    assert not ok
    assert found["raises"]["error"].startswith("ValueError: …: no")
    assert found["hangs before"]["ok"] and found["hangs"]["error"] == "killed after 32 s"
    assert found["dies"]["error"] == "exit -11"
    assert found["nf4"]["ok"] and found["nf4"]["does_not_fit"]
    assert found["good"]["ok"] and found["good"]["value"] == 1
    assert len(results) == 6


LOSES = """
import sys
if "tests.gpu.processes" in sys.orig_argv:
    from ftlib.training import checkpoints
    checkpoints.load_trainable_parameters = lambda model, folder: None
"""


@pytest.mark.long
def test_a_resume_that_loses_something_is_seen(tmp_path: Path) -> None:
    """With the weights of a checkpoint not put back, the check of resuming fails."""
    (tmp_path / "sitecustomize.py").write_text(LOSES)
    path = f"{tmp_path}{os.pathsep}{REPOSITORY}"
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu", "resume"],
        cwd=REPOSITORY,
        env={**os.environ, **REHEARSAL, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    found = {line["name"]: line for line in map(json.loads, done.stdout.splitlines())}
    assert done.returncode == 1 and not found["all"]["ok"]
    assert not found["resume full float32"]["ok"] and found["resume full float32"]["loss_difference"] > 0


def test_without_a_gpu_nothing_is_measured() -> None:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-m", "tests.gpu"]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "no GPU here" in done.stderr and not done.stdout


@pytest.mark.long
def test_two_ranks_agree_with_one_and_survive_a_kill(tmp_path: Path) -> None:
    """tests.gpu.several, as Slurm would start it, with gloo."""
    bandwidth, *results = _ranks(tmp_path / "shared")
    assert bandwidth["gb_per_s"]["gpus"] == 2
    names = [f"several {kind} {name}" for kind in ("ddp", "sharded") for name in ("losses", "kill and resume")]
    assert [line["name"] for line in results] == names
    assert all(line["ok"] for line in results), results
    for losses, killed in (results[:2], results[2:]):
        assert losses["loss_difference"] < 1e-5
        assert -signal.SIGKILL in killed["exit_codes_of_the_killed"] and killed["same_bytes"]


def _ranks(shared: Path) -> Iterator[dict[str, Any]]:
    step = {"SLURM_STEP_NUM_TASKS": "2", "MASTER_ADDR": "127.0.0.1", "SLURM_JOB_ID": str(os.getpid())}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.gpu.several", str(shared)],
            cwd=REPOSITORY,
            env={**os.environ, **REHEARSAL, **step, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        for rank in range(2)
    ]
    assert [process.wait(900) for process in processes] == [0, 0]
    yield from map(json.loads, (shared / "lines.jsonl").read_text().splitlines())


def test_flops_of_known_models() -> None:
    """PaliGemma-3B's row costs 2.74 TFLOP at 224 pixels and 10.06 at 448 with LoRA; GPT-NeoX's parameters × 4."""
    text = SimpleNamespace(hidden_size=2048, num_attention_heads=8, head_dim=256, num_key_value_heads=1,
                           intermediate_size=16384, num_hidden_layers=18, vocab_size=257216)  # fmt: skip
    for size, expected in {224: 2.74e12, 448: 10.06e12}.items():
        vision = SimpleNamespace(
            image_size=size, patch_size=14, hidden_size=1152, intermediate_size=4304, num_hidden_layers=27
        )
        config = SimpleNamespace(text_config=text, vision_config=vision)
        tokens = ((size // 14) ** 2 + 53, 12)
        assert paligemma_flops(config, tokens, "lora") == pytest.approx(expected, rel=3e-3)
        less = paligemma_flops(config, tokens, "attention")
        assert paligemma_flops(config, tokens, "lora") < less < paligemma_flops(config, tokens, "full")
    neox = SimpleNamespace(hidden_size=2560, intermediate_size=10240, num_hidden_layers=32, vocab_size=52224)
    dense = 32 * 12 * 2560**2 + 2560 * 52224
    assert neox_flops(neox, 512, 512) == pytest.approx(4 * dense * 512, rel=0.07)
