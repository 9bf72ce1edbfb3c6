"""What `evaluate` finds on a task's rows is what `score` finds on the official files with the submission it wrote."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ftlib.core import registry
from ftlib.data.sources import coco_captions, docvqa, gqa, vqav2
from ftlib.errors import UserError
from ftlib.metrics.base import MetricResult
from ftlib.tasks.base import PredictionRecord
from ftlib.tasks.registry import load_task

WORDS = ["yes", "no", "two", "2", "a dog", "the dog", "blue.", "New York", ""]


@pytest.mark.parametrize("name", registry.TASKS)
def test_every_task_of_the_table_is_registered_by_its_module(name: str) -> None:
    task = load_task(name)
    assert task.name == name and task.columns == tuple(registry.TASKS[name].metrics)
    assert all(task.higher_is_better(metric) for metric in task.columns) and not task.higher_is_better("loss")
    with pytest.raises(UserError, match="unknown whether higher speed is better"):
        task.higher_is_better("speed")


def rows(count: int = 40) -> tuple[random.Random, list[PredictionRecord]]:
    draw = random.Random(4)
    made = []
    for number in range(count):
        made.append({"id": str(1000 + number), "image": f"{number // 3}.jpg", "prompt": f"question {number}?"})
        made[-1]["prediction"] = draw.choice(WORDS)
    return draw, made


def write(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value))
    return path


def vqa_case(folder: Path) -> tuple[list[PredictionRecord], Callable[[Path], MetricResult]]:
    draw, records = rows()
    questions, annotations = [], []
    for record in records:
        record["references"] = [draw.choice(WORDS) for _ in range(10)]
        kinds = {"question_type": draw.choice(["what", "is the"]), "answer_type": draw.choice(["number", "other"])}
        record["facts"] = {"image_id": record["image"], **kinds}
        ids = {"question_id": int(record["id"]), "image_id": record["image"]}
        questions.append({**ids, "question": record["prompt"]})
        answers = [{"answer": text, "answer_id": place} for place, text in enumerate(record["references"])]
        annotations.append({**ids, **kinds, "multiple_choice_answer": "x", "answers": answers})
    files = [
        write(folder / "questions.json", {"questions": questions}),
        write(folder / "annotations.json", {"annotations": annotations}),
    ]
    return records, lambda predictions: vqav2.score(files, predictions)


def docvqa_case(folder: Path) -> tuple[list[PredictionRecord], Callable[[Path], MetricResult]]:
    draw, records = rows()
    data = []
    for record in records:
        record["references"] = draw.sample(WORDS[:-1], 2)
        record["facts"] = {"docId": record["image"], "question_types": draw.sample(["form", "layout"], 1)}
        data.append({"questionId": int(record["id"]), "question": record["prompt"], "image": record["image"]})
        data[-1] |= {"answers": record["references"], "data_split": "val", **record["facts"]}
    file = write(folder / "val_v1.0_withQT.json", {"data": data})
    return records, lambda predictions: docvqa.score([file], predictions)


def gqa_case(folder: Path) -> tuple[list[PredictionRecord], Callable[[Path], MetricResult]]:
    draw, records = rows()
    questions = {}
    for number, record in enumerate(records):
        record["references"] = [draw.choice(WORDS[:-1])]
        near = [records[place]["id"] for place in range(number - number % 3, min(40, number - number % 3 + 3))]
        record["facts"] = {
            "isBalanced": number % 4 > 0,
            "types": {"structural": draw.choice(["query", "verify"]), "semantic": "rel", "detailed": "relO"},
            "groups": {"global": draw.choice(["g", None]), "local": None},
            "entailed": near,
            "semantic": [{"operation": "select", "argument": "dog (1)", "dependencies": []}],
        }
        shown = {"question": record["prompt"], "answer": record["references"][0], "imageId": record["image"]}
        questions[record["id"]] = {**shown, **record["facts"]}
    file = write(folder / "val_all_questions.json", questions)
    return records, lambda predictions: gqa.score([file], predictions)


def caption_case(folder: Path) -> tuple[list[PredictionRecord], Callable[[Path], MetricResult]]:
    draw, records = rows()
    annotations = []
    for number, record in enumerate(records):
        record["image"] = f"{number}.jpg"
        record["references"] = [f"a {draw.choice(WORDS[4:-1])} sits on {draw.choice(WORDS[:-1])}" for _ in range(3)]
        record["prediction"] = f"a {draw.choice(WORDS[4:-1])} sits on a {draw.choice(WORDS)}"
        record["facts"] = {"image_id": number}
        for text in record["references"]:
            annotations.append({"image_id": number, "id": len(annotations), "caption": text})
    images = [{"id": number, "file_name": f"{number}.jpg"} for number in range(len(records))]
    file = write(folder / "captions_val2014.json", {"images": images, "annotations": annotations})
    return records, lambda predictions: coco_captions.score([file], predictions)


CASES = {"vqa": vqa_case, "docvqa": docvqa_case, "gqa": gqa_case, "caption": caption_case}


@pytest.mark.parametrize("task", sorted(CASES))
def test_rows_and_official_files_agree(task: str, tmp_path: Path) -> None:
    records, score = CASES[task](tmp_path)
    ours = load_task(task).score(records, [], None)
    submission = load_task(task).submission
    assert submission
    official = score(write(tmp_path / "submission.json", submission(records)))
    expected = official.values()
    assert ours.values() == pytest.approx(expected, nan_ok=True) and len(expected) > 1
    assert ours.rule == official.rule and ours.headline == load_task(task).columns[0]
    assert ours.rows is not None and len(ours.rows) == len(records)
    assert 0 < expected[ours.headline] < 100


def test_space_around_a_reference_is_no_mistake() -> None:
    """A prediction never has any."""
    rows = [
        {"id": str(n), "image": f"{n}.png", "prediction": text, "references": [f" {text}\n"]}
        for n, text in ((1, "a"), (2, "b"))
    ]
    assert load_task("classify").score(rows, ["a", "b"], None).values()["accuracy"] == 1


def test_one_reference_is_no_vqa_accuracy(tmp_path: Path) -> None:
    records, _ = vqa_case(tmp_path)
    records[3]["references"] = ["yes"]
    with pytest.raises(UserError, match="row 1003: VQA accuracy needs the answers of several annotators"):
        load_task("vqa").score(records, [], None)


def test_gqa_rows_need_the_release_s_fields(tmp_path: Path) -> None:
    records, _ = gqa_case(tmp_path)
    del records[5]["facts"]["types"]
    with pytest.raises(UserError, match="row 1005: field types is missing"):
        load_task("gqa").score(records, [], None)
