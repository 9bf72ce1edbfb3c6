"""Conversations as people write them: OpenAI's messages, ShareGPT's and LLaVA's turns, with images and tool calls.

Every form becomes a list of turns `{"role", "content"}` as chat templates take them; `content` is a text or, in a turn
with images, a list of parts `{"type": "image"}` and `{"type": "text", "text"}`. Tool calls keep OpenAI's form, with
arguments as objects. The images of a record are a list of references (paths, `data:` URIs or URLs); LLaVA's
placeholders `<image>` and parts without a reference stand for them in order.

Sources of the forms: OpenAI's chat completions API, ShareGPT and LLaVA (Liu et al., 2023), LLaMA-Factory's data/README,
TRL's "Dataset formats and types".
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Turn = dict[str, Any]
"""`role` and `content`, and where they apply `tool_calls`, `tool_call_id` and `name` (of a tool)."""

ROLES = ("system", "user", "assistant", "tool")
_SHAREGPT = {
    **{"human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant"},
    **{"observation": "tool", "function_call": "assistant"},
    **{role: role for role in ROLES},
}
"""Allowed values of `from` → role."""

_WEIGHTS = frozenset({"weight", "train", "training", "loss", "loss_weight"})
"""Fields that say whether a message is trained on (OpenAI, axolotl, ms-swift and others)."""

_MEDIA = frozenset({"image", "images", "video", "videos", "audio", "audios"})
_SHAPING = frozenset({"reasoning_content", "reasoning", "thinking", "train_detail"})
"""Fields of a message that are not supported and would change the prompt or the answer."""

_TOOLS = frozenset({"tool_calls", "function_call", "tool_call_id"})
_READ = frozenset({"role", "content", "from", "value"}) | _WEIGHTS | _MEDIA | _SHAPING | _TOOLS
"""Fields of a message that are used or rejected."""

_PLACEHOLDER = "<image>"
_OTHER_MEDIA = re.compile("<(?:video|audio)>")
_IMAGE_PARTS = ("image", "image_url", "input_image")
_TEXT_PARTS = ("text", "input_text", "output_text")
_REFERENCES = ("image_url", "image", "url", "path", "base64")
_READ_OF_PARTS = frozenset({"type", "text", *_REFERENCES})
"""Fields of a part that are used or rejected."""


@dataclass(frozen=True)
class Conversation:
    """The turns of a conversation.

    Attributes:
        turns: all turns.
        learned: whether each is an answer that is trained on.
        images: references of the images, in the order of their parts in `turns`; if no turn has parts for them, they
            belong before the first turn of the user.
        unused: fields of messages and of their parts that nothing uses.
    """

    turns: list[Turn]
    learned: list[bool]
    images: list[str]
    unused: set[str]


@dataclass
class _Images:
    """The images of a record while its turns are read.

    Attributes:
        given: references in fields beside the messages; None: the record has no such field, so that `<image>` is text.
        shown: references in the order in which the turns show them.
        inline: whether turns have references of their own.
        placeholders: number of parts and placeholders that stand for a given image.
        unused: fields of parts that nothing uses.
    """

    given: list[str] | None
    shown: list[str] = field(default_factory=list)
    inline: bool = False
    placeholders: int = 0
    unused: set[str] = field(default_factory=set)

    def place(self, reference: str | None) -> Turn:
        """Return the part for an image; without a reference it is the next given one."""
        if reference is None:
            self.placeholders += 1
        else:
            self.shown.append(reference)
            self.inline = True
        return {"type": "image"}

    def finish(self) -> list[str]:
        """Return all references.

        Raises:
            ValueError: other numbers of images and of places for them; references in two places.
        """
        given = self.given or []
        if self.inline and (given or self.placeholders):
            raise ValueError("images: references in the messages, and others beside them; use one of the two")
        if self.inline:
            return self.shown
        if self.placeholders not in (0, len(given)):
            raise ValueError(f"images: {self.placeholders} placeholders in the messages for {len(given)} images")
        return given


def read_conversation(
    lists: Mapping[str, Any], given: list[str] | None, system: Any = None, prompts: Sequence[str] = ()
) -> Conversation:
    """Read the messages of a record.

    Args:
        lists: field → its messages, in order: one field as a rule.
        given: references of the images beside the messages; None: there is no field for them.
        system: the system text beside the messages.
        prompts: the fields whose answers are not trained on.

    Raises:
        ValueError: something in it cannot be used; with the field and the message's number.
    """
    turns: list[Turn] = []
    learned: list[bool] = []
    unused: set[str] = set()
    images = _Images(given)
    for name, messages in lists.items():
        if not isinstance(messages, list):
            raise ValueError(f"field {name}: must be a list of messages, got {messages!r}"[:200])
        for number, message in enumerate(messages, 1):
            try:
                turn = _turn(message, images)
                turns.append(turn)
                learned.append(_has_loss(message) and turn["role"] == "assistant" and name not in prompts)
            except ValueError as error:
                raise ValueError(f"field {name}: message {number}: {error}") from None
            unused.update(f"{name}.{each}" for each in message.keys() - _READ - ({"name"} & turn.keys()))
        unused.update(f"{name}.content.{each}" for each in images.unused)
        images.unused.clear()
    if system:
        first = next(iter(lists))
        if not isinstance(system, str):
            raise ValueError(f"field system: must be text, got {system!r}"[:200])
        if any(turn["role"] == "system" for turn in turns):
            raise ValueError(f"field system: {first} also has a system message")
        if system.strip():
            turns, learned = [{"role": "system", "content": system}, *turns], [False, *learned]
    return Conversation(turns, learned, images.finish(), unused)


def text_of_turn(turn: Turn) -> str:
    """Return the text of a turn, without its images."""
    content = turn["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def image_parts(turns: Sequence[Turn]) -> int:
    """Return the number of image parts in some turns."""
    lists = [turn["content"] for turn in turns if isinstance(turn["content"], list)]
    return sum(part["type"] == "image" for parts in lists for part in parts)


def read_tools(tools: Any) -> list[Any]:
    """Return the tools of a record, which may be a list or its JSON; empty for none.

    Raises:
        ValueError: something else.
    """
    found = tools
    if isinstance(tools, str) and tools.strip():
        try:
            found = json.loads(tools)
        except (ValueError, RecursionError):
            raise ValueError(f"field tools: must be a list of tools, or its JSON, got {tools!r}"[:200]) from None
    if found in (None, "", [], {}) or (isinstance(found, str) and not found.strip()):
        return []
    if not isinstance(found, list) or not all(isinstance(tool, dict) for tool in found):
        raise ValueError(f"field tools: must be a list of tools, or its JSON, got {tools!r}"[:200])
    for tool in found:
        function = tool.get("function", tool)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            raise ValueError(f"field tools: a tool needs a function with a name, got {tool!r}"[:200])
    return found


def _turn(message: Any, images: _Images) -> Turn:
    if not isinstance(message, dict):
        raise ValueError("must be an object with a text `content`")
    if name := first_nonempty(message, _MEDIA):
        raise ValueError(f"field {name}: images belong into the parts of `content`, or beside the messages")
    if name := first_nonempty(message, _SHAPING):
        raise ValueError(f"field {name}: is not supported")
    sharegpt = "from" in message and "role" not in message
    written = message.get("from" if sharegpt else "role")
    known = _SHAREGPT if sharegpt else {**{role: role for role in ROLES}, "developer": "system"}
    role = known.get(written) if isinstance(written, str) else None
    if role is None:
        raise ValueError(f"role {' or '.join(_SHAREGPT if sharegpt else ROLES)} expected, got {repr(written)[:50]}")
    name = "value" if sharegpt else "content"
    calls = _tool_calls(message, written, name)
    silent = calls and (written == "function_call" or message.get(name) in (None, "", []))
    turn: Turn = {"role": role, "content": "" if silent else _content(message.get(name), name, role, images)}
    if calls:
        if role != "assistant":
            raise ValueError("only an answer (role assistant) can have tool calls")
        turn["tool_calls"] = calls
    if role == "tool":
        turn |= {key: message[key] for key in ("tool_call_id", "name") if message.get(key) is not None}
    return turn


def _tool_calls(message: dict[str, Any], written: Any, name: str) -> list[Turn]:
    """Return the tool calls of an answer in OpenAI's form; ShareGPT's `function_call` is a turn with their JSON."""
    calls = message.get("tool_calls") or message.get("function_call")
    if written == "function_call":
        try:
            calls = json.loads(message.get(name) or "")
        except (ValueError, TypeError, RecursionError):
            calls = None
        if not calls:
            raise ValueError("a function_call must be the JSON of a call: name and arguments")
    if not calls:
        return []
    return [_tool_call(call) for call in (calls if isinstance(calls, list) else [calls])]


def _tool_call(call: Any) -> Turn:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError(f"a tool call needs a function with a name and arguments, got {call!r}"[:200])
    arguments = function.get("arguments", function.get("parameters"))
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError):
            raise ValueError(f"arguments of a tool call: not JSON: {arguments!r}"[:200]) from None
    if not isinstance(arguments, (dict, type(None))):
        raise ValueError(f"arguments of a tool call: must be an object, got {arguments!r}"[:200])
    known = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    return {**known, "type": "function", "function": {"name": function["name"], "arguments": arguments or {}}}


def _content(content: Any, name: str, role: str, images: _Images) -> str | list[Turn]:
    """Return a message's text, or its parts if it has images."""
    parts = _split_placeholders(content, images) if isinstance(content, str) else _listed(content, images)
    if parts is None:
        raise ValueError(f"must be an object with a text `{name}`")
    if all(part["type"] == "text" for part in parts):
        return "".join(part["text"] for part in parts)
    if role not in ("user", "tool"):
        raise ValueError(f"an image in a turn of role {role}; only the user shows images")
    return parts


