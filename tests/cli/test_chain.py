"""The chain as a user runs it: the demo learns, `predict` answers, a second run says that it is done."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import FULL, LORA, REPOSITORY, read_lines, start_ftlib

Ftlib = Callable[..., tuple[int, str, str]]


def test_the_demo_learns_to_read_digits(store: Path, ftlib: Ftlib, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that `make fresh` has just run, if there is one."""
    if clone := os.environ.get("FTLIB_DEMO"):
        error, store = Path(clone, "demo.log").read_text(), Path(clone, "store")
        monkeypatch.setenv("FTLIB_STORE", str(store))
    else:
        process = start_ftlib("demo")
        error = process.communicate()[1]
        assert process.returncode == 0, error
    (run,) = (store / "runs").glob("*/digits/*")
    values = {}
    for when in ("before", "after"):
        scores = json.loads((run / "eval" / "digits" / "test" / when / "scores.json").read_text())
        values[when] = scores["value"]
        low, high = scores["interval"]
        assert low <= scores["value"] <= high
        assert scores["n"] == 359 >= 0.15 * 1797
    assert values["before"] <= 0.2
    assert values["after"] >= 0.95
    held_out = json.loads((run / "data.json").read_text())["splits"]
    assert held_out["valid"]["rows"] + held_out["test"]["rows"] >= 0.3 * 1797
    assert str(run / "report.html") in error
    assert f"{values['after']:.4f}" in error
    page = (run / "report.html").read_text()
    assert f"{values['after']:.3f}" in page
    answers(run, store, ftlib)


def answers(run: Path, store: Path, ftlib: Ftlib) -> None:
    """`predict` gives what the evaluation gave, for right and for wrong answers."""
    records = read_lines(run / "eval" / "digits" / "test" / "after" / "predictions.jsonl")
    wrong = [record for record in records if record["score"] == 0.0]
    for record in [*wrong[:1], *records[:2]]:
        image = store / "datasets" / "digits" / str(record["image"])
        code, output, _ = ftlib("predict", "digits", "--image", image, "--prompt", record["prompt"])
        assert (code, output.strip()) == (0, record["prediction"])


@pytest.mark.parametrize("adapter", [FULL, LORA], ids=["full", "lora"])
def test_run_again_says_done_and_asks_nothing_twice(
    store: Path, write_config: Callable[..., Path], ftlib: Ftlib, adapter: str
) -> None:
    config = write_config(adapter)
    assert ftlib("evaluate", config, "--before")[0] == 2, "not prepared yet"
    assert ftlib("prepare", config)[0] == 0
    assert "already prepared" in ftlib("prepare", config)[2]
    assert ftlib("train", config)[0] == 0
    code, output, error = ftlib("evaluate", "tiny", "--split", "train", "--split", "test", "--json")
    assert code == 0
    results = json.loads(output)
    assert [(result["when"], result["split"], result["n"]) for result in results] == [
        ("before", "train", 36), ("before", "test", 12), ("after", "train", 36), ("after", "test", 12),
    ]  # fmt: skip
    (card,) = (store / "runs").glob("*/tiny/*/*/README.md")
    assert "| jsonl | test | accuracy | " in card.read_text()
    code, again, error = ftlib("evaluate", "tiny", "--split", "train", "--split", "test", "--json")
    assert code == 0 and json.loads(again) == results
    assert error.count("already evaluated") == 4
    code, _, error = ftlib("evaluate", "tiny", "evaluation.max_new_tokens=2", "--split", "test")
    assert code == 0 and "already evaluated" not in error


