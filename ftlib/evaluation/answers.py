"""Ask a model every question of a split and score the answers.

`eval/<dataset>/<split>/<before|after>/` gets predictions.jsonl (id, image, prompt, prediction, references, score) and
scores.json (the task's metrics; value, 95 % interval, n and invalid of its headline; settings and data).
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ftlib import console, files
from ftlib.config import Config
from ftlib.data.examples import Example
from ftlib.data.images import image_path, open_image
from ftlib.data.prepared import Prepared
from ftlib.data.prompts import prompt_of
from ftlib.hub import find_model
from ftlib.metrics.bootstrap import LEVEL, RESAMPLES, mean_interval
from ftlib.models.generate import answer_rows, by_length
from ftlib.models.loading import load_adapter, load_weights
from ftlib.models.paligemma import PaliGemmaInputs, Row
from ftlib.runs import Run
from ftlib.site import Site
from ftlib.tasks import TASKS


@dataclass(frozen=True)
class Subject:
    """A model to be asked; it is loaded when the first question comes.

    Attributes:
        name: the base model, or the result folder.
        weights: the folder with the model, or with the base of `adapter`.
        adapter: a PEFT folder.
    """

    name: str
    weights: Path
    dtype: str
    adapter: Path | None = None

    @functools.cached_property
    def inputs(self) -> PaliGemmaInputs:
        """The model's own processor."""
        return PaliGemmaInputs.load(self.weights)

    @functools.cached_property
    def model(self) -> torch.nn.Module:
        """The weights, on the GPU if there is one."""
        model: torch.nn.Module = load_weights(self.weights, self.dtype)
        if self.adapter:
            model = load_adapter(model, self.adapter)
        return model.to("cuda" if torch.cuda.is_available() else "cpu")

    @functools.cached_property
    def digest(self) -> str:
        """Identifies the weights in scores.json."""
        return _digest(self.adapter or self.weights)

    def answer(self, rows: Sequence[Row], max_new_tokens: int) -> list[str]:
        """Answer one batch."""
        return answer_rows(self.model, self.inputs, rows, max_new_tokens)


def untrained(config: Config, site: Site) -> Subject:
    """The base model of a config, for scores before training."""
    return Subject(config.model.base, find_model(config.model, site), config.model.dtype)


def trained(config: Config, run: Run, site: Site) -> Subject:
    """A run's result, for scores after training."""
    result = run.result(config.adapter.method)
    if config.adapter.method == "full":
        return Subject(result.name, result, config.model.dtype)
    return Subject(result.name, find_model(config.model, site), config.model.dtype, adapter=result)


def evaluate_split(subject: Subject, config: Config, prepared: Prepared, split: str, folder: Path) -> dict[str, Any]:
    """Answer and score one split into `folder`; an earlier evaluation of the same things is kept.

    Returns:
        The content of scores.json.
    """
    settings = _settings(subject, config, prepared, split)
    if files.is_complete(folder):
        scores: dict[str, Any] = files.read_json(folder / "scores.json")
        if scores["settings"] == settings:
            console.say(f"{split}: already evaluated in {folder}")
            return scores
    rows = prepared.rows(split)
    texts = _ask(subject, config, prepared.root, rows, label=f"{subject.name} on {split}")
    records = [_record(row, text, config) for row, text in zip(rows, texts, strict=True)]
    scores = _scores(records, config, prepared.labels, settings)
    with files.publish_folder(folder) as temporary:
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        files.write_text(temporary / "predictions.jsonl", lines)
        files.write_json(temporary / "scores.json", scores)
    return scores


def _settings(subject: Subject, config: Config, prepared: Prepared, split: str) -> dict[str, Any]:
    return {
        "model": subject.name,
        "weights": subject.digest,
        "task": config.task,
        "prompt": config.data.prompt,
        "split": split,
        "fingerprint": prepared.facts["splits"][split]["fingerprint"],
        "max_new_tokens": config.evaluation.max_new_tokens,
        "decoding": "greedy",
    }


def _ask(subject: Subject, config: Config, root: Path, rows: Sequence[Example], label: str) -> list[str]:
    """Generated texts in the order of the rows."""
    texts = [""] * len(rows)
    done = 0
    prompts = [prompt_of(row, config.data.prompt) for row in rows]
    with console.progress(label, len(rows)) as update:
        for batch in by_length([len(prompt) for prompt in prompts], config.evaluation.batch_size):
            encoded = [
                subject.inputs.prompt_row(prompts[index], open_image(image_path(root, rows[index].image)))
                for index in batch
            ]
            answers = subject.answer(encoded, config.evaluation.max_new_tokens)
            for index, answer in zip(batch, answers, strict=True):
                texts[index] = answer
            done += len(batch)
            update(done, "")
    return texts


def _record(row: Example, text: str, config: Config) -> dict[str, Any]:
    task = TASKS[config.task]
    answer = task.parse(text)
    return {
        "id": row.id,
        "image": row.image,
        "prompt": prompt_of(row, config.data.prompt),
        "prediction": answer,
        "references": [row.suffix],
        "score": task.score_row(answer, [row.suffix]),
    }


def _scores(
    records: list[dict[str, Any]], config: Config, labels: list[str], settings: dict[str, Any]
) -> dict[str, Any]:
    task = TASKS[config.task]
    answers = [record["prediction"] for record in records]
    summary = task.summarize(answers, [record["references"][0] for record in records], labels)
    low, high = mean_interval([record["score"] for record in records])
    return {
        "metric": task.headline,
        "value": summary[task.headline],
        "interval": [low, high],
        "interval_method": f"percentile bootstrap over rows, {RESAMPLES} resamples, level {LEVEL}",
        "n": len(records),
        "invalid": summary["invalid"],
        "metrics": summary,
        "settings": settings,
    }


def _digest(folder: Path) -> str:
    """Hash of the weight files' hashes (from the folder's marker, or of the files themselves)."""
    marker = folder / files.MARKER
    if marker.is_file():
        return files.fingerprint(files.read_json(marker))[:16]
    return files.fingerprint({path.name: files.sha256(path) for path in sorted(folder.glob("*.safetensors"))})[:16]
