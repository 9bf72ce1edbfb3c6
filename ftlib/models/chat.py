"""A model's chat template: the text that a conversation is asked with, and the text of an answer as training sees it.

Generation sees what the template renders with `add_generation_prompt`. A training row is the very same text, and behind
it what the template itself writes for an answer, up to the token that ends the turn. Templates differ in what they do
in between, which is found out with a short conversation when the template is read:

- nothing: the generation prompt is all that stands before an answer;
- the generation prompt is missing, or a part of it: what is missing (`header`) is added, in training and asking alike;
- something that an answer may bring along itself, such as an empty block of thoughts, or a space (`lead`): the model
  learns to write it, as any program that asks by the template sees it do, and it is removed from generated answers.

A template that asks in one way and writes an answer in another is refused.
"""

from __future__ import annotations

import inspect
import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from ftlib.data.prompts import NO_LOSS, answer_of_turn, turn_of_answer
from ftlib.errors import UserError
from ftlib.hub.cache import require_model
from ftlib.models.custom_code import load_error_message, load_error_remedy
from ftlib.models.encoding import EncodedExample
from ftlib.models.libraries import quiet_libraries

DAY = date(2024, 7, 26)
"""Today, for templates that write the date: a run asks as it was trained. It is what Llama 3 writes without a clock."""

_PROBE = "\N{BLACK STAR}"
_QUESTION = [{"role": "user", "content": "a"}]
_ANCHOR = "a"
_BREAK = "\N{ZERO WIDTH SPACE}"
_CHAT_REMEDY = "Set model.chat_template_arguments so that both are alike, or data.prompt: alpaca."
_SHOWN = 60
_PARTS = "".join(f" | replace('%{one}', '{DAY.strftime('%' + one)}')" for one in "aAbBdHIjmMpSyY")
_CLOCK = "{% macro strftime_now(format) %}{{ format" + _PARTS + " }}{% endmacro %}\n"
"""Put before a template, it stands in for transformers' function of that name, which knows the time."""


