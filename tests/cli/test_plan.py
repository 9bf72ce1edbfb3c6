"""`ftlib plan`: what it prints, with and without prepared data; and `batch.auto`, which acts on it."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from ftlib.core import jsonl
from ftlib.errors import UserError
from ftlib.memory import loading, search
from ftlib.memory.search import parse_size
from tests.training.test_resume import run_of

Ftlib = Callable[..., tuple[int, str, str]]
BASE = "ftlib/tiny-paligemma"
NEED = 900 << 20
"""Bytes that one row is made to need, beside as many for all else."""


@pytest.fixture
def config(store: Path, write_config: Callable[..., Path], ftlib: Ftlib) -> Path:
    path = write_config("{method: lora, r: 4}", base=BASE)
    path.write_text(path.read_text().replace("gradient_accumulation_steps: 2", "gradient_accumulation_steps: 4"))
    assert ftlib("stage", path)[0] == 0
    return path


def test_parts_add_up_and_lengths_come_from_the_data(config: Path, ftlib: Ftlib) -> None:
    code, out, error = ftlib("plan", config, "--json", "--gpu", "4GiB")
    facts = json.loads(out)
    assert code == 0 and facts["fits"] and "assumed; `ftlib prepare` makes them exact" in error
    assert facts["rows"] == {"tokens": 4 + 96, "answer": 32, "assumed": True}
    assert (facts["effective_batch"], facts["micro_batch"]) == (8, 2)
    for need in facts["need"].values():
        assert need.pop("total") == sum(need.values())
    assert facts["largest"]["no_checkpointing"]["micro_batch"] == 8
    assert facts["largest"]["no_checkpointing"]["accumulation"] == 1
    assert ftlib("prepare", config)[0] == 0
    code, out, error = ftlib("plan", config, "--json")
    facts = json.loads(out)
    # 4 of image, bos, 20 of prompt, newline, one digit, eos
    assert code == 0 and facts["rows"] == {"tokens": 28, "answer": 2, "assumed": False}
    assert facts["gpu"] is None and facts["fits"] is None and "no GPU here: set its memory" in error


def test_cores_that_load_data(config: Path, ftlib: Ftlib, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as the CPU time of a row and the assumed speed of a GPU ask for."""
    assert ftlib("prepare", config)[0] == 0
    _, out, error = ftlib("plan", config, "--json")
    assert "data loading" not in error and "loading" not in json.loads(out), "a tiny model does not use a GPU well"
    monkeypatch.setattr(search, "SMALLEST_ROW", 0)
    for flops, cpus, enough in ((1e3, 2, True), (1e15, 2, False)):
        monkeypatch.setattr(loading, "FAST_GPU_FLOPS", flops)
        code, out, error = ftlib("plan", config, "--json", f"job.cpus={cpus}")
        facts = json.loads(out)
        found = facts["loading"]
        assert code == 0 and found["timed"] == 32 and 0 < found["row_seconds"] < 1
        assert found["rows_per_second"] == pytest.approx(flops / facts["row_flops"], rel=0.1)
        assert found["cores_per_gpu"] == max(1, math.ceil(found["row_seconds"] * found["rows_per_second"]))
        assert f"need {found['cores_per_gpu']} core" in error
        assert (f"Set job.cpus: {found['cores_per_gpu'] + 1}" in error) is not enough
    _, _, error = ftlib("plan", config, "training.dataloader_num_workers=3")
    assert "with 3 to load data" in error and "Set training.dataloader_num_workers: " in error
    _, _, error = ftlib("plan", config, "job.gpus=0")
    assert "data loading: " in error and "to load data" not in error

    def lost(*given: object) -> None:
        raise UserError("no such image")

    monkeypatch.setattr(loading, "open_row_images", lost)
    code, out, error = ftlib("plan", config, "--json")
    assert code == 0 and "data loading was not measured: no such image" in error and "loading" not in json.loads(out)


