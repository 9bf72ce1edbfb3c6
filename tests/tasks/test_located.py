"""Rows of detect, refer and segment: official numbers from generated text, faults named."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ftlib.data.location_tokens import LocatedObject, format_objects, to_fractions
from ftlib.data.sources import coco_detection
from ftlib.errors import UserError
from ftlib.metrics.segmentation import from_pixels, write_mask
from ftlib.tasks.registry import load_task

LABELS = ["cat", "dog", "traffic light"]
NAMES = {"cat": 17, "dog": 18, "traffic light": 10}


def pixel_box(draw: random.Random, width: int, height: int) -> tuple[float, ...]:
    left, right = sorted(draw.sample(range(width), 2))
    top, bottom = sorted(draw.sample(range(height), 2))
    return (left, top, right, bottom)


def record(number: int, draw: random.Random, width: int, height: int) -> dict[str, Any]:
    """A row whose answer repeats some objects a little off, and adds others."""
    objects = [(draw.choice(LABELS), pixel_box(draw, width, height)) for _ in range(draw.randint(1, 4))]
    answered = [
        (label, tuple(edge + draw.uniform(-3, 3) for edge in box)) if draw.random() < 0.7
        else (draw.choice(LABELS), pixel_box(draw, width, height))
        for label, box in objects
    ]  # fmt: skip
    answered = [(label, box) for label, box in answered if box[2] - box[0] > 1 and box[3] - box[1] > 1]
    texts = [
        format_objects([LocatedObject(to_fractions(box, width, height), label) for label, box in boxes])
        for boxes in (objects, answered)
    ]
    listed = [{"label": label, "box": list(box), "category_id": NAMES[label]} for label, box in objects]
    facts = {"width": width, "height": height, "image_id": 100 + number, "objects": listed}
    return {
        "id": str(number), "image": f"{number}.png", "prompt": "detect", "prediction": texts[1],
        "references": [texts[0]], "facts": facts,
    }  # fmt: skip


@pytest.fixture
def records() -> list[dict[str, Any]]:
    draw = random.Random(0)
    return [record(number, draw, draw.randint(60, 500), draw.randint(60, 500)) for number in range(30)]


def instances(records: list[dict[str, Any]]) -> dict[str, Any]:
    """The same rows as COCO's release file."""
    content: dict[str, Any] = {"images": [], "annotations": []}
    content["categories"] = [{"id": number, "name": name} for name, number in NAMES.items()]
    for one in records:
        facts = one["facts"]
        content["images"].append({"id": facts["image_id"], "width": facts["width"], "height": facts["height"]})
        for entry in facts["objects"]:
            left, top, right, bottom = entry["box"]
            content["annotations"].append(
                {
                    "id": len(content["annotations"]) + 1,
                    "image_id": facts["image_id"],
                    "category_id": entry["category_id"],
                    "bbox": [left, top, right - left, bottom - top],
                    "area": (right - left) * (bottom - top),
                    "iscrowd": 0,
                }
            )
    return content