class ChatTemplate:
    """The chat template of a tokenizer.

    Attributes:
        end: the token that ends a turn; without one in the template the end of the sequence.
        remark: what a user should know of this template's prompts; empty for nothing.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, arguments: Mapping[str, Any], multimodal: str | None = None
    ) -> None:
        """
        Args:
            arguments: for the template, such as `{"enable_thinking": False}`.
            multimodal: a processor's template, which takes a turn's content as a list of images and texts; None: the
                tokenizer's own, which takes texts.

        Raises:
            UserError: no template, arguments that it does not have, or a template that asks in one way and writes an
                answer in another.
        """
        self._tokenizer = tokenizer
        if not (multimodal or tokenizer.chat_template):
            raise UserError("data.prompt: chat: the model's tokenizer has no chat template", "Set data.prompt: alpaca.")
        self._arguments = dict(arguments)
        self._text = multimodal or _text_of(tokenizer, self._arguments.get("tools"))
        self._parts = {"user", "system", "assistant"} if multimodal else set()
        self._require_arguments()
        self._dated = bool(re.search(r"\bstrftime_now\b", self._text))
        if self._dated:
            self._text = _CLOCK + self._text
        self._special = _any_of(special_tokens(tokenizer))
        if multimodal and not self._writes_answers():  # of the assistant it takes texts
            self._parts.remove("assistant")
        asked, whole = self._render(_QUESTION, asking=True), self._render(_conversation_with_answer(_PROBE))
        before, found, self._behind = whole.rpartition(_PROBE)
        if not found:
            raise UserError("the model's chat template leaves answers out", _CHAT_REMEDY)
        if not before.startswith(asked):
            same = next(
                (index for index, pair in enumerate(zip(asked, before, strict=False)) if len(set(pair)) > 1),
                len(before),
            )
            problem = f"asks with {_tail(asked[same:])}, but writes {_tail(before[same:])} before an answer"
            raise UserError(f"the model's chat template {problem}", _CHAT_REMEDY)
        self._header, self._lead = self._divided(before[len(asked) :], whole)
        self._before = asked + self._header
        ending = _any_of({str(token) for token in tokenizer.added_tokens_decoder.values()}).search(self._behind)
        self.end = ending[0] if ending else str(tokenizer.eos_token)
        self._closing = self._behind[: ending.start()] if ending else ""
        specials = special_tokens(tokenizer) | {self.end}
        self._special, self._broken = _any_of(specials), _any_of({_break_up_token(token) for token in specials})
        self.remark = self._remark()

    def prompt(self, conversation: str, images: int = 0) -> str:
        """The text that a conversation is asked with.

        Args:
            conversation: turns as JSON, or an object of `messages` and `tools` (see `prompts.chat_prompt`); special
                tokens written out in them are broken, so that they cannot end a turn.
            images: how many the row has; unless turns have parts for them they stand before the first turn of the user.

        Raises:
            UserError: the template refuses these turns, or leaves out their tools; another number of images.
        """
        said = json.loads(conversation)
        turns, tools = (said["messages"], said["tools"]) if isinstance(said, dict) else (said, None)
        turns = [self._cleaned(turn) for turn in turns]
        placed = count_images(turns)
        if placed not in (0, images):
            raise UserError(f"a conversation shows {placed} images, but its row has {images}")
        if images and not placed:
            first = next((turn for turn in turns if turn["role"] == "user"), None)
            if first is None:
                raise UserError("a conversation about an image needs a turn of the user")
            first["content"] = [{"type": "image"}] * images + [{"type": "text", "text": first["content"]}]
        text = self._render(turns, asking=True, tools=tools) + self._header
        for name in [*_called(turns), *(tool.get("function", tool).get("name", "") for tool in tools or ())]:
            if str(name) not in text:
                raise UserError(f"the model's chat template leaves out the tool {name}", "Use a model with tools.")
        return text

    def answer_ids(self, answers: Sequence[str]) -> list[list[int]]:
        """Answers as they stand behind any prompt, each with the end of its turn.

        They are tokenized behind a prompt, since many tokenizers put a space before a text that stands alone.

        Raises:
            UserError: the template does not write an answer as it is.
        """
        texts = [self._render_answer(answer) for answer in answers]
        found = [
            None
            if "tool_calls" in turn_of_answer(answer)  # the template's own special tokens
            else self._special.search(text, len(self._lead) if text.startswith(self._lead) else 0)
            for answer, text in zip(answers, texts, strict=True)
        ]
        heads = [text[: one.start()] if one else text + self.end for text, one in zip(texts, found, strict=True)]
        tails = [text[one.start() :] if one else "" for text, one in zip(texts, found, strict=True)]
        before = self._ids([self._before])[0]
        end = self._tokenizer.convert_tokens_to_ids(self.end)
        ids = []
        for text, tail, whole in zip(texts, tails, self._ids([self._before + head for head in heads]), strict=True):
            if whole[: len(before)] != before:  # a token across the border, which generation cannot see
                ids.append([*self._plain_ids(text), end])
            elif tail:
                ids.append([*whole[len(before) :], *self._plain_ids(tail), end])
            else:
                ids.append(whole[len(before) :])
        return ids

    def strip_answer(self, text: str) -> str:
        """A generated answer without what the template writes around every answer."""
        if self._lead:
            text = re.sub(r"\A\s*" + r"\s*".join(map(re.escape, self._lead.split())) + r"\s*", "", text)
        return text.rstrip() if self._closing else text

    def _divided(self, missing: str, whole: str) -> tuple[str, str]:
        """What stands between the generation prompt and an answer → what prompts get, what answers get.

        Spaces are an answer's: tokenizers join them to the word that follows.
        """
        try:
            if self._render(_conversation_with_answer(missing + _PROBE)) == whole:
                return "", missing
        except UserError:  # no answer may hold such words
            pass
        header = missing.rstrip(" ")
        return header, missing[len(header) :]

    def _render_answer(self, answer: str) -> str:
        """What the template writes for an answer, up to the end of the turn; special tokens in it are as they were."""
        turn = self._cleaned(turn_of_answer(answer))
        calls = _called([turn])
        whole = self._render([*_QUESTION, turn])
        if not (whole.startswith(self._before) and whole.endswith(self._behind)):
            raise UserError(
                f"the model's chat template writes other words around the answer {_head(answer)}", _CHAT_REMEDY
            )
        text = whole[len(self._before) : len(whole) - len(self._behind)] + self._closing
        if calls:
            if any(name not in text for name in calls):
                problem = f"the model's chat template leaves out the tool calls of the answer {_head(answer)}"
                raise UserError(problem, "Use a model with tools.")
            return text
        text = self._broken.sub(lambda match: match[0].replace(_BREAK, "", 1), text)
        if _without_blanks(answer) not in _without_blanks(self._before + text):
            raise UserError(f"the model's chat template changes or leaves out the answer {_head(answer)}", _CHAT_REMEDY)
        return text

    def _writes_answers(self) -> bool:
        try:
            return _PROBE in self._render(_conversation_with_answer(_PROBE))
        except UserError:
            return False

    def _render(self, turns: list[dict[str, Any]], asking: bool = False, tools: Any = None) -> str:
        from jinja2 import TemplateError

        turns = [
            {**turn, "content": [{"type": "text", "text": turn["content"]}]}
            if turn["role"] in self._parts and isinstance(turn["content"], str)
            else turn
            for turn in turns
        ]
        settings: dict[str, Any] = {"tokenize": False, "add_generation_prompt": asking, "chat_template": self._text}
        if tools:
            if "tools" in self._arguments:
                raise UserError("model.chat_template_arguments: tools, and rows with tools of their own")
            settings["tools"] = tools
        try:
            return str(self._tokenizer.apply_chat_template(turns, **settings, **self._arguments))
        except (
            TemplateError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError
        ) as error:  # fmt: skip
            raise UserError(f"the model's chat template refuses a conversation: {error}") from None

    def _require_arguments(self) -> None:
        """
        Raises:
            UserError: an argument that ftlib sets itself, or that the template does not know: it would change nothing.
        """
        own = {*inspect.signature(self._tokenizer.apply_chat_template).parameters, "messages"} - {"tools", "documents"}
        for name in self._arguments:
            if name in own:
                raise UserError(f"model.chat_template_arguments: {name} is set by ftlib")
            if not re.search(rf"\b{re.escape(name)}\b", self._text):
                raise UserError(f"model.chat_template_arguments: the model's chat template has no argument {name}")

    def _remark(self) -> str:
        remarks = []
        if self._header:
            remarks.append(
                f"the model's chat template asks without {self._header!r}, but writes it before an answer; ftlib adds "
                "it to prompts, in training and asking alike (other programs have to do so, too)"
            )
        if self._lead.strip():
            remarks.append(
                f"the model's chat template writes {self._lead!r} before an answer, but does not ask with it; the "
                "model learns to write it, and it is removed from generated answers"
            )
        if self._dated:
            remarks.append(f"the model's chat template may write the date; for ftlib today is always {DAY:%d %b %Y}")
        return "\n".join(remarks)

    def _cleaned(self, turn: dict[str, Any]) -> dict[str, Any]:
        """A turn as the template gets it: without ftlib's mark, and with special tokens in its texts broken."""
        return {name: self._clean(value) for name, value in turn.items() if name not in NO_LOSS}

    def _clean(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {name: self._clean(one) for name, one in value.items()}
        if isinstance(value, list):
            return [self._clean(one) for one in value]
        return self._without_specials(value) if isinstance(value, str) else value

    def _without_specials(self, text: str) -> str:
        return self._special.sub(lambda match: _break_up_token(match[0]), text)

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        ids: list[list[int]] = self._tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        return ids

    def _plain_ids(self, text: str) -> list[int]:
        """A text that goes on where another ended; special tokens written out in it stay text."""
        texts = [_ANCHOR, _ANCHOR + text, text]
        found: list[list[int]] = self._tokenizer(texts, add_special_tokens=False, split_special_tokens=True)[
            "input_ids"
        ]
        anchor, behind, alone = found
        return behind[len(anchor) :] if behind[: len(anchor)] == anchor else alone


def count_images(turns: Sequence[Mapping[str, Any]]) -> int:
    """How many parts of turns are images."""
    lists = [turn["content"] for turn in turns if isinstance(turn["content"], list)]
    return sum(part["type"] == "image" for parts in lists for part in parts)


def _called(turns: Sequence[Mapping[str, Any]]) -> list[str]:
    """The names of the tools that turns call."""
    return [call["function"]["name"] for turn in turns for call in turn.get("tool_calls", ())]


def encode_conversation(
    prompt_ids: Callable[[str], list[int]], answer_ids: Callable[[str], list[int]], prompt: str, answer: str
) -> EncodedExample:
    """A row with labels on all answers of a conversation, but those marked with `prompts.NO_LOSS`.

    Each answer stands behind exactly what generation would see when it is asked for, as in a row of its own.

    Args:
        prompt_ids, answer_ids: conversation (JSON) → its ids; answer → its ids.
        prompt: the turns before the last answer.

    Raises:
        UserError: the template writes an earlier answer otherwise when the conversation goes on.
    """
    said = json.loads(prompt)
    turns = said["messages"] if isinstance(said, dict) else said
    before = prompt_ids(prompt)
    ids = [*before, *answer_ids(answer)]
    spans = []
    for number, turn in enumerate(turns):
        if turn["role"] != "assistant" or NO_LOSS.items() <= turn.items():
            continue
        asked = {**said, "messages": turns[:number]} if isinstance(said, dict) else turns[:number]
        start = prompt_ids(json.dumps(asked, ensure_ascii=False))
        own = [*start, *answer_ids(answer_of_turn(turn))]
        if ids[: len(own)] != own:
            problem = (
                "the model's chat template writes an answer otherwise when the conversation goes on (such as without"
            )
            raise UserError(
                f"{problem} its thoughts), so that one row cannot be what generation sees", "Set data.chat_turns: rows."
            )
        spans.append((len(start), len(own)))
    spans.append((len(before), len(ids)))
    gaps = tuple((end, start) for (_, end), (start, _) in itertools.pairwise(spans))
    return EncodedExample(ids, len(ids) - spans[0][0], gaps=gaps)


def _text_of(tokenizer: PreTrainedTokenizerBase, tools: Any) -> str:
    try:
        return str(tokenizer.get_chat_template(tools=tools))
    except ValueError as error:  # several, and none is the default
        raise UserError(f"data.prompt: chat: {error}") from None


def _conversation_with_answer(answer: str) -> list[dict[str, str]]:
    return [*_QUESTION, {"role": "assistant", "content": answer}]


def _any_of(words: set[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, sorted(words, key=len, reverse=True))))


