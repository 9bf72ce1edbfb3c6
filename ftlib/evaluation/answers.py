"""Ask a model every question of a split and score the answers.

`eval/<dataset>/<split>/<before|after>/` gets predictions.jsonl (a row's id, image, prompt, prediction, references,
score and what the metrics need of it), scores.json (see `metrics/summary.py`; settings, data, overlap with the training
rows) and, for tasks with a challenge server, submission.json. Of a mixture scores.json has `parts`, the scores of each
part by itself, and every part has its submission.<part>.json. While it is at work, answers lie beside it in
`<before|after>.partial/`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ftlib import console, files
from ftlib.config import Config
from ftlib.config_data import CHAT
from ftlib.data.examples import Example
from ftlib.data.instruct import context_of
from ftlib.data.prepared import Prepared
from ftlib.data.prompts import prompt_of
from ftlib.errors import UserError
from ftlib.evaluation.asking import Answer, ask, wait_for, working_folder
from ftlib.evaluation.choosing import Threshold, choose, choose_threshold, precision_recall, probabilities
from ftlib.evaluation.masks import with_masks
from ftlib.evaluation.subject import Subject
from ftlib.metrics.bootstrap import intervals
from ftlib.metrics.summary import summary
from ftlib.models.mask_decoder import MaskCodec
from ftlib.tasks import TASKS, Record, by_dataset

CURVE_POINTS = 200
_LATER = ("threshold", "positive", "min_precision", "mask_decoder")
"""Settings that look at answers which are there already."""


@dataclass(frozen=True)
class Asked:
    """What is asked of whom.

    Attributes:
        config: whose task, prompt and settings hold.
        trained_on: the rows that the model learned from; none for a base model.
    """

    subject: Subject
    config: Config
    prepared: Prepared
    trained_on: Sequence[Example] = ()


def evaluate_split(asked: Asked, split: str, folder: Path, threshold: Threshold | None = None) -> dict[str, Any] | None:
    """Answer and score one split into `folder`; an earlier evaluation of the same things is kept.

    Args:
        threshold: for a positive label that is chosen by its probability; None on the split that it is chosen on.

    Returns:
        The content of scores.json; None in a process that is not the first of its job.
    """
    require_answerable(asked)
    settings = settings_of(asked, split, threshold)
    if scores := finished(folder, settings):
        console.say(f"{split}: already evaluated in {folder}")
        return scores
    rows = asked.prepared.rows(split)
    place = folder.with_name(f"{folder.name}.partial")
    partial = working_folder(place, questions_of(settings), lambda: bool(finished(folder, settings)))
    if console.ranks()[0] and finished(folder, settings):
        return None  # the first process needed no help
    answers = _answers(asked, rows, partial, f"{asked.subject.name} on {split}")
    if answers is None:
        return None
    scores = publish_scores(asked, split, folder, answers, threshold)
    shutil.rmtree(partial, ignore_errors=True)
    return scores


def require_answerable(asked: Asked) -> None:
    """Refuse what could not be scored, before anything is asked.

    Raises:
        UserError: a positive label that no row has, a chat model for other prompts, no weights to decode masks with.
    """
    require_settings(asked.config, asked.prepared)
    _require_same_prompts(asked)


def publish_scores(
    asked: Asked, split: str, folder: Path, answers: Sequence[Answer], threshold: Threshold | None
) -> dict[str, Any]:
    """Score the answers to a split and write them into `folder`.

    Returns:
        The content of scores.json.
    """
    rows, settings = asked.prepared.rows(split), settings_of(asked, split, threshold)
    codec = _mask_codec(asked.config)
    records, found = _records(asked, rows, answers, split, threshold)
    if codec:
        records = with_masks(records, codec)
    scores = _scores(asked, records, settings, _overlap(rows, asked.trained_on)) | found
    if found:
        scores["remarks"].append(Threshold(**found["threshold"]).sentence(split))
    _publish(folder, records, scores, asked.config.task)
    return scores


def require_settings(config: Config, prepared: Prepared) -> MaskCodec | None:
    """Refuse what no split could be scored with.

    Returns:
        What reads the answers of task segment.

    Raises:
        UserError: a positive label that nobody answers with; no weights for masks, or not the authors'.
    """
    positive, labels = config.evaluation.positive, prepared.labels
    if positive is not None and positive not in labels:
        shown = ", ".join(labels[:10])
        raise UserError(f"evaluation.positive: {positive!r} is none of the dataset's answers ({shown})")
    return _mask_codec(config)


def _require_same_prompts(asked: Asked) -> None:
    """Conversations end their answers in another way than texts do."""
    own, other = asked.subject.config.data.prompt, asked.config.data.prompt
    if (own == CHAT) != (other == CHAT):
        raise UserError(f"data.prompt: the model is asked with {own!r}, this dataset with {other!r}")


def _mask_codec(config: Config) -> MaskCodec | None:
    if config.task != "segment":
        return None
    if config.evaluation.mask_decoder is None:
        remedy = "Give the path of vae-oid.npz (gs://big_vision/paligemma/vae-oid.npz)."
        raise UserError("evaluation.mask_decoder: task segment needs the weights that turn codes into masks", remedy)
    return MaskCodec.load(Path(config.evaluation.mask_decoder))


def threshold_of(asked: Asked, folder: Path) -> Threshold | None:
    """The threshold that the model's own valid rows give, if the config wants one; they are asked if need be.

    Args:
        folder: where valid is evaluated.
    """
    evaluation = asked.config.evaluation
    if evaluation.decode != "choose" or evaluation.positive is None:
        return None
    return Threshold(**scores_everywhere(asked, "valid", folder)["threshold"])


def scores_everywhere(asked: Asked, split: str, folder: Path) -> dict[str, Any]:
    """`evaluate_split`, with its scores in every process of the job."""
    settings = settings_of(asked, split, None)
    return evaluate_split(asked, split, folder) or wait_for(lambda: finished(folder, settings), str(folder))


def finished(folder: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The scores of an earlier evaluation of the same things."""
    if not files.is_complete(folder):
        return None
    scores: dict[str, Any] = files.read_json(folder / "scores.json")
    return scores if scores["settings"] == settings else None


