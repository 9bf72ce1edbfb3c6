"""A tiny GPT-NeoX learns string tasks from scratch, in some minutes on one core. Run by `make long`."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY, read_lines, start_ftlib


@pytest.mark.long
def test_instructions_are_learned_and_held_out_words_are_answered(store: Path) -> None:
    config = REPOSITORY / "configs" / "instruct_tiny.yaml"
    began = time.monotonic()
    for command in ("stage", "prepare", "train", "evaluate"):
        process = start_ftlib(command, config)
        error = process.communicate()[1]
        assert process.returncode == 0, error
    (run,) = (store / "runs").glob("*/instruct_tiny/*")
    values = {}
    for when in ("before", "after"):
        folder = run / "eval" / "string_tasks" / "test" / when
        values[when] = json.loads((folder / "scores.json").read_text())["value"]
        rows = read_lines(folder / "predictions.jsonl")
        for name in ("reverse", "next", "count"):
            right = [row["prediction"] == row["references"][0] for row in rows if row["facts"]["instruction"] == name]
            print(f"{when} {name}: {sum(right)} of {len(right)}", flush=True)
    print(f"exact match on held-out words: {values['before']:.2f} %, then {values['after']:.2f} %")
    print(f"in {time.monotonic() - began:.0f} s")
    assert values["before"] <= 5 and values["after"] >= 90
