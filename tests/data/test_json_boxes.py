"""Boxes as JSON: what is written is read again, what a model writes is read as far as it is whole."""

from __future__ import annotations

from typing import Any

import pytest

from ftlib.data.example import Example, InvalidRecord
from ftlib.data.json_boxes import box_writer, format_json_objects, json_object_spans, parse_json_objects
from ftlib.data.location_tokens import LocatedObject, format_objects, to_fractions
from ftlib.tasks.detect import detection_results, score_detections, validate_detect_target
from ftlib.tasks.refer import score_referring, validate_refer_target

WIDTH, HEIGHT = 640, 480
BOXES = {"cat": (64.0, 48.0, 320.0, 240.0), 'a "big"; <dog>': (10.0, 20.0, 30.0, 470.0)}
OBJECTS = [LocatedObject(to_fractions(box, WIDTH, HEIGHT), label) for label, box in BOXES.items()]
CAT = format_objects(OBJECTS[:1])


def test_text_is_read_again() -> None:
    text = format_json_objects(OBJECTS, WIDTH, HEIGHT)
    assert text.startswith('[{"bbox_2d": [64, 48, 320, 240], "label": "cat"}, {"bbox_2d": [10, 20, 30, 470],')
    assert parse_json_objects(text, WIDTH, HEIGHT).objects == OBJECTS
    assert format_json_objects([LocatedObject((0.5, 0.5, 0.5001, 0.5001), "")], 1000, 1000) == (
        '[{"bbox_2d": [500, 500, 501, 501]}]'
    )


@pytest.mark.parametrize(
    ("text", "labels", "unreadable"),
    [
        (
            '```json\n[\n\t{"bbox_2d": [1, 2, 3, 4], "label": "a"},\n\t{"bbox_2d": [5, 6, 7, 8], "label": "b"}\n]\n```',
            "ab",
            0,
        ),
        ('{"bbox_2d": [1.5, 2, 3, 4], "label": "a"}', "a", 0),
        ('[{"bbox_2d": [1, 2, 3, 4], "label": "a"}, {"bbox_2d": [1, 2', "a", 1),
        ('[{"bbox_2d": [3, 2, 1, 4], "label": "a"}, {"bbox_2d": [1, 2, 3], "label": "b"}, {"point": [1, 2]}]', "", 3),
        ('[{"bbox_2d": [1, 2, 3, NaN], "label": "a"}, {"bbox_2d": [1, 2, 3, 4], "label": 3}]', "", 2),
        (
            f'[{{"bbox_2d": [1, 2, 3, {"9" * 400}], "label": "a"}}, {{"bbox_2d": [1, 2, 3, 1e300], "label": "b"}}]',
            "",
            2,
        ),
        ('[{"bbox_2d": [1, 2, 3, 4], "label": "a\\ud83d"}]', "a?", 0),
        ("there is no cat", "", 1),
        ("[]", "", 0),
        ("```json\n[]\n```", "", 0),
        ("", "", 0),
        ("{" * 5000, "", 1),
        ('{"a":' * 50_000, "", 1),
    ],
)
def test_what_models_write(text: str, labels: str, unreadable: int) -> None:
    json_object_spans(text)
    found = parse_json_objects(text, 1000, 1000)
    assert "".join(one.label for one in found.objects) == labels and found.unreadable == unreadable


def row(form: str, suffix: str = CAT, **facts: Any) -> Example:
    written = box_writer(form)(
        Example("1", "1.png", "detect cat", suffix, facts={"width": WIDTH, "height": HEIGHT, **facts})
    )
    assert isinstance(written, Example)
    return written


@pytest.mark.parametrize(
    ("form", "numbers"), [("json_pixels", [64, 48, 320, 240]), ("json_1000", [100, 100, 500, 500])]
)
def test_location_tokens_become_json_and_score_alike(form: str, numbers: list[int]) -> None:
    cat = {"label": "cat", "box": list(BOXES["cat"])}
    made = row(form, objects=[cat])
    assert made.suffix == f'[{{"bbox_2d": {numbers}, "label": "cat"}}]'
    assert validate_detect_target(made) == ""
    record = {"id": "1", "image": "1.png", "references": [made.suffix], "prediction": made.suffix, "facts": made.facts}
    assert score_detections([record]).values()["AP"] == pytest.approx(1)
    (result,) = detection_results([record]) or []
    assert result["bbox"] == pytest.approx([64, 48, 256, 192], abs=0.5)
    without = {**record, "facts": {name: value for name, value in made.facts.items() if name != "objects"}}
    assert score_detections([without]).values()["AP"] == pytest.approx(1)
    # the other form's numbers are another box
    other = row("json_1000" if form == "json_pixels" else "json_pixels").facts
    assert score_detections([{**record, "facts": {**other, "objects": [cat]}}]).values()["AP"] < 0.5
    referred = row(form, box=list(BOXES["cat"]))
    assert validate_refer_target(referred) == ""
    assert score_referring([{**record, "facts": referred.facts}]).values()["accuracy@.5"] == 1


def test_what_cannot_be_trained_on() -> None:
    assert row("json_1000", "").suffix == "[]"
    assert "1 of its objects cannot be read as [{" in validate_detect_target(row("json_1000", "a cat"))
    assert "no label" in validate_detect_target(row("json_1000", '[{"bbox_2d": [1, 2, 3, 4]}]'))
    assert "must be one box" in validate_refer_target(row("json_1000", "[]"))
    assert "has no such box" in validate_detect_target(
        row(
            "json_pixels",
            '[{"bbox_2d": [1, 2, 3, 4], "label": "cat"}]',
            objects=[{"label": "cat", "box": [64, 48, 320, 240]}],
        )
    )
    for form, box in (("json_1000", [100, 100, 640, 1100]), ("json_pixels", [100, 100, 500, 600])):
        beyond = row(form, f'[{{"bbox_2d": {box}, "label": "cat"}}]')
        for validate in (validate_detect_target, validate_refer_target):
            assert "object 1: its box is outside of the image (box_format: " + form in validate(beyond)
    assert not validate_detect_target(row("json_pixels", '[{"bbox_2d": [0, 0, 641, 482], "label": "cat"}]'))
    unsized = box_writer("json_pixels")(Example("1", "1.png", "detect cat", CAT))
    assert isinstance(unsized, InvalidRecord) and "width and height" in unsized.reason
