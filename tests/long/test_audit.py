"""An audit of the digits with 5 % of the labels flipped, by five folds trained from scratch. Run by `make long`."""

from __future__ import annotations

import csv
import json
import random
import shutil
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY, read_lines, start_ftlib


def run(*arguments: object) -> str:
    process = start_ftlib(*arguments)
    output, error = process.communicate()
    assert process.returncode == 0, error
    return output.strip().splitlines()[-1] if output.strip() else ""


@pytest.mark.long
def test_flipped_digits_are_found(store: Path, tmp_path: Path) -> None:
    run("stage", REPOSITORY / "configs" / "digits.yaml")
    root = tmp_path / "noisy"
    shutil.copytree(store / "datasets" / "digits" / "images", root / "images")
    rows, draw = read_lines(store / "datasets" / "digits" / "data.jsonl"), random.Random(0)
    flipped = {}
    for index in draw.sample(range(len(rows)), round(0.05 * len(rows))):
        flipped[rows[index]["id"]] = rows[index]["suffix"]
        rows[index]["suffix"] = draw.choice([digit for digit in "0123456789" if digit != rows[index]["suffix"]])
    (root / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    overrides = ["name=noisy", "data.source=jsonl", f"data.root={root}"]
    page = Path(run("audit", REPOSITORY / "configs" / "digits.yaml", "--executor", "debug", *overrides))
    listed = list(csv.DictReader(page.with_name("audit-labels.csv").open(newline="")))
    hits = [row for row in listed if row["id"] in flipped]
    precision, recall = len(hits) / len(listed), len(hits) / len(flipped)
    right = sum(row["suggested"] == flipped[row["id"]] for row in hits) / len(hits)
    print(
        f"{len(listed)} listed, precision {precision:.3f}, recall {recall:.3f}, suggestions right {right:.3f}",
        flush=True,
    )
    assert precision >= 0.8 and recall >= 0.8 and right >= 0.9
    assert any(row["split"] == "test" for row in hits)
    assert page.read_text().count('<img src="data:image/') >= len(listed)
