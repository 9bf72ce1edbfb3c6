"""Instructions and conversations in the forms of other programs: what becomes of each record."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ftlib.config.schema import Config, Data
from ftlib.data.example import Example, InvalidRecord
from ftlib.data.prompts import prompt_checker, render_prompt, turn_of_answer
from ftlib.data.sources.instructions import examples
from ftlib.data.sources.jsonl import examples as jsonl_examples
from ftlib.tasks.registry import load_task

Turns = list[dict[str, Any]]


def read(root: Path, *records: Any, read_of: Any = examples, **settings: Any) -> list[Example]:
    (root / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    found = list(read_of(Data(source="instructions", root=str(root), **{"prompt": "chat", **settings})))
    assert not [one for one in found if isinstance(one, InvalidRecord)], found
    return [one for one in found if isinstance(one, Example)]


def turns(*texts: str) -> Turns:
    roles = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    return [{"role": roles[text[0]], "content": text[1:]} for text in texts]


def shown(row: Example) -> Any:
    return json.loads(render_prompt(row, "chat"))


def image_turn(*parts: str) -> dict[str, Any]:
    """A user's turn with images ("") and texts."""
    return {
        "role": "user",
        "content": [{"type": "text", "text": part} if part else {"type": "image"} for part in parts],
    }


SHAREGPT = [{"from": "human", "value": "q1"}, {"from": "gpt", "value": "a1"}]
LLAVA = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "a cat"}]
PARTS = [
    {"type": "text", "text": "Compare"},
    {"type": "image_url", "image_url": {"url": "a.png"}},
    {"type": "image", "image": "b/../c.png"},
]


@pytest.mark.parametrize(
    ("record", "prompt", "answer", "images"),
    [
        ({"instruction": "q", "input": "i", "output": "a"}, turns("uq\n\ni"), "a", []),
        (
            {"instruction": "q", "output": "a", "system": "s", "history": [["x", "y"]]},
            turns("ss", "ux", "ay", "uq"),
            "a",
            [],
        ),
        ({"instruction": "<image>\nq", "output": "a", "images": ["1.png"]}, turns("uq"), "a", ["1.png"]),
        ({"messages": turns("ss", "uq", "aa")}, turns("ss", "uq"), "a", []),
        ({"messages": [{"role": "developer", "content": "s"}, *turns("uq", "aa")]}, turns("ss", "uq"), "a", []),
        ({"conversations": SHAREGPT, "system": "s"}, turns("ss", "uq1"), "a1", []),
        ({"image": "1.png", "conversations": LLAVA}, [image_turn("", "What?")], "a cat", ["1.png"]),
        (
            {"messages": [{"role": "user", "content": PARTS}, *turns("aa")]},
            [image_turn("Compare", "", "")],
            "a",
            ["a.png", "c.png"],
        ),
        (
            {"messages": turns("uA <image> or <image>?", "aa"), "images": ["1.png", "2.png"], "system": "s"},
            [*turns("ss"), image_turn("A", "", "or", "", "?")],
            "a",
            ["1.png", "2.png"],
        ),
        ({"messages": turns("uq", "aa"), "images": ["1.png"]}, turns("uq"), "a", ["1.png"]),
        (
            {"images": ["1.png"], "prompt": [image_turn("", "q")], "completion": turns("aa")},
            [image_turn("", "q")],
            "a",
            ["1.png"],
        ),
        ({"prompt": "q", "completion": " a"}, turns("uq"), " a", []),
        ({"prompt": turns("ss", "uq"), "completion": turns("aa")}, turns("ss", "uq"), "a", []),
        ({"messages": turns("u<image>", "aa")}, turns("u<image>"), "a", []),  # the record has no images: it is text
    ],
)
def test_forms(tmp_path: Path, record: dict[str, Any], prompt: Turns, answer: str, images: list[str]) -> None:
    (row,) = read(tmp_path, record)
    assert (shown(row), row.suffix, row.images) == (prompt, answer, images)
    assert not prompt_checker("chat")(row)


@pytest.mark.parametrize("chat_turns", ["rows", "all", "last"])
def test_placeholders_in_a_history_and_an_input_keep_their_places(tmp_path: Path, chat_turns: str) -> None:
    """As LLaMA-Factory writes them; with alpaca's format, which has no place for such images, they are an error."""
    images = ["a.png", "b.png"]
    told = {"instruction": "q2", "input": "<image>x", "output": "a2", "system": "s", "history": [["<image>q1", "a1"]]}
    (row,) = read(tmp_path, {**told, "images": images}, chat_turns=chat_turns)
    asked = {
        "role": "user",
        "content": [{"type": "text", "text": "q2"}, {"type": "image"}, {"type": "text", "text": "x"}],
    }
    assert shown(row) == [*turns("ss"), image_turn("", "q1"), *turns("aa1"), asked]
    assert (row.images, row.suffix, row.prefix) == (images, "a2", "q2x")
    assert "set data.prompt: chat" in prompt_checker("{prefix}")(row) and prompt_checker("alpaca")(row)
    (later,) = read(
        tmp_path, {**told, "input": "", "instruction": "<image>q2", "history": [["q1", "a1"]], "image": "a.png"}
    )
    assert shown(later) == [*turns("ss", "uq1", "aa1"), image_turn("", "q2")]