def settings_of(asked: Asked, split: str, threshold: Threshold | None) -> dict[str, Any]:
    """Everything that the scores depend on."""
    evaluation = asked.config.evaluation
    own = {
        "choose": ["positive", "min_precision"],
        "generate": ["num_beams", "max_new_tokens", "generation", "positive"],
    }
    return {
        "model": asked.subject.name,
        "weights": asked.subject.digest,
        "task": asked.config.task,
        "prompt": asked.config.data.prompt,
        **({"prompts": asked.config.data.templates} if asked.config.data.parts else {}),
        "split": split,
        "fingerprint": asked.prepared.facts["splits"][split]["fingerprint"],
        "trained_on": files.fingerprint(sorted(row.digest for row in asked.trained_on))[:16],
        "decode": evaluation.decode,
        **{name: getattr(evaluation, name) for name in own[evaluation.decode]},
        "mask_decoder": files.sha256(Path(evaluation.mask_decoder)) if evaluation.mask_decoder else None,
        "labels": asked.prepared.labels if evaluation.decode == "choose" else None,
        "threshold": threshold.as_json() if threshold else None,
    }


def questions_of(settings: dict[str, Any]) -> dict[str, Any]:
    """What an answer depends on, of everything that a score does."""
    return {name: value for name, value in settings.items() if name not in _LATER}


def _answers(asked: Asked, rows: Sequence[Example], partial: Path, label: str) -> list[Answer] | None:
    templates = asked.config.data.templates
    prompts = [prompt_of(row, templates) for row in rows]
    labels, root = asked.prepared.labels, asked.prepared.root
    return ask(asked.subject, asked.config.evaluation, labels, rows, prompts, root, partial, label)


