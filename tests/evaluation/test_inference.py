"""Evaluation goes on where it died, shares its rows among tasks, and looks at several datasets."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from ftlib.core import files
from ftlib.data import dataset
from ftlib.data.dataset import SplitRows
from ftlib.data.example import Example
from ftlib.evaluation.inference import image_batches
from tests.conftest import FULL, counts_and_dies, read_lines

Ftlib = Callable[..., tuple[int, str, str]]


@pytest.mark.parametrize("seed", range(20))
def test_batches_keep_images_together_and_lose_no_row(seed: int) -> None:
    draw = random.Random(seed)
    images = [f"image-{draw.randrange(12)}" for _ in range(60)]
    lengths = [draw.randrange(1, 50) for _ in images]
    size = draw.choice([1, 4, 8, 100])
    batches = image_batches(images, lengths, size)
    assert sorted(place for batch in batches for place in batch) == list(range(60))
    assert max(map(len, batches)) <= size
    for image in set(images):
        holding = [batch for batch in batches if any(images[place] == image for place in batch)]
        assert len(holding) <= -(-images.count(image) // size) + (images.count(image) > size)


def test_rows_of_text_are_batched_by_length() -> None:
    lengths = [5, 1, 4, 2, 3]
    assert image_batches([""] * 5, lengths, 2) == [[0, 2], [4, 3], [1]]


def trained(write_config: Callable[..., Path], ftlib: Ftlib, **more: object) -> Path:
    config = write_config(FULL, **more)
    assert ftlib("prepare", config)[0] == 0
    assert ftlib("train", config, "training.max_steps=2")[0] == 0
    return config


def evaluation(runs: Path, split: str, when: str) -> Path:
    (run,) = runs.glob("*/tiny/*/eval/jsonl")
    return run / split / when


def test_killed_at_any_moment_it_goes_on(
    store: Path, write_config: Callable[..., Path], ftlib: Ftlib, tmp_path: Path
) -> None:
    trained(write_config, ftlib)
    arguments = ["tiny", "--split", "train"]
    log = tmp_path / "asked"

    def start(deadly: int) -> int:
        command = counts_and_dies(log, deadly, "evaluate", *arguments)
        return subprocess.run(command, capture_output=True, env=os.environ).returncode

    draw = random.Random(11)
    deaths = 0
    while start(draw.randrange(2, 6)) == -signal.SIGKILL:
        deaths += 1
        for partial in store.glob("runs/*/tiny/*/eval/jsonl/*/*.partial/answers/*.jsonl"):
            if deaths == 2:  # as if the disk had kept half a line
                partial.write_bytes(partial.read_bytes()[:-7])
    assert deaths >= 2
    asked = [int(line) for line in log.read_text().split()]
    assert sum(asked) <= 2 * 36 + 8 * (deaths + 2), "at most the batch in flight twice, and the torn ones"
    found = {when: evaluation(store / "runs", "train", when) for when in ("before", "after")}
    broken = {when: (folder / "predictions.jsonl").read_bytes() for when, folder in found.items()}
    scores = {when: (folder / "scores.json").read_bytes() for when, folder in found.items()}
    assert not list(store.glob("runs/**/*.partial"))
    for folder in found.values():
        subprocess.run(["rm", "-r", folder], check=True)
    assert ftlib("evaluate", *arguments)[0] == 0
    for when, folder in found.items():
        assert (folder / "predictions.jsonl").read_bytes() == broken[when]
        assert (folder / "scores.json").read_bytes() == scores[when]


def test_batches_of_long_answers_are_answered_together_and_killed_they_go_on(
    store: Path, write_config: Callable[..., Path], ftlib: Ftlib, tmp_path: Path
) -> None:
    """36 rows, two at a time."""
    longer = "splits: [train], max_new_tokens: 17, batch_size: 2"
    trained(write_config, ftlib, replace=("splits: [valid], max_new_tokens: 4, batch_size: 8", longer))
    log = tmp_path / "asked"
    for deadly, code in ((3, -signal.SIGKILL), (0, 0)):
        command = counts_and_dies(log, deadly, "evaluate", "tiny")
        assert subprocess.run(command, capture_output=True).returncode == code
    asked = [int(line) for line in log.read_text().split()]
    assert set(asked) <= {3, 4} and sum(asked) <= 2 * 36 + 4
    killed = [evaluation(store / "runs", "train", when) / "predictions.jsonl" for when in ("before", "after")]
    texts = [path.read_text() for path in killed]
    subprocess.run(["rm", "-r", killed[1].parent], check=True)
    assert ftlib("evaluate", "tiny")[0] == 0
    assert [path.read_text() for path in killed] == texts


def test_answers_to_other_questions_are_not_taken_over(
    store: Path, write_config: Callable[..., Path], ftlib: Ftlib, tmp_path: Path
) -> None:
    trained(write_config, ftlib)
    command = counts_and_dies(tmp_path / "asked", 1, "evaluate", "tiny", "--split", "train")
    assert subprocess.run(command, capture_output=True).returncode == -signal.SIGKILL
    code, output, _ = ftlib("evaluate", "tiny", "evaluation.max_new_tokens=1", "--split", "train", "--json")
    assert code == 0
    assert json.loads(output)[0]["settings"]["max_new_tokens"] == 1
    (before,) = evaluation(store / "runs", "train", "before").parent.glob("settings-*/before")
    records = read_lines(before / "predictions.jsonl")
    assert len(records) == 36 and all(len(str(record["prediction"])) <= 1 for record in records)


def test_other_settings_are_kept_apart_and_an_older_rule_is_scored_again(
    store: Path, write_config: Callable[..., Path], ftlib: Ftlib, tmp_path: Path
) -> None:
    trained(write_config, ftlib)
    assert ftlib("evaluate", "tiny", "--split", "valid")[0] == 0
    own = evaluation(store / "runs", "valid", "after")
    scores = json.loads((own / "scores.json").read_text())
    code, output, error = ftlib("evaluate", "tiny", "--split", "valid", "evaluation.max_new_tokens=1", "--json")
    assert code == 0 and "valid*" in error and "max_new_tokens 1: not the settings of the run's config" in error
    found = json.loads(output)
    assert {one["settings"]["max_new_tokens"] for one in found} == {1}
    (apart,) = own.parent.glob("settings-*/after")
    reasons = [record["finish_reason"] for record in read_lines(apart / "predictions.jsonl")]
    assert found[-1]["answers"]["cut_off"] == reasons.count("length") and set(reasons) <= {"length", "stop"}
    assert found[0]["answers"]["cut_off"] and "were cut off at the maximum length (max_new_tokens 1)" in error
    assert json.loads((own / "scores.json").read_text()) == scores
    assert ftlib("report", "tiny", "-o", tmp_path / "page.html")[0] == 0
    page = (tmp_path / "page.html").read_text()
    assert "valid (max_new_tokens 1)" in page and "are not comparable with the others" in page
    for name, value in (("rule", "classification/1"), ("interval_method", "older")):
        older = {**scores, name: value, "value": 7, "metrics": {}}
        with files.atomic_directory(own) as folder:
            shutil.copyfile(own / "predictions.jsonl", folder / "predictions.jsonl")
            files.write_json(folder / "scores.json", older)
        code, _, error = ftlib("evaluate", "tiny", "--split", "valid")
        assert code == 0 and "the same predictions are scored again" in error and "after training" not in error
        assert json.loads((own / "scores.json").read_text()) == scores


def test_several_tasks_share_the_rows(
    store: Path, write_config: Callable[..., Path], ftlib: Ftlib, tmp_path: Path
) -> None:
    """As Slurm starts them, one for each GPU: the same predictions, each row asked once."""
    trained(write_config, ftlib)
    assert ftlib("evaluate", "tiny", "--split", "train")[0] == 0
    folder = evaluation(store / "runs", "train", "after")
    alone = (folder / "predictions.jsonl").read_bytes(), (folder / "scores.json").read_bytes()
    shared = store.glob("runs/*/.before")
    subprocess.run(["rm", "-r", folder, folder.with_name("before"), *shared], check=True)
    logs = [tmp_path / f"asked-{rank}" for rank in range(2)]
    tasks = []
    for rank, log in enumerate(logs):
        slurm = {"SLURM_PROCID": str(rank), "SLURM_STEP_NUM_TASKS": "2"}
        command = counts_and_dies(log, 0, "evaluate", "tiny", "--split", "train")
        tasks.append(subprocess.Popen(command, env={**os.environ, **slurm}))
    assert [task.wait(timeout=240) for task in tasks] == [0, 0]
    asked = [sum(map(int, log.read_text().split())) for log in logs]
    assert sum(asked) == 72 and min(asked) >= 24
    assert ((folder / "predictions.jsonl").read_bytes(), (folder / "scores.json").read_bytes()) == alone


def test_other_datasets_are_asked_of_the_same_model(
    store: Path, write_config: Callable[..., Path], ftlib: Ftlib, shared: Path, tmp_path: Path
) -> None:
    config = trained(write_config, ftlib)
    lines = (shared / "data" / "data.jsonl").read_text().splitlines()
    other = tmp_path / "other.yaml"
    (shared / "data" / "half.jsonl").write_text("\n".join(lines[:30]) + "\n")
    text = config.read_text().replace("name: tiny", "name: set-2").replace("test: 0.2}", "test: 0.2, seed: 5}")
    other.write_text(text.replace("source: jsonl", "source: jsonl\n  file: half.jsonl"))
    assert ftlib("prepare", other)[0] == 0
    splits = ["--split", "valid", "--split", "test"]
    code, output, error = ftlib("evaluate", "tiny", "--data", config, "--data", other, *splits, "--json")
    assert code == 0, error
    results = json.loads(output)
    assert [(result["data"], result["split"]) for result in results if result["when"] == "after"] == [
        ("tiny", "valid"), ("tiny", "test"), ("set-2", "valid"), ("set-2", "test"),
    ]  # fmt: skip
    overlaps = {(r["data"], r["split"]): r["training_overlap"] for r in results if r["when"] == "after"}
    assert overlaps["tiny", "test"] == {"rows": 0, "rows_with_trained_images": 0}
    train = {row.digest for row in prepared_rows(store, 36, "train")}
    seen = sum(row.digest in train for row in prepared_rows(store, 18, "test"))
    assert overlaps["set-2", "test"]["rows_with_trained_images"] == seen > 0
    assert f"{seen} of 6 rows have images that the model was trained on" in error
    assert all(result["training_overlap"] is None for result in results if result["when"] == "before")


def test_a_dataset_under_the_name_of_the_run_s_own_is_refused(
    store: Path, write_config: Callable[..., Path], ftlib: Ftlib, tmp_path: Path
) -> None:
    """Its results would lie where the run's own are."""
    config = trained(write_config, ftlib)
    assert ftlib("evaluate", "tiny", "--split", "test")[0] == 0
    scores = (evaluation(store / "runs", "test", "after") / "scores.json").read_bytes()
    same, other = tmp_path / "same.yaml", tmp_path / "other.yaml"
    same.write_text(config.read_text().replace("name: tiny", "name: jsonl"))
    other.write_text(same.read_text().replace("test: 0.2}", "test: 0.2, seed: 5}"))
    assert ftlib("evaluate", "tiny", "--data", same, "--split", "test")[0] == 0
    for datasets in ((other,), (config, config)):
        wanted = [word for path in datasets for word in ("--data", path)]
        code, _, error = ftlib("evaluate", "tiny", *wanted, "--split", "test")
        assert (
            code == 2
            and "results on another dataset with the name" in error
            and "Give this config another name" in error
        )
    assert (evaluation(store / "runs", "test", "after") / "scores.json").read_bytes() == scores