def test_columns_decide_between_two_forms(tmp_path: Path) -> None:
    record = {"instruction": "i", "output": "o", "messages": turns("uq", "aa")}
    (chat,) = read(tmp_path, record, columns={"messages": "messages"})
    (pair,) = read(tmp_path, record, columns={"prefix": "instruction"})
    assert (shown(chat), chat.suffix) == (turns("uq"), "a") and pair.suffix == "o" and pair.prefix == "i"


def test_several_answers(tmp_path: Path) -> None:
    """A row for each answer, one row with loss on all answers, or one with loss on the last."""
    said = turns("uq1", "aa1", "uq2", "aa2", "uq3", "aa3")
    said[3]["weight"] = 0
    record = {"id": "k", "messages": said}
    rows = read(tmp_path, record)
    assert [(row.id, row.suffix) for row in rows] == [("k-1", "a1"), ("k-3", "a3")]
    assert shown(rows[1]) == turns("uq1", "aa1", "uq2", "aa2", "uq3")
    (whole,) = read(tmp_path, record, chat_turns="all")
    assert (whole.id, whole.suffix, whole.unlabelled_turns) == ("k", "a3", 1)
    assert shown(whole) == [turn if turn["content"] != "a2" else {**turn, "weight": 0} for turn in said[:5]]
    (last,) = read(tmp_path, record, chat_turns="last")
    assert (last.id, last.suffix, last.unlabelled_turns) == ("k", "a3", 2)
    assert shown(last) == turns("uq1", "aa1", "uq2", "aa2", "uq3")


def test_answers_in_a_prompt_are_not_trained_on(tmp_path: Path) -> None:
    record = {"prompt": turns("uq1", "aa1", "uq2"), "completion": turns("aa2")}
    (row,) = read(tmp_path, record, chat_turns="all")
    assert [turn.get("weight") for turn in shown(row)] == [None, 0, None] and row.suffix == "a2"


def test_images_of_later_turns_are_not_shown_before(tmp_path: Path) -> None:
    record = {"messages": turns("u<image>q1", "aa1", "u<image>q2", "aa2"), "images": ["1.png", "2.png"]}
    assert [row.images for row in read(tmp_path, record)] == [["1.png"], ["1.png", "2.png"]]


def test_conversations_of_the_same_words_about_other_images_are_no_group(tmp_path: Path) -> None:
    """Otherwise all images of a class would be in one split."""
    said = turns("u<image>What?", "aa cat", "u?", "ayes")
    rows = read(tmp_path, *({"messages": said, "images": [name]} for name in ("1.png", "2.png", "2.png")))
    assert len({row.group for row in rows}) == 2 and rows[0].group == rows[1].group


def test_fields_of_parts_that_nothing_uses_are_known(tmp_path: Path) -> None:
    parts = [
        {"type": "image", "image": "a.png", "max_pixels": 9, "min_pixels": None},
        {"type": "image_url", "image_url": {"url": "b.png", "detail": "low"}},
        {"type": "text", "text": "q", "cache_control": {}},
    ]
    (row,) = read(tmp_path, {"messages": [{"role": "user", "content": parts}, *turns("aa")]})
    assert row.unused == {f"messages.content.{name}" for name in ("max_pixels", "image_url.detail", "cache_control")}


@pytest.mark.parametrize("start", ["file://", "file:", "file://localhost", ""])
def test_paths_as_uris(tmp_path: Path, start: str) -> None:
    record = {"messages": turns("uq", "aa"), "images": [f"{start}{tmp_path}/a%20b.png" if start else "a b.png"]}
    (row,) = read(tmp_path, record)
    assert row.images[0] in (f"{tmp_path}/a b.png", "a b.png")


CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": {"x": 1}}}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]


