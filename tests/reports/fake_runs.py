"""Small run folders with real files, written as ftlib writes them; no model, no torch."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ftlib.config.loader import load_experiment
from ftlib.core import files, jsonl
from ftlib.core.paths import Site
from ftlib.metrics import classification
from ftlib.metrics.summary import summary
from ftlib.metrics.uncertainty import confidence_intervals
from ftlib.reports.run_record import RunRecord, read_run_record
from ftlib.runs import run as runs
from ftlib.runs.run import Run
from ftlib.slurm.status import run_statuses

PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mP8z8BQDwAEhQGAhKmMIQAAAABJRU5ErkJggg=="
)
CONFIG = """
name: pets
task: classify
model: {family: paligemma, base: ftlib/tiny-paligemma}
adapter: {method: lora}
data: {source: jsonl, root: "${store}/datasets/pets", prompt: "{prefix}"}
training: {num_train_epochs: 2, per_device_train_batch_size: 4}
evaluation: {splits: [valid]}
"""
START = {
    "python": "3.12.1",
    "host": "node7",
    "cpus": 8,
    "gpus": ["NVIDIA A100"],
    "job": "4711",
    "packages": {"torch": "2.9.1"},
    "code": "0123456789ab",
}


def new_run(site: Site, folder: Path, config: str) -> Run:
    """An untouched run of a config's text."""
    path = folder / "experiment.yaml"
    path.write_text(config, encoding="utf-8")
    return runs.create_run(load_experiment(path, [], site), site)


def record_of(run: Run, site: Site) -> RunRecord:
    """What a report of the run begins with."""
    return read_run_record(run, site, *run_statuses([run], site))


def train(run: Run, steps: int = 30, resumed_at: int = 0, labels: Sequence[str] | None = ("cat", "dog")) -> None:
    """Leave what training leaves before it is finished; of very many labels there is no list."""
    splits = {"train": {"rows": 1234, "fingerprint": "feed0001"}, "valid": {"rows": 3, "fingerprint": "feed0002"}}
    files.write_json(run.data, {"source": "jsonl", "rule": {"valid": 0.1}, "labels": labels, "splits": splits})
    run.log_event("start", step=0, attempt=0)
    run.log_environment(START)
    if resumed_at:
        run.log_event("start", step=resumed_at, attempt=0)
        run.log_environment({**START, "host": "node8"})
    for step in range(1, steps + 1):
        line = {
            "step": step,
            "attempt": 0,
            "loss": 4 / step,
            "grad_norm": 1.0,
            "learning_rate": 1e-3 * (1 - step / steps),
            "seconds": 0.25,
            "memory_gib": 2.0 + (step > 10),
        }
        jsonl.append_jsonl(run.metrics, line)


def finish(run: Run, steps: int = 30) -> None:
    """Leave what the end of training leaves."""
    run.log_event("done", step=steps, seconds=12.5)
    files.write_json(run.done_marker, {"step": steps, "result": "adapter", "threads": 3})


def row(number: int, answer: str, expected: str, **more: Any) -> dict[str, Any]:
    """One line of predictions.jsonl."""
    known = {"id": f"row-{number}", "image": "images/a.png", "prompt": "which pet?", "prediction": answer}
    return {**known, "references": [expected], "score": float(answer == expected), **more}


def evaluate(run: Run, split: str, when: str, rows: list[dict[str, Any]], dataset: str = "jsonl", **more: Any) -> None:
    """Publish answers and their scores, as `ftlib evaluate` does."""
    references = [item["references"][0] for item in rows]
    labels = sorted(set(references))
    measured = classification.measure([item["prediction"] for item in rows], references, labels)
    scores = {
        **summary(measured, confidence_intervals(measured)),
        "settings": {"fingerprint": "feed0002", "prompt": "{prefix}"},
    }
    with files.atomic_directory(run.evaluation_folder(dataset, split, when)) as folder:
        text = "".join(json.dumps(item) + "\n" for item in rows)
        files.write_text(folder / "predictions.jsonl", text)
        files.write_json(folder / "scores.json", {**scores, **more})


BEFORE_ROWS = [row(1, "", "cat"), row(2, "dog", "dog"), row(3, "bird", "dog"), row(4, "cat", "cat")]
AFTER_ROWS = [row(1, "cat", "cat"), row(2, "cat", "dog"), row(3, "dog", "dog"), row(4, "cat", "cat")]