def test_generated_boxes_score_as_pycocotools_scores_them(records: list[dict[str, Any]], tmp_path: Path) -> None:
    """By way of the result file that the challenge takes."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    found = load_task("detect").score(records, [], None)
    (tmp_path / "instances.json").write_text(json.dumps(instances(records)))
    submission = load_task("detect").submission
    assert submission
    (tmp_path / "results.json").write_text(json.dumps(submission(records)))
    truth = COCO(str(tmp_path / "instances.json"))
    evaluation = COCOeval(truth, truth.loadRes(str(tmp_path / "results.json")), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    names = ["AP", "AP50", "AP75", "AP: small", "AP: medium", "AP: large", "AR-1", "AR-10", "AR-100"]
    values = found.values()
    assert [values[name] for name in names] == pytest.approx(evaluation.stats[:9], abs=2e-3)
    assert 0.2 < values["AP50"] < 0.9
    assert found.invalid == 0 and found.n == 30
    official = coco_detection.score([tmp_path / "instances.json"], tmp_path / "results.json").values()
    assert official == pytest.approx(values, abs=2e-3, nan_ok=True)


def test_what_is_named_first_counts_as_surest() -> None:
    box, other = LocatedObject((0, 0, 0.5, 0.5), "cat"), LocatedObject((0.5, 0.5, 1, 1), "cat")
    row = {"id": "1", "image": "a", "references": [format_objects([box])]}
    first = load_task("detect").score([{**row, "prediction": format_objects([box, other])}], [], None)
    last = load_task("detect").score([{**row, "prediction": format_objects([other, box])}], [], None)
    assert (first.values()["AP"], last.values()["AP"]) == pytest.approx((1.0, 0.5))
    assert "order of mention" in first.rule


def test_boxes_are_ranked_by_their_scores() -> None:
    """Across images, too; the ranking by order of mention stays visible, and is the only one without scores."""
    box, other = LocatedObject((0, 0, 0.5, 0.5), "cat"), LocatedObject((0.5, 0.5, 1, 1), "cat")
    truth, answer = format_objects([box]), format_objects([other, box])
    rows = [
        {"id": image, "image": image, "references": [truth], "prediction": answer, "box_scores": scores}
        for image, scores in (("a", [0.1, 0.8]), ("b", [0.2, 0.7]))
    ]
    task = load_task("detect")
    scored, plain = (task.score(each, [], None) for each in (rows, [{**row, "box_scores": [0.5]} for row in rows]))
    assert scored.values()["AP"] == pytest.approx(1.0) and "token probability" in scored.rule
    assert scored.values()["order of mention: AP"] == plain.values()["AP"] == pytest.approx(0.5)
    assert "order of mention" in plain.rule and not any(name.startswith("order") for name in plain.values())
    sized = [{**row, "facts": {"width": 10, "height": 10}} for row in rows]
    assert task.submission
    assert [one["score"] for one in task.submission(sized)] == [0.1, 0.8, 0.2, 0.7]


def test_scores_come_from_the_tokens_of_each_object() -> None:
    """Label times geometric mean of the location tokens; separators, ends and unreadable fragments do not count."""
    box = "<loc0100><loc0200><loc0300><loc0400>"
    pieces = [*(f"<loc0{number}00>" for number in (1, 2, 3, 4)), " traffic", " light", " ;", " <loc0000>", " ;"]
    pieces += [" ", *(f"<loc0{number}00>" for number in (1, 2, 3, 4)), " c", "at", ""]
    text = "".join(pieces)
    assert text == f"{box} traffic light ; <loc0000> ; {box} cat"
    shares = [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.01, 0.01, 0.01, 0.01, 0.5, 0.5, 0.5, 0.5, 0.3, 0.2, 0.01]
    ends = np.cumsum([len(piece) for piece in pieces]).tolist()
    logprobs = np.log(shares).tolist()
    load = load_task("detect").answer_fields
    assert load
    expected = [(0.9 * 0.8 * 0.7 * 0.6) ** 0.25 * 0.5 * 0.4, 0.5 * 0.3 * 0.2]
    assert load(text, ends, logprobs) == {"box_scores": pytest.approx(expected)}
    assert load("", [0], [-0.1]) == {"box_scores": []} and load(text, ends[:-3], logprobs[:-3]) == {}


def test_scores_of_boxes_in_json() -> None:
    """Of the tokens of the numbers and of the label; a token may hold more than that."""
    pieces = [
        '[{"',
        "bbox",
        '_2d":',
        " [",
        "1",
        ", 2,",
        " 30",
        ", 40",
        "],",
        ' "label": "',
        "traffic",
        " light",
        '"}, ',
    ]
    pieces += ['{"bbox_2d": [5, 5, 5, 5], "label": "no area"}, ', '{"bbox_2d": [', "1, 2, 3, 4", "]}", "]"]
    shares = [0.9, 0.9, 0.9, 0.9, 0.5, 0.6, 0.7, 0.8, 0.9, 0.9, 0.4, 0.3, 0.9, 0.1, 0.9, 0.2, 0.9, 0.9]
    text, ends = "".join(pieces), np.cumsum([len(piece) for piece in pieces]).tolist()
    load = load_task("detect").answer_fields
    assert load
    found = load(text, ends, np.log(shares).tolist())
    assert found == {"box_scores": pytest.approx([(0.5 * 0.6 * 0.7 * 0.8) ** 0.25 * 0.4 * 0.3, 0.2])}
    facts = {"box_format": "json_1000", "width": 100, "height": 100}
    row = {"id": "1", "image": "a", "references": ['[{"bbox_2d": [1, 2, 30, 40], "label": "cat"}]'], "facts": facts}
    task = load_task("detect")
    answer = '[{"bbox_2d": [1, 2, 30, 40], "label": "cat"}]'
    scored = task.score([{**row, "prediction": answer, "box_scores": [0.5]}], [], None)
    assert scored.values()["AP"] == pytest.approx(1.0) and "token probability" in scored.rule
    other = format_objects([LocatedObject((0, 0, 0.5, 0.5), "cat")])
    wrong = task.score([{**row, "prediction": other, "box_scores": [0.5]}], [], None)
    assert wrong.values()["AP"] == 0 and "token probability" in wrong.rule, "boxes in another form are none"


def test_the_first_of_every_image_come_before_the_second_of_any() -> None:
    """Found, found, wrong: precision 1 up to full recall."""
    box, other = LocatedObject((0, 0, 0.5, 0.5), "cat"), LocatedObject((0.5, 0.5, 1, 1), "cat")
    rows = [
        {"id": image, "image": image, "references": [format_objects([box])], "prediction": format_objects(answer)}
        for image, answer in (("a", [box, other]), ("b", [box]))
    ]
    assert load_task("detect").score(rows, [], None).values()["AP"] == pytest.approx(1.0)


def test_without_sizes_boxes_come_from_the_expected_answer(records: list[dict[str, Any]]) -> None:
    bare = [{name: value for name, value in one.items() if name != "facts"} for one in records]
    found = load_task("detect").score(bare, [], None)
    whole = load_task("detect").score(records, [], None).values()
    assert found.values() == pytest.approx({name: whole[name] for name in found.values()}, abs=5e-3)
    assert set(whole) - set(found.values()) == set(found.notes)
    assert set(found.notes) == {f"{what}: {area}" for what in ("AP", "AR-100") for area in ("small", "medium", "large")}
    assert found.sample.values(np.ones((2, len(found.sample.groups))))["AP"].shape == (2,)
    submission = load_task("detect").submission
    assert submission and submission(bare) is None


def test_crowds_and_boxes_without_extent_are_nobodys_to_find() -> None:
    objects = [
        {"label": "cat", "box": [0, 0, 50, 50]},
        {"label": "cat", "box": [50, 50, 100, 100], "crowd": True, "area": 900.5},
        {"label": "dog", "box": [7, 7, 7, 9]},
    ]
    answer = format_objects([LocatedObject((0, 0, 0.5, 0.5), "cat"), LocatedObject((0.6, 0.6, 0.9, 0.9), "cat")])
    facts = {"width": 100, "height": 100, "objects": objects}
    row = {"id": "1", "image": "a", "references": [""], "prediction": answer, "facts": facts}
    values = load_task("detect").score([row], [], None).values()
    assert values["AP"] == pytest.approx(0.5), "all cats, and the dog cannot be found"


def test_rows_of_one_image_are_scored_together() -> None:
    box, other = LocatedObject((0, 0, 0.5, 0.5), "cat"), LocatedObject((0.5, 0.5, 1, 1), "dog")
    rows = [
        {"id": str(number), "image": "a", "references": [format_objects([one])], "prediction": format_objects([one])}
        for number, one in enumerate((box, other))
    ]
    found = load_task("detect").score(rows, [], None)
    assert (found.values()["AP"], found.n) == (pytest.approx(1.0), 1)


def test_answers_that_are_no_boxes_are_counted_and_cost() -> None:
    box = LocatedObject((0, 0, 0.5, 0.5), "cat")
    predictions = [
        format_objects([box]),
        f"{format_objects([box])} ; <loc0001>",
        format_objects([LocatedObject(box.box, "cats")]),
        "no cat",
        "",
    ]
    rows = [
        {"id": str(number), "image": str(number), "references": [format_objects([box])], "prediction": text}
        for number, text in enumerate(predictions)
    ]
    found = load_task("detect").score(rows, [], None)
    assert found.invalid == 3, "a torn box, an unknown label and a sentence; an empty answer names nothing"
    assert found.rows == [1, pytest.approx(2 / 3), 0, 0, 0]
    assert found.tables == {"unreadable fragments": 2, "unknown labels": {"cats": 1}}
    assert found.values()["AR-100"] == pytest.approx(0.4)


def test_a_row_that_names_an_object_twice_is_not_wholly_right() -> None:
    cat, dog = LocatedObject((0, 0, 0.5, 0.5), "cat"), LocatedObject((0, 0, 0.5, 0.5), "dog")
    row = {"id": "1", "image": "a", "references": [format_objects([cat, dog])]}
    for answer, score in (([dog, cat], 1), ([cat, cat], 1 / 2), ([cat], 2 / 3), ([cat, dog, dog], 4 / 5), ([], 0)):
        found = load_task("detect").score([{**row, "prediction": format_objects(answer)}], [], None)
        assert found.rows == [pytest.approx(score)]


@pytest.mark.parametrize(
    ("facts", "references", "message"),
    [
        ({}, ["a cat"], "row 7: needs an expected answer of boxes"),
        ({"objects": {}, "width": 3, "height": 3}, [""], "row 7: needs a list of objects"),
        ({"objects": []}, [""], "width and height"),
        ({"objects": [{"label": "a"}], "width": 3, "height": 3}, [""], 'objects with a "label" and a "box"'),
        ({"objects": [{"label": "a", "box": [3, 1, 2, 2]}], "width": 3, "height": 3}, [""], '"box"'),
        (
            {"objects": [{"label": "a", "box": [1, 1, 2, 2], "area": None}], "width": 3, "height": 3},
            [""],
            "square pixels",
        ),
        ({"objects": [{"label": 5, "box": [1, 1, 2, 2]}], "width": 3, "height": 3}, [""], '"label"'),
    ],
)
def test_rows_that_expect_no_boxes_are_named(facts: dict[str, Any], references: list[str], message: str) -> None:
    row = {"id": "7", "image": "a", "prediction": "", "references": references, "facts": facts}
    with pytest.raises(UserError, match=message):
        load_task("detect").score([row], [], None)


def test_a_referred_box_is_right_from_half_on() -> None:
    """The intersection of [0, 10] and [0, x] over their union is x / 10."""
    facts = {"width": 100, "height": 20, "box": [0, 0, 10, 20], "image_id": 5}
    rows = []
    for number, right in enumerate((10, 6, 4)):
        text = format_objects([LocatedObject(to_fractions((0, 0, right, 20), 100, 20), "")])
        rows.append({"id": str(number), "image": "a", "references": [], "prediction": text, "facts": facts})
    found = load_task("refer").score(rows, [], None)
    assert found.rows == [1, 1, 0] and found.invalid == 0
    assert list(found.sample.groups) == [(None, 5)], "of no dataset of a mixture, image 5"


def test_a_referred_box_from_the_expected_answer_and_answers_that_are_none() -> None:
    text = format_objects([LocatedObject((0.1, 0.1, 0.5, 0.5), "the left cat")])
    predictions = [text, f"{text} ; {text}", f"{text} ; nothing", "", "left", text.replace(" the left cat", "")]
    rows = [
        {"id": str(number), "image": "a", "references": [text], "prediction": one}
        for number, one in enumerate(predictions)
    ]
    found = load_task("refer").score(rows, [], None)
    assert (found.rows, found.invalid) == ([1, 0, 0, 0, 0, 1], 4)
    with pytest.raises(UserError, match="row 0: needs an expected answer of one box"):
        load_task("refer").score([{**rows[0], "references": ["two cats"]}], [], None)
    with pytest.raises(UserError, match=r"row 0: needs a box .*, width and height"):
        load_task("refer").score([{**rows[0], "facts": {"box": [0, 0, 1, 1]}}], [], None)


def test_masks() -> None:
    draw = np.random.default_rng(0)
    wanted, found = (draw.random((2, 9, 7)) < 0.5 for _ in range(2))
    rows = [
        {
            "id": str(number),
            "image": "a",
            "facts": {"mask": write_mask(from_pixels(wanted[number]))},
            "mask": write_mask(from_pixels(found[number])),
        }
        for number in range(2)
    ]
    rows.append({**rows[0], "id": "2", "mask": None})
    measured = load_task("segment").score(rows, [], None)
    overlap = [(a & b).sum() / (a | b).sum() for a, b in zip(wanted, found, strict=True)]
    assert measured.rows == pytest.approx([*overlap, 0])
    assert measured.invalid == 1
    with pytest.raises(UserError, match="row 0: field mask is missing"):
        load_task("segment").score([{**rows[0], "facts": {}}], [], None)
    with pytest.raises(UserError, match=r"row 0: .*size"):
        load_task("segment").score([{**rows[0], "facts": {"mask": {"counts": "x"}}}], [], None)
    with pytest.raises(UserError, match=r"evaluation\.mask_decoder"):
        load_task("segment").score([{"id": "0", "image": "a", "facts": rows[0]["facts"]}], [], None)
