"""Boxes and masks as a user has them: JSONL in, official metrics and result files out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ftlib.data.sources import toy
from ftlib.evaluation.model import EvalModel
from ftlib.models.generation import GeneratedAnswer
from ftlib.models.tiny import tiny_model, tiny_processor
from ftlib.tasks.registry import task_of
from tests.conftest import REPOSITORY, read_lines
from tests.models.test_mask_codec import random_arrays

Ftlib = Callable[..., tuple[int, str, str]]

CONFIG = """\
name: tiny
task: TASK
seed: 3
model: {family: paligemma, base: MODEL}
adapter: {method: full}
data: {source: jsonl, root: ROOT, split: {valid: 0.2, test: 0.2}}
training: {max_steps: 2, per_device_train_batch_size: 4, learning_rate: 1.0e-3}
evaluation: {splits: [test], before: false, max_new_tokens: 30, batch_size: 8}
"""
SEGMENTS = "".join(f"<seg{number:03d}>" for number in range(16))
BOX = "<loc0128><loc0256><loc0640><loc0768>"
SIZE = {"width": 64, "height": 32}
MASK = {"size": [32, 64], "polygons": [[16, 4, 48, 4, 48, 20, 16, 20]]}
SUFFIXES = {"detect": f"{BOX} cat ; <loc0000><loc0000><loc0100><loc0100> dog", "refer": BOX, "segment": BOX + SEGMENTS}


@pytest.fixture
def config(tmp_path: Path, store: Path) -> Callable[[str], Path]:
    """Twenty rows, a tiny model and a config for a task."""

    def make(task: str) -> Path:
        (tmp_path / "data").mkdir()
        draw = np.random.default_rng(0)
        lines = []
        for number in range(20):
            name = f"{number}.png"
            Image.fromarray(draw.integers(0, 255, (32, 64, 3), dtype=np.uint8)).save(tmp_path / "data" / name)
            facts: dict[str, Any] = {**SIZE, **({"mask": MASK} if task == "segment" else {})}
            lines.append({"image": name, "prefix": f"{task} cat", "suffix": SUFFIXES[task], **facts})
        (tmp_path / "data" / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        processor = tiny_processor()
        tiny_model(processor).save_pretrained(tmp_path / "model")
        processor.save_pretrained(tmp_path / "model")
        text = CONFIG.replace("TASK", task).replace("MODEL", f"{tmp_path}/model").replace("ROOT", f"{tmp_path}/data")
        path = tmp_path / "tiny.yaml"
        path.write_text(text)
        return path

    return make


@pytest.fixture
def answered(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Let the model say what two steps of training do not teach."""

    def say(text: str) -> None:
        monkeypatch.setattr(
            EvalModel, "generate", lambda self, rows, settings: [GeneratedAnswer(text, True, [], [])] * len(rows)
        )

    return say


def evaluation(store: Path) -> Path:
    (folder,) = (store / "runs").glob("*/tiny/*/eval/jsonl/test/after")
    return folder


def test_the_shipped_config_of_own_boxes(
    config: Callable[[str], Path], ftlib: Ftlib, store: Path, answered: Callable[[str], None], tmp_path: Path
) -> None:
    """jsonl_detect.yaml on twenty rows and a tiny model."""
    config("detect")
    small = [f"model.base={tmp_path}/model", "model.dtype=float32", f"data.root={tmp_path}/data"]
    small += ["data.split.valid=0.2", "data.split.test=0.2", "training.max_steps=2", "evaluation.before=false"]
    for command in ("prepare", "train"):
        code, _, error = ftlib(command, REPOSITORY / "configs" / "jsonl_detect.yaml", *small)
        assert code == 0, error
    answered(f"{BOX} cat ; <loc0001>")
    code, output, error = ftlib("evaluate", "jsonl_detect", "--split", "test", "--json")
    assert code == 0, error
    (scores,) = json.loads(output)
    assert scores["metric"] == "AP" and "AP50" in error
    assert scores["value"] == pytest.approx(0.5), "every cat is found, no dog"
    assert (scores["n"], scores["invalid"]) == (4, 4)
    assert scores["tables"]["unreadable fragments"] == 4
    (folder,) = (store / "runs").glob("*/jsonl_detect/*/eval/jsonl/test/after")
    submission = json.loads((folder / "submission.json").read_text())
    assert len(submission) == 4
    assert submission[0]["category_id"] == 1 and submission[0]["score"] == 1
    left, top, width, height = submission[0]["bbox"]
    assert (left, top) == pytest.approx((16, 4), abs=0.05) and (width, height) == pytest.approx((32, 16), abs=0.05)


