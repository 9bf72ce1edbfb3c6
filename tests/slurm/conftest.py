"""Configs without a model or data behind them: nothing here needs torch."""

from __future__ import annotations

from pathlib import Path

import pytest

CONFIG = """\
name: tiny
task: classify
seed: 3
model: {family: paligemma, base: ftlib/tiny-paligemma}
adapter: {method: full}
data: {source: jsonl, root: "${store}/data"}
training: {max_steps: 12}
evaluation: {splits: [valid, test]}
job: {cpus: 1, gpus: 0}
"""


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    """A config of nine lines."""
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG)
    return path
