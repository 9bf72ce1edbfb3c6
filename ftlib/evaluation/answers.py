"""Ask a model every question of a split and score the answers.

`eval/<dataset>/<split>/<before|after>/` gets predictions.jsonl (a row's id, image, prompt, prediction, references,
score and what the metrics need of it), scores.json (see `metrics/summary.py`; settings, data, overlap with the training
rows) and, for tasks with a challenge server, submission.json. Of a mixture scores.json has `parts`, the scores of each
part by itself, and every part has its submission.<part>.json; of instructions that are asked twice, see `contexts`.
While it is at work, answers lie beside it in `<before|after>.partial/`; of several processes one is.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ftlib import console, files
from ftlib.config import Config
from ftlib.config_data import CHAT
from ftlib.data.examples import Example
from ftlib.data.overlap import overlap
from ftlib.data.prepared import Prepared
from ftlib.data.prompts import prompt_of
from ftlib.errors import UserError
from ftlib.evaluation.asked import Asked, finished, questions_of, settings_of
from ftlib.evaluation.asking import Answer, ask, count_answers, wait_for, working_folder
from ftlib.evaluation.choosing import Threshold
from ftlib.evaluation.contexts import FIELD, add_bare_answers, bare_rows, paired
from ftlib.evaluation.masks import with_masks
from ftlib.evaluation.records import make_records
from ftlib.identity import lasting
from ftlib.metrics.bootstrap import intervals
from ftlib.metrics.summary import summary
from ftlib.models.mask_decoder import MaskCodec
from ftlib.once import made_once
from ftlib.tasks import TASKS, Record, by_dataset

_ANSWERS = "answers"


def evaluate_split(asked: Asked, split: str, folder: Path, threshold: Threshold | None = None) -> dict[str, Any] | None:
    """Answer and score one split into `folder`; an earlier evaluation of the same things is kept.

    Args:
        threshold: for a positive label that is chosen by its probability; None on the split that it is chosen on.

    Returns:
        The content of scores.json; None in a process that is not the first of its job.
    """
    require_answerable(asked, split)
    settings = settings_of(asked, split, threshold)
    if scores := finished(folder, settings):
        console.say(f"{split}: already evaluated in {folder}")
        return scores
    if asked.shared:
        return _shared_scores(asked, split, folder, threshold, settings)
    place, label = _working_place(asked, folder, settings), f"{asked.subject.name} on {split}"

    def look() -> dict[str, Any] | None:
        return finished(folder, settings)

    def make() -> dict[str, Any] | None:
        partial = working_folder(place / _ANSWERS, questions_of(settings), lambda: bool(look()))
        if console.ranks()[0] and look():
            return None  # the first process needed no help
        answers = _answers(asked, split, partial, label)
        if answers is None:
            return None
        scores = publish_scores(asked, split, folder, answers, threshold)
        shutil.rmtree(partial, ignore_errors=True)
        return scores

    scores = made_once(place, look, make, label)
    with contextlib.suppress(OSError):
        place.rmdir()  # unless another process is at work there by now
    return scores if console.speaks() else None


def require_answerable(asked: Asked, split: str) -> None:
    """Refuse what could not be scored, before anything is asked.

    Raises:
        UserError: no rows, a positive label that none has, a chat model for other prompts, no weights to decode masks
            with.
    """
    asked.prepared.require_rows([split])
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
    scores = _scores(asked, records, settings, overlap(rows, asked.trained_on)) | found
    if found:
        scores["remarks"].append(Threshold(**found["threshold"]).sentence(split))
    _publish(folder, records, scores, asked.config.task)
    return scores


def _made_in(asked: Asked, folder: Path, settings: dict[str, Any]) -> Path:
    """The shared folder that `folder` becomes a copy of; without one, itself."""
    if asked.shared is None:
        return folder
    decisive = [settings, lasting(asked.subject.config.model), asked.prepared.labels]
    return asked.shared / files.fingerprint(decisive)[:16] / "evaluation"


def _working_place(asked: Asked, folder: Path, settings: dict[str, Any]) -> Path:
    made = _made_in(asked, folder, settings)
    return made.with_name(f"{made.name}.partial")


def _shared_scores(
    asked: Asked, split: str, folder: Path, threshold: Threshold | None, settings: dict[str, Any]
) -> dict[str, Any] | None:
    """Evaluate in the shared folder, or take what is there."""
    place = _made_in(asked, folder, settings)
    scores = evaluate_split(replace(asked, shared=None), split, place, threshold)
    if scores is None:
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
    """`evaluate_split`, with its scores in every process of the job.

    Raises:
        RuntimeError: no answer came, and no scores, for ten minutes.
    """
    settings = settings_of(asked, split, None)
    answers = _working_place(asked, folder, settings) / _ANSWERS
    scores = evaluate_split(asked, split, folder)
    while not scores:
        known = count_answers(answers)
        wait_for(lambda known=known: finished(folder, settings) or count_answers(answers) > known, str(folder))  # type: ignore[misc]
        scores = finished(folder, settings)
    return scores


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
    asked: Asked, records: list[Record], settings: dict[str, Any], learned: dict[str, Any] | None
) -> dict[str, Any]:
    """scores.json."""
    scores = {**_summary(asked, records), "settings": settings, "training_overlap": learned}
    twice = paired(records)
    if parts := by_dataset(records) | twice:
        scores["parts"] = {name: _summary(asked, own) for name, own in parts.items()}
    for record, bare in zip(*twice.values(), strict=True):
        record[FIELD]["score"] = bare["score"]
    if learned and settings["split"] != "train" and (count := learned["rows_with_trained_images"]):
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
    task = TASKS[asked.config.task]
    measured = task.measure(records, asked.prepared.labels, asked.config.evaluation.positive)
    for record, score in zip(records, measured.rows or (), strict=measured.rows is not None):
        record["score"] = score
    return {**summary(measured, intervals(measured)), "higher_is_better": task.higher_is_better(measured.headline)}


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