def test_other_data_than_the_run_learned_is_refused(
    store: Path, write_config: Callable[..., Path], ftlib: Ftlib, shared: Path, tmp_path: Path
) -> None:
    """New splits of a changed file may ask what was learned."""
    rows = shutil.copytree(shared / "data", tmp_path / "data") / "data.jsonl"
    config = trained(write_config, ftlib, root=str(rows.parent))
    rows.write_text("".join(rows.read_text().splitlines(keepends=True)[5:]))
    shutil.rmtree(next(store.glob("prepared/*")))
    assert ftlib("prepare", config)[0] == 0
    code, _, error = ftlib("evaluate", "tiny", "--split", "test")
    assert code == 2 and "the dataset has changed since this run began" in error
    assert not list(store.glob("runs/*/tiny/*/eval/*/*/after"))


def test_a_run_keeps_the_prepared_data_that_it_was_made_from(
    store: Path, write_config: Callable[..., Path], ftlib: Ftlib, shared: Path, tmp_path: Path
) -> None:
    rows = shutil.copytree(shared / "data", tmp_path / "data") / "data.jsonl"
    config = trained(write_config, ftlib, root=str(rows.parent))
    rows.write_text("".join(rows.read_text().splitlines(keepends=True)[5:]))
    code, out, error = ftlib("prepare", config, "training.max_steps=2")
    assert code == 0 and "the dataset's files have changed since" in error
    (folder,) = store.glob("prepared/*")
    assert out.strip() == str(folder)
    assert ftlib("evaluate", "tiny", "--split", "test")[0] == 0
    assert ftlib("prepare", config)[1].strip() != str(folder), "another run takes the rows as they are now"


