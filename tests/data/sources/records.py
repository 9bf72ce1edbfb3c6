"""Clean records of every release, one by number, and values that have no place in them."""

from __future__ import annotations

import json
from typing import Any

from tests.data.sources import releases

HUGE = "@huge@"
DEEP = "@deep@"
TWICE = "@twice@"
RAW = {HUGE: "9" * 5000, DEEP: "[" * 300 + "]" * 300, TWICE: '{"a": 1, "a": 2}'}
"""What Python's json does not write: stands in the text of a file instead of these words."""

SAME_KEY = "@key@"
"""Stands before a key of an object that has this key already."""

POISON: list[Any] = [
    None, True, False, 0, -1, 1.5, 10**30, -(10**90), float("nan"), float("inf"), float("-inf"), "", " \n", "\x00",
    "\ud800", "é犬\U0001f600", "x" * 70_000, [], {}, [[]], [None], {"a": None}, [1, "x"], [{}], {"answer": 1},
    "../../x", "/etc/passwd", ";<loc0001>", "NaN", HUGE, DEEP,
]  # fmt: skip


def dumped(content: Any) -> str:
    text = json.dumps(content)
    for word, raw in RAW.items():
        text = text.replace(f'"{word}"', raw)
    return text.replace(f'"{SAME_KEY}', '"')


def vqa_questions(number: int) -> dict[str, Any]:
    return {"image_id": number, "question": f"What is {number}?", "question_id": number}


def vqa_annotations(number: int) -> dict[str, Any]:
    return releases.vqa_annotation(number, number, ["a", "b", "b"])


def coco_image(number: int) -> dict[str, Any]:
    return {"id": number, "file_name": f"{number}.jpg", "width": 400, "height": 200}


def coco_object(number: int) -> dict[str, Any]:
    return releases.instance(number, number, 17, [10 + number, 20, 30.5, 40])


def coco_caption(number: int) -> dict[str, Any]:
    return {"id": number, "image_id": number, "caption": f"Caption {number}."}


def karpathy_image(number: int) -> dict[str, Any]:
    sentences = [{"raw": f"Caption {number}.", "tokens": ["caption"]}]
    names = {"cocoid": number, "filepath": "val2014", "filename": f"{number}.jpg"}
    return {**names, "split": "test", "sentences": sentences}


def gqa_record(number: int) -> dict[str, Any]:
    return releases.gqa_question(str(number), "yes", True, [str(number)])


def ref_record(number: int) -> dict[str, Any]:
    return releases.ref(number, number, "testA", [f"the {number}"])


def ref_object(number: int) -> dict[str, Any]:
    return coco_object(number) | {"id": 1000 + number}


def alpaca(number: int) -> dict[str, Any]:
    own = {"id": f"k{number}", "instruction": "Add.", "input": f"{number}", "output": "3", "more": {"a": [1]}}
    return {**own, "system": "Be kind.", "history": [["q", "a"]]}


def chat(number: int) -> dict[str, Any]:
    messages = [{"role": "user", "content": f"q{number}"}, {"role": "assistant", "content": "a", "weight": 1}]
    return {"id": f"k{number}", "messages": messages}


def sharegpt(number: int) -> dict[str, Any]:
    messages = [{"from": "human", "value": f"q{number}"}, {"from": "gpt", "value": "a"}]
    return {"id": f"k{number}", "conversations": messages, "system": "Be kind."}


def row(number: int) -> dict[str, Any]:
    names = {"image": f"{number}.png", "prefix": "q", "suffix": "a", "references": ["a", "b"]}
    return {"id": f"k{number}", **names, "more": {"a": [1]}}


CATEGORIES = [{"id": 17, "name": "cat"}]
