"""Remove private data from reports, trackers, model cards and pushes: the config's section `privacy`."""

from __future__ import annotations

import hashlib
import re
from typing import Any

_PLACEHOLDER = re.compile(r"\{\w+\}")
_FORMS = ("alpaca", "chat")


def hidden_text(text: str) -> str:
    """Return a placeholder for a private text; names of templates and plain placeholders are returned unchanged.

    Different texts get different placeholders, so that reports can tell runs apart.
    """
    if text in _FORMS or not _PLACEHOLDER.sub("", text).strip():
        return text
    return f"(left out {hashlib.sha256(text.encode()).hexdigest()[:6]})"


def without_texts(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config as plain data without its prompts and `positive` label."""
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
    """Return scores.json without metrics of single labels, and without the prompts and labels in its settings."""
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