def test_a_gpu_of_several_has_its_share(config: Path, ftlib: Ftlib) -> None:
    """Two GPUs × 2 × 4 are 16 rows a step, 8 of them on each."""
    _, out, error = ftlib("plan", config, "--json", "--gpu", "4GiB", "job.gpus=2")
    facts = json.loads(out)
    assert facts["host"]["loading"] > facts["host"]["checkpoint"] > facts["host"]["gathering"] == 0
    assert "of its own memory to load the model" in error and "a checkpoint takes" in error
    assert "whole, without" in error and "over 2, with checkpointing" in error
    again = json.loads(ftlib("plan", config, "--json", "--gpu", "4GiB", "--gpus", "2", "--nodes", "2")[1])
    assert list(again["peak_by_shards"]) == ["1", "2", "4"] and facts["peak_by_shards"].keys() == {"1", "2"}
    assert again["peak_by_shards"]["1"] == facts["peak_by_shards"]["1"] and again["effective_batch"] == 32
    assert again["peak_by_shards"]["4"]["checkpointing"] < again["peak_by_shards"]["2"]["checkpointing"]
    largest = facts["largest"]["no_checkpointing"]
    assert (facts["effective_batch"], largest["micro_batch"], largest["accumulation"]) == (16, 8, 1)
    assert facts["evaluation"] is None
    sharded = ["plan", config, "--json", "--gpu", "500MiB", "--gpus", "2", "parallel.shard=full"]
    code, out, error = ftlib(*sharded, "evaluation.loss=true")
    assert code == 1 and "the whole model does not fit for evaluation during training" in error
    assert json.loads(out)["evaluation"] > 1.5 * facts["need"]["no_checkpointing"]["weights"]


def test_parts_are_asked_by_their_own_prompts(config: Path, ftlib: Ftlib, shared: Path) -> None:
    part = f"{{name: digits, source: jsonl, root: {shared / 'data'}, prompt: '{{prefix}}'}}"
    data = f"data={{source: mixture, root: {shared}, prompt: 'answer {{question}}', parts: [{part}]}}"
    code, _, error = ftlib("prepare", config, data)
    assert code == 0, error
    code, out, error = ftlib("plan", config, data, "--json")
    assert code == 0, error
    assert json.loads(out)["rows"] == {"tokens": 28, "answer": 2, "assumed": False}


def test_what_does_not_fit_ends_with_1(config: Path, ftlib: Ftlib) -> None:
    code, out, error = ftlib("plan", config, "--gpu", "600MiB")
    assert code == 1 and out == ""
    assert "does not fit into 0.59 GiB" in error
    assert "with gradient checkpointing: not even a micro-batch of 1 fits" in error


def test_a_base_that_is_not_staged_says_so(config: Path, ftlib: Ftlib) -> None:
    code, _, error = ftlib("plan", config, "model.base=google/paligemma-3b-pt-224")
    assert code == 2 and "ftlib stage" in error
    code, _, error = ftlib("plan", config, "--gpu", "twelve")
    assert code == 2 and "twelve: not a size" in error


def test_a_config_from_a_pipe_is_read_once(config: Path, ftlib: Ftlib) -> None:
    reader, writer = os.pipe()
    os.write(writer, config.read_bytes())
    os.close(writer)
    code, _, error = ftlib("plan", f"/dev/fd/{reader}", "--gpu", "4GiB")
    os.close(reader)
    assert code == 0, error


def test_sizes() -> None:
    assert parse_size("12GiB") == parse_size("12G") == parse_size("12 gb") == 12 << 30
    assert parse_size("1.5g") == 3 << 29 and parse_size("800M") == 800 << 20
    with pytest.raises(UserError, match="no GPU is that small"):
        parse_size("12")