def _split_placeholders(text: str, images: _Images) -> list[Turn]:
    """Return a text as parts; `<image>` is an image if the record has images. Blanks around it are not kept."""
    if images.given is None or (_PLACEHOLDER not in text and not _OTHER_MEDIA.search(text)):
        return [{"type": "text", "text": text}]
    if marker := _OTHER_MEDIA.search(text):
        raise ValueError(f"{marker[0]}: videos and sounds are not supported")
    parts: list[Turn] = []
    for number, piece in enumerate(text.split(_PLACEHOLDER)):
        parts += [images.place(None)] if number else []
        parts += [{"type": "text", "text": piece.strip()}] if piece.strip() else []
    return parts


def _listed(content: Any, images: _Images) -> list[Turn] | None:
    """Return a list of parts in the form of chat templates; None if a part is neither text nor image."""
    if not isinstance(content, list):
        return None
    parts: list[Turn] = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(part, dict):
            images.unused.update(name for name in part.keys() - _READ_OF_PARTS if part[name] is not None)
        if kind in _IMAGE_PARTS:
            parts.append(images.place(_reference(part)))
            if isinstance(part.get("image_url"), dict):
                images.unused.update(f"image_url.{name}" for name in part["image_url"].keys() - {"url", "path"})
        elif kind in _TEXT_PARTS and isinstance(part.get("text"), str):
            if images.given and _PLACEHOLDER in part["text"]:
                raise ValueError(f"{_PLACEHOLDER} in a part of text; write a part of type image")
            parts.append({"type": "text", "text": part["text"]})
        elif kind in _TEXT_PARTS or kind is None:
            return None
        else:
            raise ValueError(f"a part of type {str(kind)[:20]}: only texts and images are supported")
    return parts


def _reference(part: Mapping[str, Any]) -> str | None:
    """Return the reference of an image part; None if it stands for the next image of the record.

    Raises:
        ValueError: it is no text.
    """
    for name in _REFERENCES:
        value = part.get(name)
        if isinstance(value, dict):
            value = value.get("url") or value.get("path")
        if value is None:
            continue
        if not isinstance(value, str) or not value:
            raise ValueError(f"the {name} of an image part must be a path, a data: URI or a URL, got {value!r}"[:200])
        return f"data:image/*;base64,{value}" if name == "base64" else value
    return None


def first_nonempty(record: Mapping[str, Any], names: frozenset[str]) -> str:
    """Return the first of some fields that is not empty, or ""."""
    return "" if names.isdisjoint(record) else min((name for name in names & record.keys() if record[name]), default="")


def _has_loss(message: dict[str, Any]) -> bool:
    if _WEIGHTS.isdisjoint(message):
        return True
    found = {name: message[name] for name in sorted(_WEIGHTS) if message.get(name) is not None}
    for name, weight in found.items():
        if weight not in (0, 1):
            raise ValueError(f"field {name}: must be 0 or 1, got {weight!r}"[:100])
    return all(found.values())
