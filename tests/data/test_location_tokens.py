"""Boxes as PaliGemma's location tokens, and back."""

from __future__ import annotations

import random

import pytest

from ftlib.data.location_tokens import LocatedObject, format_objects, parse_objects, to_fractions, to_pixels


def test_order_and_form() -> None:
    cat = LocatedObject((0.25, 0.5, 0.75, 1.0), "cat")
    assert format_objects([cat]) == "<loc0512><loc0256><loc1023><loc0767> cat"
    assert (
        format_objects([cat, LocatedObject((0, 0, 1, 1), "")])
        == format_objects([cat]) + " ; <loc0000><loc0000><loc1023><loc1023>"
    )
    assert format_objects([]) == ""


def test_the_number_is_the_nearest_one_and_stays_in_the_image() -> None:
    """As big_vision: round(v * 1023), clipped to 0…1023."""
    assert (
        format_objects([LocatedObject((0.4 / 1023, 0.6 / 1023, 1.2, 99), "x")])
        == "<loc0001><loc0000><loc1023><loc1023> x"
    )
    assert format_objects([LocatedObject((-3, -0.01, 0.5, 0.5), "x")]) == "<loc0000><loc0000><loc0512><loc0512> x"
    assert format_objects([LocatedObject((0, 0, 1, 1), "x")], divisor=1024) == "<loc0000><loc0000><loc1023><loc1023> x"


@pytest.mark.parametrize("divisor", [1023, 1024])
def test_what_was_read_is_written_again(divisor: int) -> None:
    draw = random.Random(0)
    for _ in range(500):
        (top, bottom), (left, right) = (sorted(draw.sample(range(1024), 2)) for _ in range(2))
        mask = "".join(f"<seg{draw.randrange(128):03d}>" for _ in range(draw.choice([0, 16])))
        text = f"<loc{top:04d}><loc{left:04d}><loc{bottom:04d}><loc{right:04d}>{mask} a cat"
        text += " ; <loc0000><loc0000><loc1023><loc1023> 猫"
        parsed = parse_objects(text, divisor)
        assert parsed.unreadable == 0
        assert format_objects(parsed.objects, divisor) == text


@pytest.mark.parametrize("divisor", [1023, 1024])
def test_a_box_comes_back_within_a_token(divisor: int) -> None:
    draw = random.Random(1)
    for _ in range(500):
        left, top = draw.random() * 0.9, draw.random() * 0.9
        box = (left, top, left + 0.01 + draw.random() * (0.99 - left), top + 0.01 + draw.random() * (0.99 - top))
        (found,) = parse_objects(format_objects([LocatedObject(box, "x")], divisor), divisor).objects
        assert found.box == pytest.approx(box, abs=1 / divisor)


def test_corners() -> None:
    (whole,) = parse_objects("<loc0000><loc0000><loc1023><loc1023> all").objects
    assert whole.box == (0, 0, 1, 1)
    (first,) = parse_objects("<loc0000><loc0000><loc0001><loc0002> one").objects
    assert first.box == (0, 0, 2 / 1023, 1 / 1023)


def test_pixels() -> None:
    box = (10.0, 20.0, 50.0, 60.0)
    assert to_fractions(box, 100, 200) == (0.1, 0.1, 0.5, 0.3)
    assert to_pixels(to_fractions(box, 100, 200), 100, 200) == pytest.approx(box)


@pytest.mark.parametrize(
    "fragment",
    [
        "cat",
        "<loc0001><loc0001><loc0005> cat",
        "<loc0001><loc0001><loc0005><loc0005><loc0006> cat",
        "<loc0001><loc0001><loc0005><loc1024> cat",
        "<loc0001><loc0001><loc1024><loc0005> cat",
        "<loc001><loc0001><loc0005><loc0005> cat",
        "<loc0005><loc0001><loc0005><loc0005> cat",
        "<loc0001><loc0009><loc0005><loc0005> cat",
        "<loc0001><loc0001><loc0005><loc0005>" + "<seg001>" * 15,
        "<loc0001><loc0001><loc0005><loc0005>" + "<seg001>" * 17,
        "<loc0001><loc0001><loc0005><loc0005>" + "<seg128>" * 16,
        "a <loc0001><loc0001><loc0005><loc0005> cat",
        "<loc0001><loc0001><loc0005><loc0005> cat <loc0001>",
        "<loc٠٠٠١><loc0001><loc0005><loc0005> cat",
    ],
)
def test_what_is_no_object_is_counted(fragment: str) -> None:
    good = "<loc0001><loc0002><loc0003><loc0004> cat"
    for text in (f"{good} ; {fragment}", f"{fragment};{good}"):
        parsed = parse_objects(text)
        assert parsed.unreadable == 1
        assert parsed.objects == [LocatedObject((2 / 1023, 1 / 1023, 4 / 1023, 3 / 1023), "cat")]