@pytest.mark.parametrize("format", [4, 5])
def test_a_run_that_noted_no_folder_finds_its_rows(
    store: Path, write_config: Callable[..., Path], ftlib: Ftlib, monkeypatch: pytest.MonkeyPatch, format: int
) -> None:
    """Version 0.1 noted only what was in the folder, and later versions may give it another name."""
    trained(write_config, ftlib)
    (run,) = store.glob("runs/*/tiny/*")
    noted = files.read_json(run / "data.json")
    del noted["prepared"], noted["format"], noted["content"]
    files.write_json(run / "data.json", noted)
    (folder,) = store.glob("prepared/*")
    monkeypatch.setattr(dataset, "FORMAT", 5)
    monkeypatch.setattr(dataset, "_READABLE", range(format, 6))
    code, _, error = ftlib("evaluate", "tiny", "--split", "test")
    assert (code == 0) == (format == 4), error
    assert list(store.glob("prepared/*")) == [folder] and ("is not prepared" in error) == (format == 5)


def test_of_a_run_only_evaluation_can_be_set(write_config: Callable[..., Path], ftlib: Ftlib, store: Path) -> None:
    trained(write_config, ftlib)
    code, _, error = ftlib("evaluate", "tiny", "model.dtype=bfloat16")
    assert code == 2 and "model.dtype=bfloat16: of a run, only evaluation.… can be set" in error