def _break_up_token(token: str) -> str:
    return token[0] + _BREAK + token[1:]


def _without_blanks(text: str) -> str:
    return "".join(text.split())


def _tail(text: str) -> str:
    return repr(text if len(text) <= _SHOWN else "…" + text[-_SHOWN:]) if text else "nothing"


def _head(text: str) -> str:
    return repr(text if len(text) <= _SHOWN else text[:_SHOWN] + "…")


# The tokenizer of a causal model's folder, read and compared with the model's own config.

_TOKENIZERS_REMEDY = (
    "The folder needs the tokenizer's files (tokenizer.json or tokenizer.model, tokenizer_config.json)."
)


def load_tokenizer(folder: Path) -> tuple[PreTrainedTokenizerBase, PreTrainedConfig]:
    """Read the tokenizer of a model folder, and the config of its text model.

    Raises:
        UserError: no tokenizer there, or one of another model.
    """
    quiet_libraries()
    require_model(folder)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False).get_text_config()
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, ImportError) as error:
        problem = f"{folder}: no tokenizer can be read from it: {load_error_message(error, folder)}"
        raise UserError(problem, load_error_remedy(error, _TOKENIZERS_REMEDY)) from None
    if fault := _find_mismatch(tokenizer, config):
        raise UserError(f"{folder}: tokenizer and model do not belong together: {fault}", _TOKENIZERS_REMEDY)
    return tokenizer, config