def test_nothing_and_loose_spacing() -> None:
    assert (parse_objects("").objects, parse_objects(" ; ").unreadable) == ([], 0)
    parsed = parse_objects("  <loc0001><loc0002><loc0003><loc0004>a big cat \n;<loc0001><loc0002><loc0003><loc0004>; ")
    assert [one.label for one in parsed.objects] == ["a big cat", ""]


def test_mask_codes() -> None:
    codes = tuple(range(112, 128))
    text = format_objects([LocatedObject((0, 0, 0.5, 0.5), "dog", codes)])
    assert text == "<loc0000><loc0000><loc0512><loc0512>" + "".join(f"<seg{n}>" for n in codes) + " dog"
    assert parse_objects(text).objects[0].mask == codes


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (LocatedObject((0, 0, 1, 1), "a;b"), "label 'a;b'"),
        (LocatedObject((0, 0, 1, 1), "a <loc0001>"), "label 'a <loc0001>'"),
        (LocatedObject((0, 0, 1, 1), "a>"), "label"),
        (LocatedObject((0, 0, 1, 1), " a"), "whitespace around it"),
        (LocatedObject((0, 0, 1, 1), "a\u3000"), "whitespace around it"),
        (LocatedObject((0, 0, 1, 1), "a", (1, 2)), "mask codes must be 16"),
        (LocatedObject((0, 0, 1, 1), "a", (128,) * 16), "mask codes"),
        (LocatedObject((0, 0, 1, 1), "a", (-1,) * 16), "mask codes"),
        (LocatedObject((0.5, 0, 0.5, 1), "a"), "x_min < x_max"),
        (LocatedObject((0, 0.6, 1, 0.5), "a"), "y_min < y_max"),
        (LocatedObject((1.1, 0, 1.2, 1), "a"), "inside the image"),
        (LocatedObject((0, -2, 1, -1), "a"), "inside the image"),
        (LocatedObject((0, float("nan"), 1, 1), "a"), "inside the image"),
    ],
)
def test_what_could_not_be_read_again_is_not_written(wrong: LocatedObject, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        format_objects([wrong])


@pytest.mark.parametrize("divisor", [1023, 1024])
@pytest.mark.parametrize("place", [0.0, 0.25, 0.5004, 0.9998])
def test_a_box_narrower_than_a_token_keeps_an_extent(place: float, divisor: int) -> None:
    (found,) = parse_objects(
        format_objects([LocatedObject((place, place, place + 1e-4, 1), "thin")], divisor), divisor
    ).objects
    assert found.box[2] - found.box[0] == pytest.approx(1 / divisor)
    assert found.box[0] == pytest.approx(place, abs=2 / divisor)


def test_objects_of_every_kind_come_back_in_order() -> None:
    labels = ["cat", "", "Straßenbahn", "猫 と 犬", "قطة", "a, b & c: 1|2", "😀"]
    draw = random.Random(2)
    objects = []
    for label in labels:
        (top, bottom), (left, right) = (sorted(draw.sample(range(1024), 2)) for _ in range(2))
        mask = tuple(draw.randrange(128) for _ in range(draw.choice([0, 16])))
        objects.append(LocatedObject((left / 1023, top / 1023, right / 1023, bottom / 1023), label, mask))
    parsed = parse_objects(format_objects(objects))
    assert (parsed.objects, parsed.unreadable) == (objects, 0)
