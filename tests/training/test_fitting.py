"""Rows that are too long for the model: dropped, truncated or refused, and counted."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from ftlib import files
from ftlib.data.examples import Example
from ftlib.errors import UserError
from ftlib.models.causal import CausalInputs
from ftlib.models.tiny_neox import tiny_tokenizer
from ftlib.runs import Run
from ftlib.training import fit
from ftlib.training.batching import Draw, TrainingRows
from ftlib.training.fitting import fit_rows, try_images

TEMPLATE = "{prefix}\n"
INPUTS = CausalInputs(tiny_tokenizer(), limit=10)


def examples() -> list[Example]:
    """A character is a token: prompt and newline, answer and eos."""
    shapes = {"short": (2, 2), "exact": (5, 3), "over": (5, 4), "no label": (9, 1), "just one": (8, 5), "long": (30, 3)}
    return [Example(name, "", "p" * prompt, "a" * answer) for name, (prompt, answer) in shapes.items()]


def names(kept: object) -> list[str]:
    return [examples()[place].id for place in kept]  # type: ignore[attr-defined]


def test_too_long_rows_are_dropped_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ftlib.training.fitting._CHUNK", 4)
    found = fit_rows(examples(), TEMPLATE, INPUTS, "drop")
    assert names(found.kept) == ["short", "exact"] and (found.dropped, found.truncated) == (4, 0)
    assert found.sentence.splitlines() == [
        "of 6 training rows, those of more than 10 tokens were too long: 4 dropped "
        "(the prompts of 2 leave no room for an answer)",
        "  row over: 11 tokens, the model takes 10",
        "  row no label: 12 tokens, the model takes 10; its prompt alone has 10: no room for an answer",
        "  row just one: 15 tokens, the model takes 10",
        "  row long: 35 tokens, the model takes 10; its prompt alone has 31: no room for an answer",
    ]


def test_they_are_noted_once_in_a_runs_life(tmp_path: Path) -> None:
    run = Run(tmp_path)
    for _ in range(2):
        fit._note_too_long(run, fit_rows(examples(), TEMPLATE, INPUTS, "drop"))
    (line,) = files.read_jsonl_log(run.history)
    assert (line["event"], line["limit"], line["dropped"], line["unanswered"]) == ("too long", 10, 4, 2)
    assert len(line["rows"]) == 4


def test_of_many_rows_the_first_are_named() -> None:
    many = [Example(str(number), "", "p" * 5, "a" * (3 + (number > 0))) for number in range(30)]
    told = fit_rows(many, TEMPLATE, INPUTS, "truncate").sentence.splitlines()
    assert told[0].endswith("were too long: 29 truncated") and len(told) == 22
    assert told[1] == "  row 1: 11 tokens, the model takes 10" and told[-1] == "  … and 9 more"


def test_truncated_rows_keep_a_label(tmp_path) -> None:
    found = fit_rows(examples(), TEMPLATE, INPUTS, "truncate")
    assert names(found.kept) == ["short", "exact", "over", "just one"]
    assert (found.dropped, found.truncated) == (2, 2)
    rows = TrainingRows(examples(), tmp_path, TEMPLATE, INPUTS, found.kept, Draw([len(found.kept)], [1.0], seed=0))
    assert len(rows) == 4
    assert [(len(row.ids), row.n_answer) for row in rows] == [(6, 3), (10, 4), (10, 4), (10, 1)]
    assert rows[1].ids[-1] == INPUTS.eos_id != rows[2].ids[-1]


def test_or_the_run_stops() -> None:
    with pytest.raises(UserError, match="row over: 11 tokens, the model takes 10") as error:
        fit_rows(examples(), TEMPLATE, INPUTS, "stop")
    assert len(str(error.value).splitlines()) == 5
    assert fit_rows(examples()[:2], TEMPLATE, INPUTS, "stop").sentence == ""


def test_nothing_left_is_an_error() -> None:
    with pytest.raises(UserError, match="none of 1 training rows fits into 10 tokens"):
        fit_rows(examples()[-1:], TEMPLATE, INPUTS, "truncate")


def test_without_a_limit_nothing_is_looked_at() -> None:
    inputs = CausalInputs(tiny_tokenizer(), limit=None)
    assert list(fit_rows(examples(), "{no such field}", inputs, "stop").kept) == list(range(6))


class Picky:
    """A processor that takes nothing under two pixels in width."""

    def prompt_rows(self, prompts: list[str], image: Image.Image) -> None:
        if image.width < 2:
            raise ValueError("cannot find the channels")


def test_images_are_tried_once_and_bad_ones_named_with_their_rows(tmp_path: Path) -> None:
    for name, width in (("good", 4), ("thin", 1)):
        Image.new("RGB", (width, 4)).save(tmp_path / f"{name}.png")
    (tmp_path / "torn.png").write_bytes((tmp_path / "good.png").read_bytes()[:40])
    names = ["good.png", "good.png", "thin.png", "torn.png", "thin.png", "gone.png", ""]
    rows = [Example(f"r{number}", name, "", "a") for number, name in enumerate(names)]
    with pytest.raises(UserError) as caught:
        try_images(rows, tmp_path, Picky())  # type: ignore[arg-type]
    thin, torn, gone, _ = str(caught.value).splitlines()
    assert thin == "row r2: thin.png: the model's processor rejects it: cannot find the channels"
    assert torn.startswith("row r3: ") and "torn.png" in torn
    assert gone.startswith("row r5: ") and gone.endswith("gone.png: no such image")
    assert try_images(rows[:2], tmp_path, Picky()) == 1  # type: ignore[arg-type]