def test_an_empty_split_is_refused_before_training(
    write_config: Callable[..., Path], ftlib: Ftlib, store: Path
) -> None:
    config = write_config(FULL, replace=("test: 0.2}", "test: 0}"))
    assert ftlib("prepare", config)[0] == 0
    code, _, error = ftlib("train", config, "training.max_steps=2", "evaluation.splits=[valid, test]")
    assert code == 2 and "split test has no rows" in error and "Remove test from evaluation.splits" in error
    assert ftlib("train", config, "training.max_steps=2", "evaluation.splits=[valid]")[0] == 0
    code, _, error = ftlib("evaluate", "tiny", "--split", "test")
    assert code == 2 and "split test has no rows" in error


@pytest.mark.parametrize(
    "settings", [("evaluation.max_new_tokens=2",) * 2, ("evaluation.max_new_tokens=1", "evaluation.max_new_tokens=2")]
)
def test_two_evaluations_at_once(
    store: Path, write_config: Callable[..., Path], ftlib: Ftlib, tmp_path: Path, settings: tuple[str, str]
) -> None:
    """One waits for the other; if it asks for the same, it takes what that one found."""
    trained(write_config, ftlib, replace=("evaluation: {", "evaluation: {before: false, "))
    logs = [tmp_path / "asked-0", tmp_path / "asked-1"]
    commands = [
        counts_and_dies(log, 0, "evaluate", "tiny", own, "--split", "train", "--json")
        for log, own in zip(logs, settings, strict=True)
    ]
    tasks = [subprocess.Popen(command, env=os.environ, stdout=subprocess.PIPE, text=True) for command in commands]
    results = [json.loads(task.communicate(timeout=240)[0])[0] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0]
    assert [result["settings"]["max_new_tokens"] for result in results] == [int(own[-1]) for own in settings]
    asked = [sum(map(int, log.read_text().split())) if log.exists() else 0 for log in logs]
    assert sorted(asked) == ([0, 36] if settings[0] == settings[1] else [36, 36])
    folders = [path.parent for path in (store / "runs").rglob("scores.json")]  # apart: not the config's settings
    assert len(folders) == len(set(settings))
    for folder in folders:
        most = json.loads((folder / "scores.json").read_text())["settings"]["max_new_tokens"]
        assert max(len(str(record["prediction"])) for record in read_lines(folder / "predictions.jsonl")) <= most
    assert not list(store.glob("runs/**/*.partial"))


