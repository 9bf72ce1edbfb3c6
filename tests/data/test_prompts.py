"""Prompt templates."""

from typing import Any

import pytest

from ftlib.data.example import Example
from ftlib.data.prompts import hides_context, prompt_checker, render, render_prompt
from ftlib.errors import UserError


def test_fields_are_filled_and_their_braces_left_alone() -> None:
    assert render("answer en {question} {{x}}", {"question": "what is {this}?"}) == "answer en what is {this}? {x}"


@pytest.mark.parametrize("template", ["{", "{a.b}", "{a!r}", "{a:>5}", "{0}", "{}"])
def test_only_plain_names_in_braces(template: str) -> None:
    with pytest.raises(UserError):
        render(template, {"a": "x", "0": "x"})


def test_unknown_fields_are_named() -> None:
    with pytest.raises(UserError, match="names question, but the rows only have: prefix"):
        render("{question}", {"prefix": "x"})


def row(image: str, suffix: str = "a", **facts: Any) -> Example:
    return Example("7", image, "q", suffix, facts=facts)


def test_numbers_are_asked_as_their_text() -> None:
    facts: dict[str, Any] = {"n": 3, "x": 0.5, "t": "three"}
    assert render_prompt(row("i.png", **facts), "{prefix}: {n} {x} {t}") == "q: 3 0.5 three"
    assert prompt_checker("{prefix}: {n} {x} {t}")(row("i.png", **facts)) == ""


@pytest.mark.parametrize("value", [True, None, ["ocr"], {"a": 1}, float("nan"), float("inf")])
def test_what_is_no_text_is_not_asked(value: Any) -> None:
    assert prompt_checker("{prefix} {ocr}")(row("i.png", ocr=value)).startswith("field ocr: data.prompt uses it")
    assert (
        prompt_checker("{prefix} {ocr}")(row("i.png"))
        == "field ocr: is missing, but data.prompt uses it; available: prefix"
    )
    assert prompt_checker("{prefix}")(row("i.png", ocr=value)) == ""


@pytest.mark.parametrize("marker", ["<image>", "<video>", "<audio>"])
def test_an_images_marker_is_not_learned_as_text(marker: str) -> None:
    def fault(prompt: str, *, prefix: str = "q", **fields: Any) -> str:
        return prompt_checker(prompt)(Example("7", "i.png", prefix, fields.pop("suffix", "a"), facts=fields))

    told = f"{marker} would be trained on as text; remove it: the image is always shown"
    assert fault("{prefix}", prefix=f"{marker}\nwhat?") == f"field prefix: {told}"
    assert fault("{prefix}", suffix=f"a {marker}") == f"field suffix: {told}"
    assert fault("{prefix} {ocr}", ocr=marker) == f"field ocr: {told}"
    assert fault(f"{marker} {{prefix}}") == f"field data.prompt: {told}"
    assert fault("{prefix}", ocr=marker) == "", "a field that is not asked"
    assert prompt_checker("{prefix}")(Example("7", "", f"What is {marker} in HTML?", "a")) == "", "a text about it"


SAID = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "q"}]


@pytest.mark.parametrize(
    ("prompt", "facts", "fault"),
    [
        ("{prefix}", {"input": "c"}, ""),
        ("{prefix} {input}", {"input": "c"}, ""),
        ("{prefix} {context}", {"input": "c", "context": "c"}, ""),
        ("{prefix}", {"input": " "}, ""),
        ("{prefix}", {"system": "s"}, "system prompt: not shown by data.prompt"),
        ("{system} {prefix}", {"system": "s"}, ""),
        (
            "{system} {prefix}",
            {"system": "s", "history": [["a", "b"]]},
            "earlier turns of the conversation: not shown by data.prompt",
        ),
        ("{prefix}", {"messages": SAID}, "earlier turns of the conversation: not shown by data.prompt"),
        ("{prefix}", {"messages": SAID[2:]}, ""),
        ("{prefix}", {"history": "x"}, "row 7: field history: must be a list of [question, answer] pairs"),
        ("alpaca", {"history": "x"}, "row 7: field history: must be a list of [question, answer] pairs"),
        ("chat", {"history": [["a", 3]]}, "row 7: field history: must be a list of [question, answer] pairs"),
        ("chat", {"messages": [3]}, "row 7: field messages: must be a list"),
        ("chat", {"messages": SAID, "input": ""}, ""),
        ("alpaca", {"system": "s", "history": [["a", "b"]], "input": "c"}, ""),
    ],
)
def test_no_part_of_an_instruction_is_left_out_unseen(prompt: str, facts: dict[str, Any], fault: str) -> None:
    found = prompt_checker(prompt)(row("", **facts))
    assert found.startswith(fault) and bool(found) == bool(fault)


def test_an_input_that_is_not_shown() -> None:
    """That may be meant, so it is told and not refused."""
    assert hides_context("{prefix}", row("", input="c"))
    assert not hides_context("{prefix}", row("", input=" ")) and not hides_context("{prefix}", row("i.png", input="c"))
    for prompt in ("alpaca", "chat", "{prefix} {input}", "{context} {prefix}"):
        assert not hides_context(prompt, row("", input="c", context="c"))
