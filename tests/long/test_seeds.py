"""The demo over five seeds: training from scratch is no lottery any more. Run by `make long`."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest

from tests.conftest import start_ftlib


@pytest.mark.long
def test_the_demo_over_five_seeds(store: Path) -> None:
    values = []
    for seed in range(5):
        process = start_ftlib("demo", f"seed={seed}", f"data.split.seed={seed}", f"name=seed{seed}")
        error = process.communicate()[1]
        assert process.returncode == 0, error
        (scores,) = (store / "runs").glob(f"*/seed{seed}/*/eval/digits/test/after/scores.json")
        values.append(json.loads(scores.read_text())["value"])
        print(f"seed {seed}: test accuracy {values[-1]:.4f}; {error.strip().splitlines()[-1]}", flush=True)
    print(f"median {statistics.median(values):.4f}, least {min(values):.4f}")
    assert statistics.median(values) >= 0.95
    assert min(values) >= 0.9
