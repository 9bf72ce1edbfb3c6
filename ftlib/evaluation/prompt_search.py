"""Compare candidate prompts with one model on the same rows.

`<folder>/<prompt's hash>/` gets predictions.jsonl and scores.json of a candidate, as in any evaluation. All missing
candidates are evaluated together: the model is loaded once, and an image once for all prompts in a batch. Until then,
predictions are stored in `<folder>/partial/`.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ftlib.config.schema import CHAT, Config
from ftlib.core import files
from ftlib.core.lease import acquire_lease
from ftlib.data.example import Example, raise_all
from ftlib.data.prompts import prompt_checker, render_prompt
from ftlib.errors import UserError
from ftlib.evaluation.compare import compare_evaluations
from ftlib.evaluation.evaluate import (
    EvaluationRequest,
    cached_scores,
    evaluation_settings,
    generation_settings,
    validate_request,
    write_scores,
)
from ftlib.evaluation.inference import Prediction, generate_predictions, scratch_dir
from ftlib.tasks.registry import task_of

SHOWN = ("metric", "value", "interval", "unit", "n", "invalid", "remarks")
_PROMPT_SETTINGS = ("prompt", "prompts")
"""Settings in which candidates differ."""

COMPARED = ("difference", "interval", "p", "groups", "verdict")


def compare_prompts(
    request: EvaluationRequest, prompts: Sequence[str], split: str, folder: Path
) -> list[dict[str, Any]] | None:
    """Evaluate a split with each prompt; existing evaluations are reused.

    Args:
        request: its config's `data.prompt` is replaced by each candidate.

    Returns:
        The best first, by the task's main metric: prompt, the scores of `SHOWN`, `against_best` (a paired test,
        see `COMPARED`; None for the best) and its folder. None in all processes of a job except the first.

    Raises:
        UserError: candidates that cannot be compared, or with fields that the rows lack.
        LeaseHeld: another process compares prompts in this folder.
    """
    _require_comparable(request.config, prompts)
    requests = {prompt: replace(request, config=_with_prompt(request.config, prompt)) for prompt in prompts}
    folders = {prompt: folder / _name(one.config.data.templates) for prompt, one in requests.items()}
    waiting = {
        prompt: one
        for prompt, one in requests.items()
        if cached_scores(folders[prompt], evaluation_settings(one, split, None)) is None
    }
    if waiting:
        with acquire_lease(folder):
            answers = _generate_all(list(waiting.values()), split, folder / "partial")
            if answers is None:
                return None
            for (prompt, one), own in zip(waiting.items(), answers, strict=True):
                write_scores(one, split, folders[prompt], own, None)
            shutil.rmtree(folder / "partial", ignore_errors=True)
    return _ranking(request, folders)


def _require_comparable(config: Config, prompts: Sequence[str]) -> None:
    if len(set(prompts)) < 2:
        raise UserError("there is only one prompt", "Add more in evaluation.prompts, or with --prompt.")
    if CHAT in prompts:
        remedy = "Compare it with `ftlib evaluate CONFIG --before` for each prompt."
        raise UserError(
            "prompt chat cannot be compared with other prompts, because its answers end differently", remedy
        )
    if config.data.parts and all(part.prompt is not None for part in config.data.parts):
        raise UserError("data.parts: every part sets a prompt, so data.prompt has no effect")


def _with_prompt(config: Config, prompt: str) -> Config:
    return config.model_copy(update={"data": config.data.model_copy(update={"prompt": prompt})})


def _name(templates: Mapping[str, str]) -> str:
    """Return the name of a candidate's folder and predictions."""
    return files.json_sha256(templates)[:12]


def _generate_all(requests: Sequence[EvaluationRequest], split: str, partial: Path) -> list[list[Prediction]] | None:
    """Return the predictions of each candidate, in the order of the rows."""
    first = requests[0]
    rows = first.prepared.rows(split)
    templates = [one.config.data.templates for one in requests]
    every = [replace(row, id=f"{_name(each)} {row.id}") for each in templates for row in rows]
    prompts = [render_prompt(row, each) for each in templates for row in rows]
    _require_suitable(rows, templates)
    validate_request(first, split)
    settings = generation_settings(evaluation_settings(first, split, None))
    request = scratch_dir(partial, {name: value for name, value in settings.items() if name not in _PROMPT_SETTINGS})
    evaluation, prepared = first.config.evaluation, first.prepared
    label = f"{first.model.name} on {split}, {len(requests)} prompts"
    root, max_pixels, answer_fields = prepared.root, first.config.data.max_pixels, task_of(first.config).answer_fields
    answers = generate_predictions(
        first.model, evaluation, prepared.labels, every, prompts, root, request, label, max_pixels, answer_fields
    )
    if answers is None:
        return None
    return [answers[start : start + len(rows)] for start in range(0, len(answers), len(rows))]


def _require_suitable(rows: Sequence[Example], candidates: Sequence[Mapping[str, str]]) -> None:
    """Reject a candidate that `ftlib prepare` would reject as `data.prompt`; of each, the first faulty row is told.

    Raises:
        UserError: one of them omits earlier turns of a row, or has an image placeholder in its text.
    """
    faults = []
    for templates in candidates:
        fault = {dataset: prompt_checker(template) for dataset, template in templates.items()}
        if found := next(((row, reason) for row in rows if (reason := fault[row.dataset](row))), None):
            faults.append(f"prompt {templates[found[0].dataset]!r}: row {found[0].id}: {found[1]}")
    raise_all(faults, "Compare other prompts.")


def _ranking(request: EvaluationRequest, folders: dict[str, Path]) -> list[dict[str, Any]]:
    scores = {prompt: files.read_json(folder / "scores.json") for prompt, folder in folders.items()}
    order = sorted(scores, key=lambda prompt: -_sort_key(scores[prompt]))
    ranked = []
    for prompt in order:
        change = None
        if prompt != order[0]:
            found = compare_evaluations(request.config, request.prepared.labels, folders[order[0]], folders[prompt])
            change = {name: found[name] for name in COMPARED}
        shown = {name: scores[prompt][name] for name in SHOWN}
        ranked.append({"prompt": prompt, **shown, "against_best": change, "folder": folders[prompt].name})
    return ranked


def _sort_key(scores: dict[str, Any]) -> float:
    """Return a sort key that is highest for the best scores; undefined scores come last."""
    if scores["value"] is None:
        return float("-inf")
    return float(scores["value"]) * (1 if scores.get("higher_is_better", True) else -1)