def leading_bos(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The beginning-of-sequence token, if the tokenizer puts one before every text."""
    first = tokenizer("a")["input_ids"][:1]
    return first if tokenizer.bos_token_id is not None and first == [tokenizer.bos_token_id] else []


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """Everything that is no text: the named special tokens and the added ones (turns of a chat)."""
    added = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    return added | set(tokenizer.all_special_tokens)


def _find_mismatch(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> str | None:
    """What cannot be true of a model's own tokenizer.

    A model's table often has more rows than there are tokens, and a fine-tuned chat model ends on another token than
    its config says (the end of a turn). But an id beyond the table, an end that is plain text to the tokenizer, or
    another beginning than the model learned, are another model's.
    """
    highest = max(tokenizer.get_vocab().values())
    if highest >= config.vocab_size:
        return f"token ids up to {highest}, {config.vocab_size} rows of embeddings"
    special = set(tokenizer.convert_tokens_to_ids(sorted(special_tokens(tokenizer))))
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    if ends != [None] and not special & set(ends):
        return f"eos is {_listed(ends)} in the model, which is no special token of the tokenizer"
    written = leading_bos(tokenizer)
    if written and config.bos_token_id is not None and written != [config.bos_token_id]:
        return f"bos is {written[0]} in the tokenizer, {config.bos_token_id} in the model"
    return None


def _listed(ids: list[int]) -> str:
    return " or ".join(map(str, ids))
