"""Ask a model every question of a split and score the answers.

`eval/<dataset>/<split>/<before|after>/` gets predictions.jsonl (a row's id, image, prompt, prediction, references,
score and what the metrics need of it), scores.json (see `metrics/summary.py`; settings, data, overlap with the training
rows) and, for tasks with a challenge server, submission.json. Of a mixture scores.json has `parts`, the scores of each
part by itself, and every part has its submission.<part>.json; of instructions that are asked twice, see `contexts`.
While it is at work, answers lie beside it in `<before|after>.partial/`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ftlib import console, files
from ftlib.config import Config
from ftlib.config_data import CHAT
from ftlib.data.examples import Example
from ftlib.data.instruct import context_of
from ftlib.data.prepared import Prepared
from ftlib.data.prompts import prompt_of
from ftlib.errors import UserError
from ftlib.evaluation.asking import Answer, ask, wait_for, working_folder
from ftlib.evaluation.choosing import Threshold
from ftlib.evaluation.contexts import FIELD, add_bare_answers, bare_rows, paired
from ftlib.evaluation.masks import with_masks
from ftlib.evaluation.records import make_records
from ftlib.evaluation.subject import Subject
from ftlib.metrics.bootstrap import intervals
from ftlib.metrics.summary import summary
from ftlib.models.mask_decoder import MaskCodec
from ftlib.once import made_once
from ftlib.tasks import TASKS, Record, by_dataset

_LATER = ("threshold", "positive", "min_precision", "mask_decoder")
"""Settings that look at answers which are there already."""


@dataclass(frozen=True)
class Asked:
    """What is asked of whom.

    Attributes:
        config: whose task, prompt and settings hold.
        trained_on: the rows that the model learned from; none for a base model.
        shared: a folder for evaluations that other runs need too: a base model's.
        without_context: whether rows with a context are asked a second time without it.
    """

    subject: Subject
    config: Config
    prepared: Prepared
    trained_on: Sequence[Example] = ()
    shared: Path | None = None
    without_context: bool = False


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
    if asked.shared:
        return _shared_scores(asked, asked.shared, split, folder, threshold, settings)
    place = folder.with_name(f"{folder.name}.partial")
    partial = working_folder(place, questions_of(settings), lambda: bool(finished(folder, settings)))
    if console.ranks()[0] and finished(folder, settings):
        return None  # the first process needed no help
    answers = _answers(asked, split, partial, f"{asked.subject.name} on {split}")
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

    Args:
        answers: to the rows in their order; behind them those to `bare_rows`.

    Returns:
        The content of scores.json.
    """
    rows, settings = asked.prepared.rows(split), settings_of(asked, split, threshold)
    codec = _mask_codec(asked.config)
    own = answers[: len(rows)]
    records, found = make_records(asked.config, asked.prepared.labels, rows, own, split, threshold)
    add_bare_answers(records, answers[len(rows) :])
    if codec:
        records = with_masks(records, codec)
    scores = _scores(asked, records, settings, _overlap(rows, asked.trained_on)) | found
    if found:
        scores["remarks"].append(Threshold(**found["threshold"]).sentence(split))
    _publish(folder, records, scores, asked.config.task)
    return scores


def _shared_scores(
    asked: Asked, shared: Path, split: str, folder: Path, threshold: Threshold | None, settings: dict[str, Any]
) -> dict[str, Any] | None:
    """Evaluate in the shared folder, or take what is there; `folder` becomes a copy."""
    decisive = [settings, asked.subject.config.model.model_dump(), asked.prepared.labels]
    common = shared / files.fingerprint(decisive)[:16]
    place, alone = common / "evaluation", replace(asked, shared=None)
    label = f"{asked.subject.name} on {split}"
    scores = made_once(
        common, lambda: finished(place, settings), lambda: evaluate_split(alone, split, place, threshold), label
    )
    if scores is None or not console.speaks():
        return None
    with files.publish_folder(folder) as temporary:
        shutil.copytree(place, temporary, ignore=shutil.ignore_patterns(files.MARKER), dirs_exist_ok=True)
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
        **({FIELD: True} if asked.without_context else {}),
    }


def questions_of(settings: dict[str, Any]) -> dict[str, Any]:
    """What an answer depends on, of everything that a score does."""
    return {name: value for name, value in settings.items() if name not in _LATER}


def _answers(asked: Asked, split: str, partial: Path, label: str) -> list[Answer] | None:
    """To the rows and, behind them, to those that are asked again without their context."""
    rows: Sequence[Example] = asked.prepared.rows(split)
    templates = asked.config.data.templates
    if asked.without_context:
        rows = [*rows, *bare_rows(rows, templates)]
    prompts = [prompt_of(row, templates) for row in rows]
    labels, root = asked.prepared.labels, asked.prepared.root
    return ask(asked.subject, asked.config.evaluation, labels, rows, prompts, root, partial, label)


def _scores(
    asked: Asked, records: list[Record], settings: dict[str, Any], overlap: dict[str, Any] | None
) -> dict[str, Any]:
    """scores.json."""
    scores = {**_summary(asked, records), "settings": settings, "training_overlap": overlap}
    twice = paired(records)
    if parts := by_dataset(records) | twice:
        scores["parts"] = {name: _summary(asked, own) for name, own in parts.items()}
    for record, bare in zip(*twice.values(), strict=True):
        record[FIELD]["score"] = bare["score"]
    if overlap and settings["split"] != "train" and (count := overlap["rows_with_trained_images"]):
        scores["remarks"].append(f"{count} of {len(records)} rows show images that the model was trained on.")
    if asked.without_context and not twice:
        scores["remarks"].append("No row has a context that its prompt shows: none was asked without it.")
    if cut := sum("cut" in record for record in records):
        scores["remarks"].append(
            f"{cut} of {len(records)} prompts were too long for the model; their beginnings are left out."
        )
    return scores


def _summary(asked: Asked, records: list[Record]) -> dict[str, Any]:
    """What scores.json says of all rows, or of a part of them; every record gets its own score on the way."""
    measured = TASKS[asked.config.task].measure(records, asked.prepared.labels, asked.config.evaluation.positive)
    for record, score in zip(records, measured.rows or (), strict=measured.rows is not None):
        record["score"] = score
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