def test_train_takes_the_micro_batch_that_fits(
    config: Path, ftlib: Ftlib, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """8 rows a step, as many as fit at once; after memory ran out on such a GPU, no more than went well then."""
    from ftlib.memory import search
    from ftlib.memory.estimate import MemoryEstimate
    from ftlib.training import oom

    monkeypatch.setattr(
        search, "estimate_step", lambda model, config, rows, size, ck: MemoryEstimate(NEED, 0, 0, 0, NEED * size, 0, 0)
    )
    monkeypatch.setattr(oom, "gpu_memory_bytes", lambda: 6 * NEED)
    monkeypatch.setattr(oom, "gpu_name", lambda: "a GPU")
    config.write_text(config.read_text() + "batch: {auto: true}\n")
    assert ftlib("prepare", config)[0] == 0
    for proved, expected in ((None, (4, 2)), (2, (2, 4))):
        run = run_of(config, tmp_path / f"after-{proved}")
        if proved:
            run.log_event("out of memory", micro_batch=proved, gpu="a GPU")
            run.log_event("out of memory", micro_batch=1, gpu="another GPU")
        code, _, error = ftlib("train", config)
        assert code == 0 and f"micro-batches of {expected[0]}, {expected[1]} per step, without" in error
        told = next(line for line in jsonl.read_jsonl_log(run.history) if line["event"] == "micro-batch")
        assert (told["micro_batch"], told["accumulation"], told["checkpointing"]) == (*expected, False)
        assert run.done_marker.exists()


def test_checkpointing_only_where_nothing_fits_without_it(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ftlib.config.loader import load_experiment
    from ftlib.core.paths import find_site
    from ftlib.memory import search
    from ftlib.memory.estimate import MemoryEstimate, RowShape

    def need(model: object, config: object, rows: object, size: int, checkpointing: bool) -> MemoryEstimate:
        return MemoryEstimate(NEED, 0, 0, 0, (1 if checkpointing else 3) * NEED * size, 0, 0)

    monkeypatch.setattr(search, "estimate_step", need)
    chosen = load_experiment(config, [], find_site()).config

    def choose(capacity: int, **training: object) -> tuple[int, bool]:
        settings = chosen.model_copy(update={"training": {**chosen.training, **training}})
        cut = search.choose_batch_size(None, settings, RowShape(10, 2), capacity * NEED)  # type: ignore[arg-type]
        return cut.micro_batch, cut.checkpointing

    assert choose(8) == (2, False)
    assert choose(8, gradient_checkpointing=True) == (4, True)
    assert choose(3) == (2, True)
    with pytest.raises(UserError, match="one row of 10 tokens needs 3"):
        choose(3, gradient_checkpointing=False)


def test_time_is_measured_and_nothing_is_left(config: Path, store: Path, ftlib: Ftlib) -> None:
    assert ftlib("prepare", config)[0] == 0
    code, out, error = ftlib("plan", config, "--time", "--json", "training.max_steps=9000", "checkpoint.steps=1")
    facts = json.loads(out)
    assert code == 0 and "Traceback" not in error
    assert (facts["device"], facts["measured"], facts["step_rows"], facts["total_steps"]) == ("the CPU", 8, 8, 9000)
    assert facts["rows_per_second"] == pytest.approx(8 / facts["step_seconds"])
    assert facts["training_seconds"] == pytest.approx(9000 * facts["step_seconds"]) and facts["startup"] > 0
    assert "measured on the CPU: " in error and "as 8 measured steps on the CPU took" in error
    assert "jobs get a GPU, and this was measured on the CPU" in error and "GPU-h" not in error
    assert (
        f"sbatch --gres=gpu:1 jobs/ftlib.sbatch plan {config} training.max_steps=9000 checkpoint.steps=1 --time"
        in error
    )
    assert not list(store.glob("runs/**/config.yaml")), "nothing is saved"
    assert ftlib("plan", config, "--time", "--gpu", "4GiB")[0] == 2


def test_time_of_a_run_that_is_shorter_than_the_measurement(config: Path, ftlib: Ftlib) -> None:
    assert ftlib("prepare", config)[0] == 0
    code, out, error = ftlib("plan", config, "--time", "--json", "training.max_steps=1", "job.gpus=0")
    assert code == 0 and (json.loads(out)["measured"], json.loads(out)["total_steps"]) == (1, 1)
    assert "a single step" in error and "jobs get a GPU" not in error
