"""GQA's metrics against a slow, literal reading of the official rules."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest

from ftlib.metrics.gqa import GqaChoices, GqaQuestion, count_steps, measure
from ftlib.metrics.uncertainty import confidence_intervals
from tests.metrics import literal_gqa

ANSWERS = ["yes", "no", "red", "color", "shape", "left", "Red", " red", ""]
OPERATIONS = [("select", "dog (12)"), ("exist", "?"), ("query", "name"), ("query", "color"), ("choose name", "a|b")]
OPERATIONS += [("verify rel", "coexisting"), ("relate", "o,query: name"), ("and", "")]


def random_question(draw: random.Random, names: list[str]) -> dict[str, Any]:
    return {
        "question": " ".join(["word"] * draw.randint(1, 4)) + draw.choice(["", " ", "\n?"]),
        "answer": draw.choice(ANSWERS[:-1]),
        "imageId": draw.choice("123456"),
        "isBalanced": draw.random() < 0.6,
        "entailed": draw.sample(names, draw.randint(0, 3)),
        "groups": {"global": draw.choice(["colors", "sides", None]), "local": None},
        "types": {
            "structural": draw.choice(["query", "verify", "choose", "logical", "compare"]),
            "semantic": draw.choice(["attr", "rel", "obj"]),
            "detailed": draw.choice(["twoCommon", "chooseAttr", "existC"]),
        },
        "semantic": [
            {"operation": operation, "argument": argument, "dependencies": []}
            for operation, argument in draw.choices(OPERATIONS, k=draw.randint(0, 5))
        ],
    }


def plain(raw: dict[str, Any]) -> GqaQuestion:
    """What the metric looks at."""
    return GqaQuestion(
        question=raw["question"],
        answer=raw["answer"],
        image=raw["imageId"],
        balanced=raw["isBalanced"],
        entailed=tuple(raw["entailed"]),
        group=raw["groups"]["global"],
        structural=raw["types"]["structural"],
        semantic=raw["types"]["semantic"],
        detailed=raw["types"]["detailed"],
        steps=count_steps((step["operation"], step["argument"]) for step in raw["semantic"]),
    )


@pytest.mark.parametrize("seed", range(40))
def test_equal_to_the_literal_rules(seed: int) -> None:
    draw = random.Random(seed)
    names = [str(number) for number in range(draw.choice([3, 30, 300]))]
    raw = {name: random_question(draw, names) for name in names}
    raw["0"]["isBalanced"] = True
    predictions = {name: draw.choice([raw[name]["answer"], draw.choice(ANSWERS)]) for name in names}
    choices = {name: {"valid": draw.choices(ANSWERS, k=4), "plausible": draw.choices(ANSWERS, k=2)} for name in names}
    measured = measure(
        {name: plain(one) for name, one in raw.items()},
        predictions,
        {name: GqaChoices(tuple(one["valid"]), tuple(one["plausible"])) for name, one in choices.items()},
    )
    expected = literal_gqa.scores(raw, predictions, choices)
    values = {name: None if math.isnan(value) else value for name, value in measured.values().items()}
    assert values == pytest.approx(expected, abs=1e-9)
    assert measured.n == sum(one["isBalanced"] for one in raw.values())
    assert measured.notes.keys() >= {"grounding"}


def question(answer: str, **fields: Any) -> GqaQuestion:
    kinds = {"structural": "verify", "semantic": "attr", "detailed": "existC", "steps": 1, "group": "g"}
    base = {"question": "is it", "answer": answer, "image": "i", "balanced": True, "entailed": ()} | kinds
    return GqaQuestion(**(base | fields))  # type: ignore[arg-type]


def test_consistency_by_hand() -> None:
    questions = {
        "right": question("yes", entailed=("right", "right2", "wrong")),  # one of two, itself not counted
        "right2": question("yes", entailed=("right2",)),  # entails nothing else: does not count
        "wrong": question("yes", entailed=("right",)),  # not right: does not count
        "other": question("yes", entailed=("wrong",), balanced=False),  # not balanced: does not count
    }
    predictions = {"right": "yes", "right2": "yes", "wrong": "no", "other": "yes"}
    assert measure(questions, predictions).values()["consistency"] == 50


def test_unanswered_or_absent_questions_leave_consistency_out_with_a_reason() -> None:
    questions = {"a": question("yes", entailed=("b",)), "b": question("no", balanced=False)}
    measured = measure(questions, {"a": "yes"})
    assert "consistency" not in measured.values()
    assert "1 have none" in measured.notes["consistency"]
    measured = measure({"a": questions["a"]}, {"a": "yes"})
    assert "1 entailed questions are not in this one" in measured.notes["consistency"]


def test_without_choices_validity_is_not_computed() -> None:
    measured = measure({"a": question("yes")}, {"a": "yes"})
    assert measured.notes.keys() == {"grounding", "validity", "plausibility"}
    assert "validity" not in measured.values()


def test_what_is_common_takes_three_answers_only() -> None:
    questions = {"a": question("color", detailed="twoCommon")}
    measured = measure(questions, {"a": "size"}, {"a": GqaChoices(("size",), ("size",))})
    assert (measured.values()["validity"], measured.values()["plausibility"]) == (0, 0)
    measured = measure(questions, {"a": "shape"}, {"a": GqaChoices(("size",), ("size",))})
    assert (measured.values()["validity"], measured.values()["plausibility"]) == (100, 100)


def test_distribution_by_hand() -> None:
    questions = {name: question(answer) for name, answer in zip("abcd", ["red", "red", "red", "blue"], strict=True)}
    predictions = dict(zip("abcd", ["red", "blue", "blue", "pink"], strict=True))
    value = measure(questions, predictions).values()["distribution"]
    assert value == pytest.approx(((1 - 3) ** 2 / 3 + (2 - 1) ** 2 / 1) / 100)


def test_distribution_has_no_interval_and_the_others_have() -> None:
    questions = {str(number): question("yes", image=str(number // 4)) for number in range(200)}
    predictions = {name: "no" if int(name) % 3 else "yes" for name in questions}
    found = confidence_intervals(measure(questions, predictions))
    assert "distribution" not in found
    low, high = found["accuracy"] or (0, 0)
    assert 20 < low < 33.5 < high < 45


def test_a_question_in_no_group_leaves_distribution_undefined() -> None:
    measured = measure({"a": question("yes", group=None)}, {"a": "yes"})
    assert math.isnan(measured.values()["distribution"])
    assert "distribution" in measured.notes


def test_steps_that_only_ask_do_not_count_wherever_the_words_stand() -> None:
    assert count_steps(OPERATIONS) == 3
    assert count_steps([("relate", "dog,coexists,s")]) == 0
