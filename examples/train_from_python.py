"""Train and evaluate from Python: the same config with two seeds, and a report that compares the runs.

    python examples/train_from_python.py [STEPS]

It needs no GPU and downloads nothing; 60 steps, the default, take about a minute on two cores. Run it again, and it
resumes or shows what exists. Model, data and runs are stored where the commands store them, by default in ./store.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import ftlib

CONFIG = Path(__file__).parent.parent / "configs" / "digits.yaml"


def main(steps: int) -> None:
    """Train with two seeds, then print the scores of each run on the test split and the path of the report."""
    runs = []
    for seed in (0, 1):
        overrides: dict[str, Any] = {
            "name": "digits-from-python",
            "seed": seed,
            "training.max_steps": steps,
            "evaluation.before": False,
        }
        config = ftlib.load_config(CONFIG, overrides)
        ftlib.stage(config)
        ftlib.prepare(config)
        run = ftlib.train(config)
        for scores in ftlib.evaluate(run, splits=["test"]):
            low, high = scores["interval"]
            print(f"seed {seed}: {scores['metric']} {scores['value']:.3f} ({low:.3f} to {high:.3f}, n = {scores['n']})")
        runs.append(run)
    print(ftlib.report(runs))


if __name__ == "__main__":
    try:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 60)
    except ftlib.UserError as error:  # says what is wrong and what to do
        sys.exit(f"{error}")