def prepared_rows(store: Path, train_rows: int, split: str) -> list[Example]:
    """The rows of the prepared dataset whose training split has that many."""
    for folder in (store / "prepared").iterdir():
        if len(SplitRows(folder / "train")) == train_rows:
            return list(SplitRows(folder / split))
    raise AssertionError(train_rows)


YES_NO = ("evaluation: {", "evaluation: {decode: choose, positive: 'yes', ")


def test_a_closed_set_with_a_threshold_from_valid(
    store: Path, write_config: Callable[..., Path], ftlib: Ftlib, shared: Path
) -> None:
    rows = read_lines(shared / "data" / "data.jsonl")
    for row in rows:
        row["suffix"] = "yes" if int(str(row["suffix"])) >= 7 else "no"
    (shared / "data" / "yes_no.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = write_config(FULL, replace=YES_NO)
    config.write_text(config.read_text().replace("source: jsonl", "source: jsonl\n  file: yes_no.jsonl"))
    assert ftlib("prepare", config)[0] == 0
    assert ftlib("train", config, "training.max_steps=2")[0] == 0
    code, output, error = ftlib("evaluate", "tiny", "--split", "test", "--json")
    assert code == 0, error
    after = json.loads(output)[-1]
    assert after["threshold"]["split"] == "valid" and after["threshold"]["rule"] == "best F1"
    assert after["settings"]["threshold"] == after["threshold"] and after["invalid"] == 0
    assert set(after["precision_recall"]) == {"threshold", "precision", "recall"}
    folder = evaluation(store / "runs", "test", "after")
    for record in read_lines(folder / "predictions.jsonl"):
        shares = record["probabilities"]
        assert sum(shares.values()) == pytest.approx(1, abs=1e-5)
        assert record["prediction"] == ("yes" if shares["yes"] >= after["threshold"]["value"] else "no")
    valid = json.loads((folder.parent.parent / "valid" / "after" / "scores.json").read_text())
    assert valid["threshold"] == after["threshold"] and valid["settings"]["threshold"] is None
    code, _, error = ftlib("evaluate", "tiny", "evaluation.positive=maybe", "--split", "test")
    assert code == 2 and "'maybe' is not an answer of the dataset (no, yes)" in error
