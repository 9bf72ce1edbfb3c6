"""`ftlib score` on small result files of every task: metrics, intervals, the paired test, remarks."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.golden.conftest import Golden
from tests.golden.normal import squeezed

Ftlib = Callable[..., tuple[int, str, str]]

WORDS = [
    "a",
    "the",
    "red",
    "small",
    "dog",
    "cat",
    "horse",
    "man",
    "on",
    "near",
    "grass",
    "road",
    "sits",
    "runs",
    "2",
    "two",
]
ROWS = 24


NOT_HELD = re.compile(r"(?<=\|version:)[\d.]+|(?<=not computed: )(Java|stanford)[^\n\"]*")
"""Of sacrebleu, and what this machine lacks for the metrics that need Java."""


def sentence(draw: random.Random, length: int = 8) -> str:
    return " ".join(draw.choice(WORDS) for _ in range(draw.randint(2, length)))


def near(draw: random.Random, text: str, share: float) -> str:
    """A text of which a share of the words is another one."""
    return " ".join(draw.choice(WORDS) if draw.random() < share else word for word in text.split())


def box(draw: random.Random) -> list[float]:
    x, y = draw.randint(0, 50), draw.randint(0, 50)
    return [x, y, x + draw.randint(13, 60), y + draw.randint(13, 60)]


def moved(draw: random.Random, corners: list[float], by: int) -> list[float]:
    return [corner + draw.randint(0, by) for corner in corners]


def vqa(draw: random.Random) -> dict[str, Any]:
    ids, answers = range(ROWS), [draw.choice(["yes", "no", "2", "red dog"]) for _ in range(ROWS)]
    people = [[{"answer": answers[i] if draw.random() < 0.7 else "maybe"} for _ in range(10)] for i in ids]
    kinds = ["yes/no", "number", "other"]
    return {
        "questions.json": {"questions": [{"question_id": i, "image_id": i // 2, "question": "is it?"} for i in ids]},
        "annotations.json": {
            "annotations": [
                {"question_id": i, "image_id": i // 2, "question_type": f"is {i % 2}", "answer_type": kinds[i % 3],
                 "answers": people[i], "multiple_choice_answer": answers[i]}
                for i in ids
            ]
        },
        "predictions": [[{"question_id": i, "answer": near(draw, answers[i], s)} for i in ids] for s in (0.1, 0.4)],
    }  # fmt: skip


def docvqa(draw: random.Random) -> dict[str, Any]:
    texts = [sentence(draw) for _ in range(ROWS)]
    rows = [
        {"questionId": i, "question": "which?", "image": f"documents/{i // 3}.png", "docId": i // 3,
         "answers": [text, text.upper()], "data_split": "val", "question_types": ["form" if i % 2 else "table/list"]}
        for i, text in enumerate(texts)
    ]  # fmt: skip
    results = [[{"questionId": i, "answer": near(draw, text, s)} for i, text in enumerate(texts)] for s in (0.1, 0.4)]
    return {"val.json": {"data": rows}, "predictions": results}


def gqa(draw: random.Random) -> dict[str, Any]:
    answers = {f"0{i}": draw.choice(["yes", "no", "red"]) for i in range(ROWS)}
    questions = {
        key: {
            "question": "is there a dog?", "imageId": str(i // 2), "isBalanced": i % 4 != 0, "answer": answer,
            "entailed": [f"0{i - 1}"] if i % 5 == 4 else [], "equivalent": [], "fullAnswer": answer,
            "types": {"structural": ["verify", "query"][i % 2], "semantic": ["obj", "attr"][i % 2], "detailed": "x"},
            "groups": {"global": None, "local": f"{i % 3}-dog"},
            "semantic": [{"operation": "select", "argument": "dog (1)", "dependencies": []}],
            "annotations": {"question": {}, "answer": {}, "fullAnswer": {}},
        }
        for i, (key, answer) in enumerate(answers.items())
    }  # fmt: skip
    results = [
        [
            {"questionId": key, "prediction": answer if draw.random() > share else "blue"}
            for key, answer in answers.items()
        ]
        for share in (0.1, 0.4)
    ]
    return {"questions.json": questions, "predictions": results}


def caption(draw: random.Random) -> dict[str, Any]:
    captions = [[sentence(draw) for _ in range(3)] for _ in range(ROWS)]
    notes = [
        {"image_id": i, "id": 3 * i + n, "caption": text}
        for i, several in enumerate(captions)
        for n, text in enumerate(several)
    ]
    images = [{"id": i, "file_name": f"{i}.jpg"} for i in range(ROWS)]
    results = [
        [{"image_id": i, "caption": near(draw, texts[0], s)} for i, texts in enumerate(captions)] for s in (0.2, 0.6)
    ]
    return {"captions.json": {"images": images, "annotations": notes}, "predictions": results}


def detect(draw: random.Random) -> dict[str, Any]:
    corners = [box(draw) for _ in range(2 * ROWS)]

    def xywh(found: list[float]) -> list[float]:
        return [found[0], found[1], found[2] - found[0], found[3] - found[1]]

    notes = [
        {"id": n + 1, "image_id": n // 2, "category_id": n % 3, "bbox": xywh(one), "iscrowd": 0,
         "area": (one[2] - one[0]) * (one[3] - one[1])}
        for n, one in enumerate(corners)
    ]  # fmt: skip
    release = {
        "images": [{"id": i, "file_name": f"{i}.jpg", "width": 100, "height": 100} for i in range(ROWS)],
        "categories": [{"id": i, "name": name} for i, name in enumerate(("dog", "cat", "horse"))],
        "annotations": notes,
    }
    results = [
        [
            {"image_id": n // 2, "category_id": n % 3, "bbox": xywh(moved(draw, one, by)), "score": draw.random()}
            for n, one in enumerate(corners)
        ]
        for by in (3, 12)
    ]
    return {"instances.json": release, "predictions": results}


def refer(draw: random.Random) -> dict[str, Any]:
    corners = [box(draw) for _ in range(ROWS)]
    rows = [{"id": str(i), "image": f"{i // 2}.jpg", "box": one} for i, one in enumerate(corners)]
    results = [[{"id": str(i), "box": moved(draw, one, by)} for i, one in enumerate(corners)] for by in (3, 12)]
    results[1][0]["box"] = None
    return {"references.jsonl": rows, "predictions": results}


def segment(draw: random.Random) -> dict[str, Any]:
    def mask(one: list[float]) -> dict[str, Any]:
        x, y, right, bottom = one
        return {"size": [120, 120], "polygons": [[x, y, right, y, right, bottom, x, bottom]]}

    corners = [box(draw) for _ in range(ROWS)]
    rows = [{"id": str(i), "image": f"{i // 2}.jpg", "mask": mask(one)} for i, one in enumerate(corners)]
    results = [[{"id": str(i), "mask": mask(moved(draw, one, by))} for i, one in enumerate(corners)] for by in (3, 12)]
    results[1][0]["mask"] = None
    return {"references.jsonl": rows, "predictions": results}


def classify(draw: random.Random) -> dict[str, Any]:
    labels = [draw.choice(["dog", "cat", "horse"]) for _ in range(ROWS)]
    rows = [{"id": str(i), "references": [label], "image": f"{i}.png"} for i, label in enumerate(labels)]
    results = [
        [{"id": str(i), "prediction": near(draw, label, s)} for i, label in enumerate(labels)] for s in (0.2, 0.6)
    ]
    return {"references.jsonl": rows, "predictions": results}


def text(draw: random.Random) -> dict[str, Any]:
    texts = [[sentence(draw), sentence(draw)] for _ in range(ROWS)]
    rows = [{"id": str(i), "references": several} for i, several in enumerate(texts)]
    results = [
        [{"id": str(i), "prediction": near(draw, both[0], s)} for i, both in enumerate(texts)] for s in (0.2, 0.6)
    ]
    return {"references.jsonl": rows, "predictions": results}


TASKS = {made.__name__: made for made in (vqa, docvqa, gqa, caption, detect, refer, segment, classify, text)}


def write(path: Path, content: Any) -> Path:
    """As JSON, or a line for each row."""
    lines = path.suffix == ".jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in content) if lines else json.dumps(content))
    return path


@pytest.mark.parametrize("task", TASKS)
def test_score(task: str, golden: Golden, tmp_path: Path, ftlib: Ftlib) -> None:
    files = TASKS[task](random.Random(task))
    results = files.pop("predictions")
    suffix = ".jsonl" if "references.jsonl" in files else ".json"
    first, second = (
        write(tmp_path / f"{name}{suffix}", rows) for name, rows in zip(("first", "second"), results, strict=True)
    )
    references = [write(tmp_path / name, content) for name, content in files.items()]
    words = ["score", task, "--references", *references, "--predictions", first, "--against", second, "--json"]
    code, out, error = ftlib(*words, *(["--positive", "dog"] if task == "classify" else []))
    assert code == 0, error
    error, out = (NOT_HELD.sub("…", found.replace(str(tmp_path), "<folder>")) for found in (error, out))
    golden.text(f"score/{task}.txt", squeezed(error))
    golden.json(f"score/{task}.json", {"": json.loads(out)}, **{"": (1e-9, 1e-12)})
