"""Rows that are too long for the model: dropped, truncated or refused, and counted."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from ftlib.core import jsonl
from ftlib.data.example import Example
from ftlib.errors import UserError
from ftlib.models.causal_lm import CausalProcessor
from ftlib.models.paligemma import PaliGemmaInputProcessor
from ftlib.models.tiny import tiny_tokenizer
from ftlib.runs.run import Run
from ftlib.training import train
from ftlib.training.data import MixtureSampler, SupervisedDataset, filter_by_length, images_of, validate_images

TEMPLATE = "{prefix}\n"
INPUTS = CausalProcessor(tiny_tokenizer(), max_length=10)


def examples() -> list[Example]:
    """A character is a token: prompt and newline, answer and eos."""
    shapes = {"short": (2, 2), "exact": (5, 3), "over": (5, 4), "no label": (9, 1), "just one": (8, 5), "long": (30, 3)}
    return [Example(name, "", "p" * prompt, "a" * answer) for name, (prompt, answer) in shapes.items()]


def names(kept: object) -> list[str]:
    return [examples()[place].id for place in kept]  # type: ignore[attr-defined]


def test_too_long_rows_are_dropped_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ftlib.training.data._CHUNK", 4)
    found = filter_by_length(examples(), TEMPLATE, INPUTS, "drop")
    assert names(found.indices) == ["short", "exact"] and (found.dropped, found.truncated) == (4, 0)
    assert found.summary.splitlines() == [
        "of 6 training rows, some are longer than 10 tokens: 4 dropped (the prompts of 2 leave no room for an answer)",
        "  row over: 11 tokens, the maximum is 10",
        "  row no label: 12 tokens, the maximum is 10; the prompt alone has 10: no room for an answer",
        "  row just one: 15 tokens, the maximum is 10",
        "  row long: 35 tokens, the maximum is 10; the prompt alone has 31: no room for an answer",
    ]


def test_they_are_noted_once_in_a_runs_life(tmp_path: Path) -> None:
    run = Run(tmp_path)
    for _ in range(2):
        train._log_length_filter(run, filter_by_length(examples(), TEMPLATE, INPUTS, "drop"))
    (line,) = jsonl.read_jsonl_log(run.history)
    assert (line["event"], line["limit"], line["dropped"], line["unanswered"]) == ("too long", 10, 4, 2)
    assert len(line["rows"]) == 4


def test_of_many_rows_the_first_are_named() -> None:
    many = [Example(str(number), "", "p" * 5, "a" * (3 + (number > 0))) for number in range(30)]
    told = filter_by_length(many, TEMPLATE, INPUTS, "truncate").summary.splitlines()
    assert told[0].endswith("tokens: 29 truncated") and len(told) == 22
    assert told[1] == "  row 1: 11 tokens, the maximum is 10" and told[-1] == "  … and 9 more"


def test_truncated_rows_keep_a_label(tmp_path) -> None:
    found = filter_by_length(examples(), TEMPLATE, INPUTS, "truncate")
    assert names(found.indices) == ["short", "exact", "over", "just one"]
    assert (found.dropped, found.truncated) == (2, 2)
    rows = SupervisedDataset(
        examples(), tmp_path, TEMPLATE, INPUTS, found.indices, MixtureSampler([len(found.indices)], [1.0], seed=0)
    )
    assert len(rows) == 4
    assert [(len(row.input_ids), row.n_labels) for row in rows] == [(6, 3), (10, 4), (10, 4), (10, 1)]
    assert rows[1].input_ids[-1] == INPUTS.eos_token_id != rows[2].input_ids[-1]


def test_a_vision_models_positions_are_its_limit(shared: Path) -> None:
    """Its image tokens count: 4 of 512, then bos, the newline and eos."""
    inputs = PaliGemmaInputProcessor.load(shared / "model")
    assert inputs.max_length == 512
    rows = [Example(str(length), "x.png", "p" * length, "answer") for length in (10, 499, 500, 5000)]
    found = filter_by_length(rows, "{prefix}", inputs, "drop")
    assert list(found.indices) == [0, 1] and found.dropped == 2 and found.unanswered == 1
    assert found.messages[0] == "row 500: 513 tokens, the maximum is 512"
    long = filter_by_length([Example("0", "x.png", "p", "a" * 5000)], "{prefix}", inputs, "truncate")
    assert list(long.indices) == [0] and long.truncated == 1
    row = inputs.encode_train("p", Image.new("RGB", (8, 8)), "a" * 5000)
    assert (len(row.input_ids), row.n_labels) == (512, 512 - 4 - 3)
    assert PaliGemmaInputProcessor.load(shared / "model", max_length=100).max_length == 100
    assert PaliGemmaInputProcessor.load(shared / "model", max_length=1000).max_length == 512


def test_or_the_run_stops() -> None:
    with pytest.raises(UserError, match="row over: 11 tokens, the maximum is 10") as error:
        filter_by_length(examples(), TEMPLATE, INPUTS, "stop")
    assert len(str(error.value).splitlines()) == 5
    assert filter_by_length(examples()[:2], TEMPLATE, INPUTS, "stop").summary == ""


def test_nothing_left_is_an_error() -> None:
    with pytest.raises(UserError, match="none of the 1 training rows fits into 10 tokens"):
        filter_by_length(examples()[-1:], TEMPLATE, INPUTS, "truncate")


def test_without_a_limit_nothing_is_looked_at() -> None:
    inputs = CausalProcessor(tiny_tokenizer(), max_length=None)
    assert list(filter_by_length(examples(), "{no such field}", inputs, "stop").indices) == list(range(6))


class Picky:
    """A processor that takes nothing under two pixels in width."""

    def encode_prompts(self, prompts: list[str], image: Image.Image) -> None:
        if image.width < 2:
            raise ValueError("cannot find the channels")


def test_images_are_tried_once_and_bad_ones_named_with_their_rows(tmp_path: Path) -> None:
    for name, width in (("good", 4), ("thin", 1)):
        Image.new("RGB", (width, 4)).save(tmp_path / f"{name}.png")
    (tmp_path / "torn.png").write_bytes((tmp_path / "good.png").read_bytes()[:40])
    names = ["good.png", "good.png", "thin.png", "torn.png", "thin.png", "gone.png", ""]
    rows = [Example(f"r{number}", name, "", "a") for number, name in enumerate(names)]
    with pytest.raises(UserError) as caught:
        validate_images(images_of(rows), tmp_path, Picky())  # type: ignore[arg-type]
    thin, torn, gone, _ = str(caught.value).splitlines()
    assert thin == "row r2: thin.png: the model's processor rejects it: cannot find the channels"
    assert torn.startswith("row r3: ") and "torn.png" in torn
    assert gone.startswith("row r5: ") and gone.endswith("gone.png: no such image")
    assert list(images_of(rows[:2]).values()) == ["r0"]
    validate_images(images_of(rows[:2]), tmp_path, Picky())  # type: ignore[arg-type]