@pytest.mark.parametrize(
    "record",
    [
        {
            "tools": TOOLS,
            "messages": [
                *turns("uq"),
                {"role": "assistant", "content": None, "tool_calls": [{**CALL, "function": {**CALL["function"], "arguments": '{"x": 1}'}}]},  # type: ignore[dict-item]  # noqa: E501
                {"role": "tool", "tool_call_id": "c1", "content": "2"},
                *turns("ait is 2"),
            ],
        },
        {
            "tools": json.dumps(TOOLS),
            "conversations": [
                {"from": "human", "value": "q"},
                {"from": "function_call", "value": '{"name": "add", "arguments": {"x": 1}}'},
                {"from": "observation", "value": "2"},
                {"from": "gpt", "value": "it is 2"},
            ],
        },
    ],
)  # fmt: skip
def test_tool_calls(tmp_path: Path, record: dict[str, Any]) -> None:
    first, second = read(tmp_path, record)
    assert shown(first) == {"messages": turns("uq"), "tools": TOOLS}
    (call,) = turn_of_answer(first.suffix)["tool_calls"]
    assert call["function"] == CALL["function"]  # type: ignore[comparison-overlap]
    messages = shown(second)["messages"]
    assert messages[1]["tool_calls"] == [call] and messages[2]["role"] == "tool" and second.suffix == "it is 2"
    for template in ("alpaca", "{prefix}"):
        assert "data.prompt" in prompt_checker(template)(second) or "no tools" in prompt_checker(template)(second)


DEEP = "[" * 100_000


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"messages": turns("uq", "aa"), "tools": DEEP}, "field tools: must be a list of tools"),
        ({"messages": turns("uq", "aa"), "tools": [{"function": "x"}]}, "a tool needs a function with a name"),
        ({"messages": turns("uq", "aa"), "tools": [{"type": "web_search"}]}, "a tool needs a function with a name"),
        ({"conversations": [SHAREGPT[0], {"from": "function_call", "value": DEEP}]}, "must be the JSON of a call"),
        ({"conversations": [SHAREGPT[0], {"from": "function_call", "value": "[]"}]}, "must be the JSON of a call"),
        (
            {
                "messages": [
                    *turns("uq"),
                    {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": DEEP}}]},
                ]
            },
            "arguments of a tool call",
        ),
        ({"messages": turns("uq", "aa"), "history": [["x", "y"]]}, "field history: messages also has earlier turns"),
        (
            {"instruction": "q", "output": "a", "history": [["<image>x", "y"]], "images": ["a.png", "b.png"]},
            "images: 1 placeholders in the messages for 2 images",
        ),
        (
            {"instruction": "q", "output": "a", "history": [["x", "<image>"]], "image": "a.png"},
            "message 2: an image in a turn of role assistant",
        ),
        ({"prompt": "q", "completion": "<image> a", "image": "a.png"}, "field completion: <image> in an answer"),
        ({"text": "once", "images": ["a.png"]}, "field text: raw text shows no images"),
        ({"messages": turns("uq", "aa"), "images": ["s3://host/a.png"]}, "an image is a URL of s3; only https URLs"),
        ({"messages": turns("uq", "aa"), "rejected": turns("ab")}, "preference pairs are not supported"),
        ({"instruction": "q", "output": "a", "rejected": "b"}, "preference pairs are not supported"),
        ({"messages": turns("uq", "a", "uq2", "aa")}, "message 2: is empty"),
        ({"image": {"url": "https://x.org/a.png?sig=secret"}, "messages": turns("uq", "aa")}, "x.org/a.png'}"),
    ],
)
def test_what_is_refused(tmp_path: Path, record: dict[str, Any], reason: str) -> None:
    (tmp_path / "data.jsonl").write_text(json.dumps(record))
    (bad,) = examples(Data(source="instructions", root=str(tmp_path), prompt="chat", chat_turns="all"))
    assert isinstance(bad, InvalidRecord) and reason in bad.reason and "secret" not in bad.reason


def test_the_better_answer_of_a_pair_can_be_chosen(tmp_path: Path) -> None:
    record = {"chosen": turns("uq", "aa"), "rejected": turns("uq", "ab")}
    (row,) = read(tmp_path, record, columns={"messages": "chosen"})
    assert (shown(row), row.suffix) == (turns("uq"), "a")


def test_a_table_with_several_forms_has_null_in_the_fields_of_the_others(tmp_path: Path) -> None:
    nothing = {"messages": None, "conversations": None, "system": None, "history": None, "tools": None, "text": None}
    pair = {**nothing, "instruction": "q", "input": None, "output": "a"}
    chat = {**nothing, "instruction": None, "output": None, "messages": turns("uq", "aa")}
    for row in read(tmp_path, pair, chat):
        assert shown(row) == turns("uq") and row.suffix == "a"
        assert not any(prompt_checker(template)(row) for template in ("chat", "alpaca", "{prefix}"))


@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS)])
def test_tools_of_an_instruction(tmp_path: Path, tools: Any) -> None:
    (row,) = read(tmp_path, {"instruction": "q", "output": "a", "tools": tools})
    assert shown(row) == {"messages": turns("uq"), "tools": TOOLS}
    for template in ("alpaca", "{prefix}"):
        assert prompt_checker(template)(row).startswith(("tools: ", "prompt alpaca shows no tools"))


