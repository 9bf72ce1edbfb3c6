"""Candidate prompts, ranked by what one model answers to them on the same rows.

`<folder>/<prompt's hash>/` gets predictions.jsonl and scores.json of a candidate, as any evaluation does. All that are
still open are asked together: the model is loaded once, an image once for all that fit into a batch. While it is at
work, answers lie in `<folder>/partial/`.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ftlib import files
from ftlib.config import Config
from ftlib.config_data import CHAT
from ftlib.data.prompts import prompt_of
from ftlib.errors import UserError
from ftlib.evaluation.answers import publish_scores, require_answerable
from ftlib.evaluation.asked import Asked, finished, questions_of, settings_of
from ftlib.evaluation.asking import Answer, ask, working_folder
from ftlib.evaluation.comparison import compare_evaluations
from ftlib.ownership import owned

SHOWN = ("metric", "value", "interval", "unit", "n", "invalid", "remarks")
_OWN = ("prompt", "prompts")
"""Settings in which candidates differ."""

COMPARED = ("difference", "interval", "p", "groups", "verdict")


def rank_prompts(asked: Asked, prompts: Sequence[str], split: str, folder: Path) -> list[dict[str, Any]] | None:
    """Answer and score a split once for each prompt; what is scored already is kept.

    Args:
        asked: its config's `data.prompt` is replaced by each candidate.

    Returns:
        The best first, by the task's headline metric: prompt, the scores of `SHOWN`, `against_best` (a paired test,
        see `COMPARED`; None for the best) and its folder. None in a process that is not the first of its job.

    Raises:
        UserError: candidates that cannot be compared, or that name fields which the rows lack.
        Occupied: another process ranks prompts there.
    """
    _require_comparable(asked.config, prompts)
    posed = {prompt: replace(asked, config=_with_prompt(asked.config, prompt)) for prompt in prompts}
    folders = {prompt: folder / _name(one.config.data.templates) for prompt, one in posed.items()}
    waiting = {
        prompt: one for prompt, one in posed.items() if finished(folders[prompt], settings_of(one, split, None)) is None
    }
    if waiting:
        with owned(folder):
            answers = _ask(list(waiting.values()), split, folder / "partial")
            if answers is None:
                return None
            for (prompt, one), own in zip(waiting.items(), answers, strict=True):
                publish_scores(one, split, folders[prompt], own, None)
            shutil.rmtree(folder / "partial", ignore_errors=True)
    return _ranking(asked, folders)


def _require_comparable(config: Config, prompts: Sequence[str]) -> None:
    if len(set(prompts)) < 2:
        raise UserError("there is only one prompt", "Name more in evaluation.prompts, or with --prompt.")
    if CHAT in prompts:
        remedy = "Compare it by `ftlib evaluate CONFIG --before` with either."
        raise UserError("prompt chat ends answers in another way than other prompts do", remedy)
    if config.data.parts and all(part.prompt is not None for part in config.data.parts):
        raise UserError("data.parts: every part has a prompt of its own, so data.prompt changes nothing")


def _with_prompt(config: Config, prompt: str) -> Config:
    return config.model_copy(update={"data": config.data.model_copy(update={"prompt": prompt})})


def _name(templates: Mapping[str, str]) -> str:
    """Names a candidate's folder and its answers."""
    return files.fingerprint(templates)[:12]


def _ask(posed: Sequence[Asked], split: str, partial: Path) -> list[list[Answer]] | None:
    """The answers to each candidate, in the order of the rows."""
    first = posed[0]
    rows = first.prepared.rows(split)
    templates = [one.config.data.templates for one in posed]
    every = [replace(row, id=f"{_name(each)} {row.id}") for each in templates for row in rows]
    prompts = [prompt_of(row, each) for each in templates for row in rows]
    require_answerable(first, split)
    settings = questions_of(settings_of(first, split, None))
    asked = working_folder(partial, {name: value for name, value in settings.items() if name not in _OWN})
    evaluation, prepared = first.config.evaluation, first.prepared
    label = f"{first.subject.name} on {split}, {len(posed)} prompts"
    answers = ask(first.subject, evaluation, prepared.labels, every, prompts, prepared.root, asked, label)
    if answers is None:
        return None
    return [answers[start : start + len(rows)] for start in range(0, len(answers), len(rows))]


def _ranking(asked: Asked, folders: dict[str, Path]) -> list[dict[str, Any]]:
    scores = {prompt: files.read_json(folder / "scores.json") for prompt, folder in folders.items()}
    order = sorted(scores, key=lambda prompt: -_merit(scores[prompt]))
    ranked = []
    for prompt in order:
        change = None
        if prompt != order[0]:
            found = compare_evaluations(asked.config, asked.prepared.labels, folders[order[0]], folders[prompt])
            change = {name: found[name] for name in COMPARED}
        shown = {name: scores[prompt][name] for name in SHOWN}
        ranked.append({"prompt": prompt, **shown, "against_best": change, "folder": folders[prompt].name})
    return ranked


def _merit(scores: dict[str, Any]) -> float:
    """The best has the highest; undefined scores come last."""
    if scores["value"] is None:
        return float("-inf")
    return float(scores["value"]) * (1 if scores.get("higher_is_better", True) else -1)
