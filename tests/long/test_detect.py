"""Detection learned from scratch: digits that were never seen, found and named. Run by `make long`."""

from __future__ import annotations

import json
import resource
import time
from pathlib import Path

import pytest

from ftlib.tasks.registry import load_task
from tests.conftest import REPOSITORY, read_lines, start_ftlib

CONFIG = REPOSITORY / "configs" / "digits_detect.yaml"


def run(*arguments: object) -> str:
    """What a command printed last on stdout; its seconds and CPU seconds are said."""
    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    process = start_ftlib(*arguments)
    output, error = process.communicate()
    assert process.returncode == 0, error
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    words = " ".join(map(str, arguments)).replace(f"{REPOSITORY}/", "")
    print(f"{words}: {time.monotonic() - began:.0f} s, {cpu:.0f} s of CPU time", flush=True)
    return output.strip().splitlines()[-1] if output.strip() else ""


def scores(run_folder: str, when: str) -> dict[str, float]:
    folder = Path(run_folder) / "eval" / "digits_detect" / "test" / when
    found = json.loads((folder / "scores.json").read_text())
    values = {name: one["value"] for name, one in found["metrics"].items()}
    print(
        f"{when}: AP50 {values['AP50']:.3f}, AP {values['AP']:.3f}, {found['invalid']} of {found['n']} invalid",
        flush=True,
    )
    return values


def by_chance(run_folder: str) -> float:
    """AP50 when every canvas gets the answer to the next one."""
    records = read_lines(Path(run_folder) / "eval" / "digits_detect" / "test" / "after" / "predictions.jsonl")
    answers = [record["prediction"] for record in records]
    moved = [
        {**record, "prediction": answer} for record, answer in zip(records, [*answers[1:], answers[0]], strict=True)
    ]
    return load_task("detect").score(moved, [], None).values()["AP50"]


@pytest.mark.long
def test_digits_are_found_and_named(store: Path) -> None:
    for command in ("stage", "prepare"):
        run(command, CONFIG)
    short = run("train", CONFIG, "name=short", "training.num_train_epochs=1")
    whole = run("train", CONFIG)
    values = []
    for folder in (short, whole):
        run("evaluate", folder, "--split", "test")
        values.append(scores(folder, "after")["AP50"])
    chance = by_chance(whole)
    print(f"AP50 of answers to other canvases: {chance:.3f}", flush=True)
    assert scores(whole, "before")["AP50"] <= 0.02
    assert chance < 0.1
    assert values[0] > chance + 0.05
    assert values[1] > values[0] + 0.1
    assert values[1] >= 0.5