def _records(
    asked: Asked, rows: Sequence[Example], answers: Sequence[Answer], split: str, threshold: Threshold | None
) -> tuple[list[Record], dict[str, Any]]:
    """The lines of predictions.jsonl but for their scores, and what scores.json says of a threshold."""
    if asked.config.evaluation.decode == "generate":
        return [
            _record(row, asked.config, answer["text"], answer) for row, answer in zip(rows, answers, strict=True)
        ], {}
    evaluation, labels = asked.config.evaluation, asked.prepared.labels
    shares = probabilities([answer["likelihoods"] for answer in answers])
    found: dict[str, Any] = {}
    if evaluation.positive is not None:
        scores = shares[:, labels.index(evaluation.positive)]
        truth = np.array([row.suffix == evaluation.positive for row in rows])
        threshold = threshold or choose_threshold(scores, truth, evaluation.min_precision, split)
        found = {"threshold": threshold.as_json(), "precision_recall": _curve(scores, truth)}
    records = []
    texts = choose(shares, labels, evaluation.positive, threshold)
    for row, text, answer, row_shares in zip(rows, texts, answers, shares, strict=True):
        likely = {label: round(float(share), 12) for label, share in zip(labels, row_shares, strict=True)}
        records.append(_record(row, asked.config, text, answer) | {"probabilities": likely})
    return records, found


def _curve(scores: Any, truth: Any) -> dict[str, list[float]] | None:
    """At most 200 points of the precision/recall curve; none without a row that has the positive label."""
    if not truth.any():
        return None
    columns = precision_recall(scores, truth)
    places = np.unique(np.linspace(0, len(columns[0]) - 1, CURVE_POINTS).round().astype(int))
    names = ("threshold", "precision", "recall")
    return {name: [round(float(x), 6) for x in column[places]] for name, column in zip(names, columns, strict=True)}


def _record(row: Example, config: Config, text: str, answer: Answer) -> Record:
    return {
        "id": row.id,
        "image": row.image,
        "prompt": prompt_of(row, config.data.templates),
        "prediction": TASKS[config.task].parse(text),
        "references": list(row.references) or [row.suffix],
        **({"facts": row.facts} if row.facts else {}),
        **({"dataset": row.dataset} if row.dataset else {}),
        **({"cut": True} if answer.get("cut") else {}),
    }


def _scores(
    asked: Asked, records: list[Record], settings: dict[str, Any], overlap: dict[str, Any] | None
) -> dict[str, Any]:
    """scores.json; every record gets its own score on the way."""
    measured = TASKS[asked.config.task].measure(records, asked.prepared.labels, asked.config.evaluation.positive)
    for record, score in zip(records, measured.rows or (), strict=measured.rows is not None):
        record["score"] = score
    scores = {**summary(measured, intervals(measured)), "settings": settings, "training_overlap": overlap}
    if parts := by_dataset(records):
        scores["parts"] = {name: _part_scores(asked, own) for name, own in parts.items()}
    if overlap and settings["split"] != "train" and (count := overlap["rows_with_trained_images"]):
        scores["remarks"].append(f"{count} of {len(records)} rows show images that the model was trained on.")
    if cut := sum("cut" in record for record in records):
        scores["remarks"].append(
            f"{cut} of {len(records)} prompts were too long for the model; their beginnings are left out."
        )
    return scores


def _part_scores(asked: Asked, records: list[Record]) -> dict[str, Any]:
    """What scores.json says of one part of a mixture."""
    measured = TASKS[asked.config.task].measure(records, asked.prepared.labels, asked.config.evaluation.positive)
    return summary(measured, intervals(measured))


def _overlap(rows: Sequence[Example], trained_on: Sequence[Example]) -> dict[str, Any] | None:
    """How many of the rows, and of their images by content, the model has learned from; None for a base model."""
    if not trained_on:
        return None
    images = {row.digest for row in trained_on if row.digest}
    questions = {_content(row) for row in trained_on}
    return {
        "rows": sum(_content(row) in questions for row in rows),
        "rows_with_trained_images": sum(row.digest in images for row in rows),
    }


def _content(row: Example) -> tuple[str, str, str, str]:
    return row.digest, row.prefix, context_of(row), row.suffix


def _publish(folder: Path, records: list[Record], scores: dict[str, Any], task: str) -> None:
    submission = TASKS[task].submission
    datasets = by_dataset(records) or {"": records}
    results = {name: submission(own) for name, own in datasets.items()} if submission else {}
    with files.publish_folder(folder) as temporary:
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        files.write_text(temporary / "predictions.jsonl", lines)
        for name, result in results.items():
            if result is not None:
                text = json.dumps(result, ensure_ascii=False)
                files.write_text(temporary / f"submission{name and '.'}{name}.json", text)
        files.write_json(temporary / "scores.json", scores)
