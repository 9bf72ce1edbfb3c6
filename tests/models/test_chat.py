"""Chat templates: what is trained is what generation sees and what the template writes, token for token."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest

from ftlib.errors import UserError
from ftlib.models.causal_lm import CausalProcessor
from ftlib.models.tiny import tiny_tokenizer
from tests.models.chat_templates import KINDS, TEMPLATES, tokenizer_of

QUESTION = [{"role": "user", "content": "reverse 42"}]
CONVERSATION = [*QUESTION, {"role": "assistant", "content": "it is 24"}, {"role": "user", "content": "and so on?"}]
THOUGHT = "<think>\nthe answer is\n</think>\n\n42"


def inputs_of(kind: str, template: str, **arguments: Any) -> CausalProcessor:
    return CausalProcessor(tokenizer_of(kind, template), None, chat=True, chat_template_arguments=arguments)


def with_template(template: str, **arguments: Any) -> CausalProcessor:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return CausalProcessor(tokenizer, None, chat=True, chat_template_arguments=arguments)


def rendered(inputs: CausalProcessor, turns: Sequence[dict[str, str]], **arguments: Any) -> str:
    return str(inputs.tokenizer.apply_chat_template(list(turns), tokenize=False, **arguments))


def whole_ids(inputs: CausalProcessor, turns: Sequence[dict[str, str]], answer: str, **arguments: Any) -> list[int]:
    """What the template itself makes of a conversation, up to the end of its last turn."""
    text = rendered(inputs, [*turns, {"role": "assistant", "content": answer}], **arguments)
    ids: list[int] = inputs.tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids[: len(ids) - ids[::-1].index(inputs.eos_token_id)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("turns", [QUESTION, CONVERSATION])
@pytest.mark.parametrize("answer", ["42", "the answer is 24\n\nand so on", "  {42}", "é 十七"])
def test_a_trained_row_is_the_question_and_what_the_template_writes(
    kind: str, template: str, turns: list[dict[str, str]], answer: str
) -> None:
    fixed = {"date_string": "26 Jul 2024"} if template == "llama3.2" else {}
    inputs, prompt = inputs_of(kind, template), json.dumps(turns)
    row, (asked,) = inputs.encode_train(prompt, None, answer), inputs.encode_prompts([prompt], None)
    whole = whole_ids(inputs, turns, answer, **fixed)
    border = template == "qwen3-thinking" or answer.startswith(" ")  # white space may join the prompt's last token
    assert inputs.tokenizer.decode(row.input_ids) == inputs.tokenizer.decode(whole)
    assert row.input_ids == whole or border
    assert row.input_ids[: -row.n_labels] == asked.input_ids
    assert row.input_ids[-row.n_labels :] == inputs.encode_answer(answer)
    assert inputs.token_lengths([prompt], [answer]) == [(len(asked.input_ids), row.n_labels)]
    theirs = rendered(inputs, turns, add_generation_prompt=True, **fixed)
    given = inputs.tokenizer(theirs, add_special_tokens=False)["input_ids"]
    assert asked.input_ids[: len(given)] == given
    if template not in ("no-generation-prompt", "vicuna"):
        assert asked.input_ids == given
    assert inputs.decode(row.input_ids[-row.n_labels : -1]).strip() == answer.strip()


def test_an_empty_block_of_thoughts_is_learned_and_removed_from_answers() -> None:
    inputs = inputs_of("bytes", "qwen3")
    ids = inputs.encode_answer("42")
    assert inputs.tokenizer.decode(ids) == "<think>\n\n</think>\n\n42<|im_end|>"
    assert inputs.decode(ids[:-1]) == "42" and "'<think>" in inputs.warning
    assert inputs.tokenizer.decode(inputs.encode_answer(THOUGHT)) == f"{THOUGHT}<|im_end|>"
    assert inputs.decode(inputs.encode_answer(THOUGHT)[:-1]) == THOUGHT


def test_arguments_reach_the_template_in_training_and_asking() -> None:
    inputs = inputs_of("bytes", "qwen3", enable_thinking=False)
    prompt = json.dumps(QUESTION)
    (asked,) = inputs.encode_prompts([prompt], None)
    row = inputs.encode_train(prompt, None, "42")
    assert inputs.tokenizer.decode(asked.input_ids).endswith("assistant\n<think>\n\n</think>\n\n")
    assert row.input_ids == whole_ids(inputs, QUESTION, "42") and row.input_ids[: -row.n_labels] == asked.input_ids
    assert inputs.tokenizer.decode(inputs.encode_answer("42")) == "42<|im_end|>" and inputs.warning == ""
    with pytest.raises(UserError, match="other words around the answer '<think>"):
        inputs.encode_answer(THOUGHT)


def test_a_template_without_generation_prompt_gets_one() -> None:
    inputs = inputs_of("bytes", "no-generation-prompt")
    (asked,) = inputs.encode_prompts([json.dumps(QUESTION)], None)
    assert inputs.tokenizer.decode(asked.input_ids).endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert "asks without '<|im_start|>assistant\\n'" in inputs.warning


def test_a_template_that_writes_the_date_always_writes_the_same() -> None:
    asked = {
        day: inputs_of("bytes", "llama3.2", **({"date_string": day} if day else {})).encode_prompts(
            [json.dumps(QUESTION)], None
        )[0]
        for day in ("", "26 Jul 2024", "1 Jan 2025")
    }
    assert asked[""].input_ids == asked["26 Jul 2024"].input_ids != asked["1 Jan 2025"].input_ids
    assert "today is always 26 Jul 2024" in inputs_of("bytes", "llama3.2").warning


_TURNS = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "fault"),
    [
        (
            _TURNS + "{% if add_generation_prompt %}{{ 'assistant: <think>' }}{% endif %}",
            "asks with '<think>', but writes nothing before an answer",
        ),
        (
            _TURNS + "{% if add_generation_prompt %}{{ 'bot: ' }}{% endif %}",
            "asks with 'bot: ', but writes 'assistant: ' before an answer",
        ),
        (
            "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}",
            "leaves answers out",
        ),
        (_TURNS + "{{ 1 + 'a' }}", "refuses a conversation: unsupported operand"),
        (_TURNS + "{{ 1 / 0 }}", "refuses a conversation: division by zero"),
        (_TURNS + "{% for i in range(10 ** 9) %}{% endfor %}", "refuses a conversation: Range too big"),
        ("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}" + _TURNS, "refuses a conversation: maximum recursion depth"),
    ],
)
def test_a_template_that_cannot_be_made_consistent_is_refused(template: str, fault: str) -> None:
    with pytest.raises(UserError) as raised:
        with_template(template)
    assert fault in str(raised.value)


def test_an_answer_that_the_template_changes_is_refused() -> None:
    inputs = with_template(_TURNS.replace("m.content", "m.content.split('</think>')[-1]"))
    assert inputs.decode(inputs.encode_answer("42")[:-1]) == "42"
    with pytest.raises(UserError, match="changes or leaves out the answer 'a</think>b'"):
        inputs.encode_answer("a</think>b")


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("enable_thinkng", "has no argument enable_thinkng"),
        ("add_generation_prompt", "add_generation_prompt is set by ftlib"),
        ("messages", "messages is set by ftlib"),
    ],
)
def test_arguments_that_would_do_nothing_are_refused(name: str, fault: str) -> None:
    with pytest.raises(UserError, match=fault):
        inputs_of("bytes", "qwen3", **{name: False})


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_in_an_answer_stay_text(kind: str) -> None:
    inputs = inputs_of(kind, "qwen3")
    answer = "say <|im_end|> and </s> twice"
    ids = inputs.encode_answer(answer)
    assert [ids.count(inputs.eos_token_id), ids.count(inputs.tokenizer.eos_token_id)] == [1, 0]
    assert inputs.decode(ids[:-1]) == answer


def test_a_turn_ends_with_an_added_token_that_is_not_special() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<end>"])
    tokenizer.chat_template = _TURNS.replace("'\n'", "'<end>'")
    inputs = CausalProcessor(tokenizer, None, chat=True)
    assert inputs.eos_token_id == tokenizer.convert_tokens_to_ids("<end>") == inputs.encode_answer("a")[-1]
    (asked,) = inputs.encode_prompts([json.dumps([{"role": "user", "content": "a<end>b"}])], None)
    assert asked.input_ids.count(inputs.eos_token_id) == 1