def test_images_between_words_need_a_chat_template(tmp_path: Path) -> None:
    before = {"images": ["1.png", "2.png"], "messages": turns("u<image><image>a", "ay")}
    between = {"images": ["1.png", "2.png"], "messages": turns("u<image>a<image>b", "ay")}
    for record, errors in ((before, 0), (between, 2)):
        (row,) = read(tmp_path, record)
        assert not prompt_checker("chat")(row)
        found = [error for template in ("alpaca", "{prefix}") if (error := prompt_checker(template)(row))]
        assert len(found) == errors and all("images between words" in error for error in found)


def test_raw_text(tmp_path: Path) -> None:
    (row,) = read(tmp_path, {"text": "Once upon a time.", "source": "web"})
    assert (row.prefix, row.suffix, row.facts) == ("", "Once upon a time.", {"source": "web"})
    assert render_prompt(row, "{prefix}") == "" and not prompt_checker("{prefix}")(row)
    for prompt in ("alpaca", "chat"):
        assert "raw text (field text) has no question" in prompt_checker(prompt)(row)


def test_data_uris(tmp_path: Path) -> None:
    """The bytes are written once below the dataset's folder, whatever the number of rows."""
    made = io.BytesIO()
    Image.new("RGB", (3, 2), "red").save(made, "PNG")
    uri = f"data:image/png;base64,{base64.b64encode(made.getvalue()).decode()}"
    parts = [{"type": "image_url", "image_url": {"url": uri}}, {"type": "text", "text": "q"}]
    rows = read(tmp_path, *[{"messages": [{"role": "user", "content": parts}, *turns("aa")]}] * 2)
    name = f".images/embedded/{hashlib.sha256(made.getvalue()).hexdigest()}"
    assert [row.images for row in rows] == [[name], [name]] and (tmp_path / name).read_bytes() == made.getvalue()
    assert uri not in json.dumps([row.facts for row in rows])
    assert [one.name for one in (tmp_path / ".images" / "embedded").iterdir()] == [Path(name).name]


@pytest.mark.parametrize(
    ("reference", "reason"),
    [
        ("data:text/plain;base64,aGk=", "must hold an image"),
        ("data:image/png;base64,a?b", "base64 of a data: URI is malformed"),
        ("http://example.org/a.png", "is a URL"),
    ],
)
def test_references_that_cannot_be_used(tmp_path: Path, reference: str, reason: str) -> None:
    (tmp_path / "data.jsonl").write_text(json.dumps({"image": reference, "prefix": "q", "suffix": "a"}))
    (bad,) = jsonl_examples(Data(source="jsonl", root=str(tmp_path)))
    assert isinstance(bad, InvalidRecord) and reason in bad.reason


def test_rows_with_several_images_and_without(tmp_path: Path) -> None:
    rows = read(
        tmp_path,
        {"images": ["a.png", "./b.png"], "prefix": "same?", "suffix": "no"},
        {"image": ["a.png"], "prefix": "q", "suffix": "a"},
        {"image": None, "prefix": "q", "suffix": "a"},
        {"images": [], "prefix": "q", "suffix": "a"},
        {"image": "a.png", "prefix": "q", "suffix": "a", "images": 3},
        read_of=jsonl_examples,
        prompt="{prefix}",
    )
    assert [row.images for row in rows] == [["a.png", "b.png"], ["a.png"], [], [], ["a.png"]]
    assert [row.facts for row in rows] == [{}, {}, {}, {}, {"images": 3}]
    (bad,) = jsonl_examples(_written(tmp_path, {"prefix": "q", "suffix": "a"}))
    assert isinstance(bad, InvalidRecord) and "field image: is missing" in bad.reason


def _written(root: Path, record: dict[str, Any]) -> Data:
    (root / "data.jsonl").write_text(json.dumps(record))
    return Data(source="jsonl", root=str(root))


def test_boxes_need_a_single_image() -> None:
    row = Example("1", "a.png", "detect cat", "", other_images=("b.png",), location="x:1")
    found = load_task("detect").validated(row)
    assert isinstance(found, InvalidRecord) and "2 images, but answers of task detect locate in one" in found.reason


def test_all_turns_need_a_chat_template() -> None:
    with pytest.raises(ValueError, match="chat_turns: all requires prompt: chat"):
        Data(source="instructions", root=".", chat_turns="all", prompt="alpaca")


def test_configs_without_the_new_keys_stay_what_they_were() -> None:
    from ftlib.config.identity import canonical_fields

    data = Config.model_validate(
        {
            "name": "x",
            "task": "instruct",
            "model": {"family": "causal", "base": "ftlib/tiny-neox"},
            "adapter": {"method": "full"},
            "data": {"source": "instructions", "root": "/d"},
        }
    ).data
    assert "chat_turns" not in canonical_fields(data)
    assert canonical_fields(data.model_copy(update={"chat_turns": "last"}))["chat_turns"] == "last"