def test_the_shipped_config_of_digits(store: Path, ftlib: Ftlib, monkeypatch: pytest.MonkeyPatch) -> None:
    """digits_detect.yaml on a few canvases, two steps; then it is asked as it was in the evaluation."""
    monkeypatch.setattr(toy, "DIGITS_DETECT_ROWS", {"train": 32, "valid": 4, "test": 6})
    path = REPOSITORY / "configs" / "digits_detect.yaml"
    for command in (("stage",), ("prepare",), ("train", "training.max_steps=2"), ("evaluate", "training.max_steps=2")):
        code, _, error = ftlib(command[0], path, *command[1:])
        assert code == 0, error
    (folder,) = (store / "runs").glob("*/digits_detect/*/eval/digits_detect/test/after")
    scores = json.loads((folder / "scores.json").read_text())
    assert scores["n"] == 6 and "token probability" in scores["rule"] and "order of mention: AP" in scores["metrics"]
    record = read_lines(folder / "predictions.jsonl")[0]
    image = store / "datasets" / "digits_detect" / str(record["image"])
    asked = ["predict", "digits_detect", "--image", image, "--prompt", record["prompt"], "--draw", store / "drawn.png"]
    code, output, error = ftlib(*asked)
    assert (code, output.strip()) == (0, record["prediction"]), error
    answer = json.loads(ftlib(*asked, "--json")[1])[0]
    assert answer["box_scores"] == record["box_scores"] and answer["mean_logprob"] <= 0
    assert min(Image.open(store / "drawn.png").size) >= 320


def test_an_older_evaluation_without_scores_of_boxes(
    config: Callable[[str], Path], ftlib: Ftlib, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is read and reported, but not compared with one that has scores, until it is deleted and made anew."""
    path = config("detect")
    path.write_text(path.read_text().replace("before: false", "before: true"))
    for command in ("prepare", "train"):
        assert ftlib(command, path)[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr("ftlib.evaluation.evaluate.task_of", lambda found: replace(task_of(found), answer_fields=None))
        assert ftlib("evaluate", path)[0] == 0
    folder = evaluation(store)
    assert "box_scores" not in read_lines(folder / "predictions.jsonl")[0]
    assert "training changed AP" in ftlib("evaluate", path)[2] and ftlib("report", "tiny")[0] == 0
    shutil.rmtree(folder)
    code, _, error = ftlib("evaluate", path)
    assert code == 0 and "test after: the two scores are not comparable: the rule differs" in error
    assert "box_scores" in read_lines(folder / "predictions.jsonl")[0]
    page = Path(ftlib("report", "tiny")[1].strip()).read_text()
    assert "not comparable" in page and "→" not in page
    shutil.rmtree(folder.with_name("before"))
    assert "training changed AP" in ftlib("evaluate", path)[2]


def test_refer(config: Callable[[str], Path], ftlib: Ftlib, store: Path, answered: Callable[[str], None]) -> None:
    path = config("refer")
    for command in ("prepare", "train"):
        assert ftlib(command, path)[0] == 0
    answered(BOX.replace("0640", "0600"))
    code, output, error = ftlib("evaluate", "tiny", "--json")
    assert code == 0, error
    assert json.loads(output)[0]["value"] == 1.0
    assert not (evaluation(store) / "submission.json").exists()


def test_segment(
    config: Callable[[str], Path], ftlib: Ftlib, store: Path, answered: Callable[[str], None], tmp_path: Path
) -> None:
    path = config("segment")
    for command in ("prepare", "train"):
        assert ftlib(command, path)[0] == 0
    code, _, error = ftlib("evaluate", "tiny")
    assert code == 2 and "evaluation.mask_decoder" in error and "vae-oid.npz" in error
    code, _, error = ftlib("evaluate", "tiny", f"evaluation.mask_decoder={tmp_path}/nowhere.npz")
    assert code == 2 and "nowhere.npz: no such file" in error
    np.savez(tmp_path / "full.npz", **full_mask_arrays())
    answered(BOX + SEGMENTS)
    decoder = f"evaluation.mask_decoder={tmp_path}/full.npz"
    assert ftlib("prepare", path, decoder)[0] == 0
    code, output, error = ftlib("evaluate", "tiny", decoder, "--json")
    assert code == 0, error
    (scores,) = json.loads(output)
    assert scores["value"] == 1.0, "the whole box, edges rounded down"
    assert scores["invalid"] == 0
    records = read_lines(evaluation(store) / "predictions.jsonl")
    assert all(record["mask"]["size"] == [32, 64] for record in records)  # type: ignore[index]
    answered(BOX)
    code, output, error = ftlib(
        "evaluate", "tiny", f"evaluation.mask_decoder={tmp_path}/full.npz", "evaluation.max_new_tokens=29", "--json"
    )
    assert code == 0, error
    assert (json.loads(output)[0]["value"], json.loads(output)[0]["invalid"]) == (0.0, 4)


def full_mask_arrays() -> dict[str, np.ndarray]:
    """Weights whose masks fill their box whatever the codes are."""
    arrays = {name: np.zeros_like(array) for name, array in random_arrays().items()}
    arrays["decoder.12.bias"] += 1
    return arrays
