"""What of the data may leave in reports, trackers, cards and pushes: the config's section `privacy`."""

from __future__ import annotations

import hashlib
import re
from typing import Any

_PLACEHOLDER = re.compile(r"\{\w+\}")
_FORMS = ("alpaca", "chat")


def hidden_text(text: str) -> str:
    """What stands for a text of the config that may not leave; names of forms and mere placeholders are no text.

    Different texts stay different, so that reports do not take their runs for the same.
    """
    if text in _FORMS or not _PLACEHOLDER.sub("", text).strip():
        return text
    return f"(left out {hashlib.sha256(text.encode()).hexdigest()[:6]})"


def without_texts(config: dict[str, Any]) -> dict[str, Any]:
    """A config, as plain data, with its prompts and the label that it looks for left out."""
    data, evaluation = dict(config["data"]), dict(config.get("evaluation") or {})
    for section in (data, *(parts := [dict(part) for part in data.get("parts") or []])):
        if isinstance(section.get("prompt"), str):
            section["prompt"] = hidden_text(section["prompt"])
    if parts:
        data["parts"] = parts
    if evaluation.get("prompts"):
        evaluation["prompts"] = [hidden_text(prompt) for prompt in evaluation["prompts"]]
    if evaluation.get("positive"):
        evaluation["positive"] = hidden_text(evaluation["positive"])
    return {**config, "data": data, **({"evaluation": evaluation} if evaluation else {})}


def scores_without_texts(scores: dict[str, Any]) -> dict[str, Any]:
    """scores.json without what is told of single labels, and without the prompts and labels in its settings."""
    settings = dict(scores["settings"])
    labels = [label for label in (settings.get("positive"), *(settings.get("labels") or [])) if label]
    remarks = [remark for remark in scores.get("remarks", []) if not any(label in remark for label in labels)]
    for name in ("prompt", "positive"):
        if settings.get(name):
            settings[name] = hidden_text(settings[name])
    if settings.get("prompts"):
        settings["prompts"] = {name: hidden_text(prompt) for name, prompt in settings["prompts"].items()}
    if settings.get("labels"):
        settings["labels"] = hidden_text("\n".join(settings["labels"]))
    metrics = {name: found for name, found in scores["metrics"].items() if ": " not in name}
    return {**scores, "settings": settings, "metrics": metrics, "tables": {}, "remarks": remarks}
