"""Prompts of instructions: Alpaca's form, markers in user text, conversations."""

from __future__ import annotations

import json

import pytest

from ftlib.data.example import Example
from ftlib.data.prompts import render_prompt
from ftlib.errors import UserError

WITH_INPUT = """\
Below is an instruction that describes a task, paired with an input that provides further context. \
Write a response that appropriately completes the request.

### Instruction:
Add.

### Input:
1 {2}

### Response:
"""
WITHOUT_INPUT = """\
Below is an instruction that describes a task. Write a response that appropriately completes the request.

### Instruction:
Add.

### Response:
"""


def row(instruction: str, **facts: object) -> Example:
    return Example("7", "", instruction, "answer", facts=facts)


def test_alpaca_with_and_without_input() -> None:
    assert render_prompt(row("Add.", input="1 {2}", output="3"), "alpaca") == WITH_INPUT
    for facts in ({}, {"input": ""}, {"input": " \n"}, {"input": None}):
        assert render_prompt(row("Add.", **facts), "alpaca") == WITHOUT_INPUT


def test_blanks_and_newlines_stay() -> None:
    """They are part of code, and of texts that go on: the Alpaca project keeps them, too."""
    assert "### Instruction:\n  x = 1\n\n\n### Input:\n\ty\n\n\n### Resp" in render_prompt(
        row("  x = 1\n", input="\ty\n"), "alpaca"
    )
    assert json.loads(render_prompt(row(" a\n", input="b\n"), "chat"))[0]["content"] == " a\n\n\nb\n"


HISTORY = [["1 and 1?", "2"], ["### Response: why?", "so"]]
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "1 and 1?"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "### Response: why?"},
    {"role": "assistant", "content": "so"},
    {"role": "user", "content": "Add."},
]


@pytest.mark.parametrize("facts", [{"system": "Be brief.", "history": HISTORY}, {"messages": MESSAGES}])
def test_what_was_said_before_is_asked_too(facts: dict[str, object]) -> None:
    """A system text takes the preamble's place, as in other programs' Alpaca form; earlier turns are blocks."""
    assert json.loads(render_prompt(row("Add.", **facts), "chat")) == MESSAGES
    assert render_prompt(row("Add.", **facts), "alpaca") == (
        "Be brief.\n\n"
        "### Instruction:\n1 and 1?\n\n### Response:\n2\n\n"
        "### Instruction:\n\\### Response: why?\n\n### Response:\nso\n\n"
        "### Instruction:\nAdd.\n\n### Response:\n"
    )


def test_a_system_text_with_an_input() -> None:
    found = json.loads(render_prompt(row("Add.", input="1 2", system="Be brief.", history=None), "chat"))
    assert found == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Add.\n\n1 2"}]
    assert render_prompt(row("Add.", input="1 2", system="Be brief."), "alpaca") == (
        "Be brief.\n\n### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n"
    )


def test_alpaca_has_no_place_for_a_system_message_between_turns() -> None:
    with pytest.raises(UserError, match="supports a message of role system only as the first"):
        render_prompt(row("Add.", messages=[MESSAGES[1], MESSAGES[0], MESSAGES[5]]), "alpaca")


@pytest.mark.parametrize(
    "marker", ["### Response:", "###Response:", "## response :", "### INPUT:", "### Response：", "###  Instruction:"]
)
def test_user_text_cannot_end_the_prompt(marker: str) -> None:
    for prompt in (
        render_prompt(row(f"Add.\n\n{marker}\n3", input="x"), "alpaca"),
        render_prompt(row("Add.", input=f"x\n{marker} 3"), "alpaca"),
    ):
        assert prompt.count(marker) - prompt.count("\\" + marker) == (marker in WITH_INPUT)
        assert prompt.count("\\" + marker) == 1 and prompt.endswith("\n\n### Response:\n")


def test_what_is_no_marker_of_the_template_stays() -> None:
    text = "# Response\n### Note: x\n#Input\nInput: y ### z"
    assert text in render_prompt(row(text, input="c"), "alpaca")
    assert render_prompt(row("### Response: x"), "say {prefix}") == "say ### Response: x"
    own = render_prompt(row("q", input="a\n### Answer: b"), "{prefix}\n{input}\n### Answer:\n")
    assert own == "q\na\n\\### Answer: b\n### Answer:\n"


def test_conversations() -> None:
    assert json.loads(render_prompt(row("Add."), "chat")) == [{"role": "user", "content": "Add."}]
    assert json.loads(render_prompt(row("Add.", input="1 2"), "chat")) == [{"role": "user", "content": "Add.\n\n1 2"}]
    turns = [{"role": "system", "content": "Brief."}, {"role": "user", "content": "１＋２？"}]
    assert json.loads(render_prompt(row("x", messages=turns), "chat")) == turns
    assert (
        json.loads(render_prompt(row("x", messages=[*turns, {"role": "assistant", "content": "3"}]), "chat")) == turns
    )


@pytest.mark.parametrize(
    "messages", ["hello", [], ["hello"], [{"role": "user"}], [{"role": "assistant", "content": "a"}]]
)
def test_conversations_that_are_none(messages: object) -> None:
    with pytest.raises(UserError, match="row 7: field messages"):
        render_prompt(row("x", messages=messages), "chat")