def test_images_are_tried_once_for_all_runs_until_a_file_changes(
    shared: Path, store: Path, write_config: Callable[..., Path], ftlib: Ftlib, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ftlib.training import train

    tried: list[int] = []
    real = train.validate_images

    def validate_images(images: dict[Any, str], *rest: Any) -> None:
        tried.append(len(images))
        real(images, *rest)

    monkeypatch.setattr(train, "validate_images", validate_images)
    data = shutil.copytree(shared / "data", store / "copy")
    config = write_config(root=str(data))
    assert ftlib("prepare", config)[0] == 0

    def start(*overrides: str) -> list[int]:
        tried.clear()
        code, _, error = ftlib("train", config, *overrides)
        assert code == 0, error
        return tried

    (count,) = start()
    assert count > 0 and start("seed=5") == []
    assert start("seed=6", "model.resize=bilinear") == [count], "the processor opens them in another way"
    for image in data.rglob("*.png"):
        os.utime(image)
    assert start("seed=7") == [count] and start("seed=8") == []
    histories = [read_lines(path) for path in (store / "runs").rglob("history.jsonl")]
    found = [[line["count"] for line in lines if line["event"] == "images tried"] for lines in histories]
    assert found == [[count]] * 5


def test_stage_in_a_job_also_prepares_what_is_prepared(
    store: Path, write_config: Callable[..., Path], ftlib: Ftlib, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, done = write_config(), store / "done"
    monkeypatch.setenv("FTLIB_JOB_TMP", str(store))

    def run(command: str, following: str, *overrides: str) -> tuple[int, str, str]:
        monkeypatch.setenv("FTLIB_FOLLOWING", following)
        return ftlib(command, config, *overrides)

    def told() -> list[str]:
        lines = done.read_text().splitlines() if done.exists() else []
        done.unlink(missing_ok=True)
        return lines

    assert run("stage", "prepare")[:2] == (0, "") and told() == ["stage"], "not prepared yet"
    assert run("prepare", "train")[0] == 0 and told() == ["prepare"]
    code, output, error = run("stage", "prepare")
    assert code == 0 and told() == ["prepare", "stage"] and "already prepared" in error
    assert output == run("prepare", "train")[1] and told() == ["prepare"]
    assert run("stage", "train")[1] == "" and told() == ["stage"]
    code, _, error = run("stage", "prepare", "data.prompt={nothing}")
    assert code == 2 and "field nothing" in error and told() == [], "its prompt does not fit the prepared rows"


def test_an_evaluation_without_torch_is_no_failure_of_the_run(
    store: Path, write_config: Callable[..., Path], ftlib: Ftlib, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_config()
    assert ftlib("prepare", config)[0] == 0

    def events() -> list[object]:
        return [line["event"] for path in (store / "runs").rglob("history.jsonl") for line in read_lines(path)]

    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "torch", None)  # as if it were not installed
        patch.delitem(sys.modules, "ftlib.evaluation.inference", raising=False)  # an earlier test has imported it
        code, _, error = ftlib("evaluate", config, "--before", "--split", "test")
        assert code == 2 and "evaluate needs torch, which is not installed here" in error and events() == []
    assert ftlib("evaluate", config, "--before", "--split", "test")[0] == 0
    before = events()
    assert before == ["evaluating", "evaluated"]
    monkeypatch.setitem(sys.modules, "torch", None)
    code, _, error = ftlib("evaluate", config, "--before", "--split", "test")
    assert code == 0 and error.count("already evaluated") == 1 and events() == before * 2


def test_what_train_writes_is_read_by_plain_transformers(
    store: Path, write_config: Callable[..., Path], ftlib: Ftlib
) -> None:
    import torch
    from transformers import AutoProcessor, PaliGemmaForConditionalGeneration

    from ftlib.models.loading import load_weights

    config = write_config(FULL)
    ftlib("prepare", config)
    assert ftlib("train", config)[0] == 0
    (result,) = (store / "runs").glob("*/tiny/*/model")
    plain = PaliGemmaForConditionalGeneration.from_pretrained(result)
    for ours, theirs in zip(load_weights(result, "float32").parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert AutoProcessor.from_pretrained(result).image_seq_length == 4


def test_submit_runs_here(
    store: Path, write_config: Callable[..., Path], ftlib: Ftlib, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_config(FULL)
    assert ftlib("prepare", config)[0] == 0
    monkeypatch.chdir(tmp_path)
    code, output, _ = ftlib("submit", config, "training.max_steps=2", "--executor", "debug")
    assert code == 0 and output.strip()
    assert len(list((store / "runs").glob("*/tiny/*/DONE"))) == 1
    assert list((tmp_path / "logs" / "tiny").iterdir())


def test_submit_without_slurm(store: Path, write_config: Callable[..., Path], ftlib: Ftlib, monkeypatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    code, _, error = ftlib("submit", write_config())
    assert code == 2 and "--executor local" in error


def test_a_loss_that_is_not_finite_stops_the_run(store: Path, write_config: Callable[..., Path], ftlib: Ftlib) -> None:
    config = write_config(FULL)
    assert ftlib("prepare", config)[0] == 0
    code, _, error = ftlib("train", config, "training.learning_rate=1e30", "training.max_grad_norm=0")
    assert code == 1, error
    assert "training diverged at step" in error and "Traceback" not in error
    (run,) = (store / "runs").glob("*/tiny/*")
    assert not (run / "DONE").exists() and not (run / "model").exists()
    assert read_lines(run / "history.jsonl")[-1]["event"] == "gave up"


def test_the_config_of_the_readme_is_valid(store: Path, tmp_path: Path, ftlib: Ftlib) -> None:
    text = (REPOSITORY / "README.md").read_text().split("```yaml\n")[1].split("```")[0]
    (tmp_path / "readme.yaml").write_text(text)
    code, _, error = ftlib("prepare", tmp_path / "readme.yaml")
    assert code == 2 and "/data/my-digits/data.jsonl: no such file" in error
