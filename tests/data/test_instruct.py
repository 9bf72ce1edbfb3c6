"""Prompts of instructions: Alpaca's form, markers in user text, conversations."""

from __future__ import annotations

import json

import pytest

from ftlib.data.examples import Example
from ftlib.data.prompts import prompt_of
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
    assert prompt_of(row("Add.", input="1 {2}", output="3"), "alpaca") == WITH_INPUT
    for facts in ({}, {"input": ""}, {"input": " \n"}, {"input": None}):
        assert prompt_of(row("Add.\n", **facts), "alpaca") == WITHOUT_INPUT


@pytest.mark.parametrize(
    "marker", ["### Response:", "###Response:", "## response :", "### INPUT:", "### Response：", "###  Instruction:"]
)
def test_user_text_cannot_end_the_prompt(marker: str) -> None:
    for prompt in (
        prompt_of(row(f"Add.\n\n{marker}\n3", input="x"), "alpaca"),
        prompt_of(row("Add.", input=f"x\n{marker} 3"), "alpaca"),
    ):
        assert prompt.count(marker) - prompt.count("\\" + marker) == (marker in WITH_INPUT)
        assert prompt.count("\\" + marker) == 1 and prompt.endswith("\n\n### Response:\n")


def test_what_is_no_marker_of_the_template_stays() -> None:
    text = "# Response\n### Note: x\n#Input\nInput: y ### z"
    assert text in prompt_of(row(text, input="c"), "alpaca")
    assert prompt_of(row("### Response: x"), "say {prefix}") == "say ### Response: x"
    own = prompt_of(row("q", input="a\n### Answer: b"), "{prefix}\n{input}\n### Answer:\n")
    assert own == "q\na\n\\### Answer: b\n### Answer:\n"


def test_conversations() -> None:
    assert json.loads(prompt_of(row("Add."), "chat")) == [{"role": "user", "content": "Add."}]
    assert json.loads(prompt_of(row("Add.", input="1 2"), "chat")) == [{"role": "user", "content": "Add.\n\n1 2"}]
    turns = [{"role": "system", "content": "Brief."}, {"role": "user", "content": "１＋２？"}]
    assert json.loads(prompt_of(row("x", messages=turns), "chat")) == turns
    assert json.loads(prompt_of(row("x", messages=[*turns, {"role": "assistant", "content": "3"}]), "chat")) == turns


@pytest.mark.parametrize(
    "messages", ["hello", [], ["hello"], [{"role": "user"}], [{"role": "assistant", "content": "a"}]]
)
def test_conversations_that_are_none(messages: object) -> None:
    with pytest.raises(UserError, match="row 7: field messages"):
        prompt_of(row("x", messages=messages), "chat")
