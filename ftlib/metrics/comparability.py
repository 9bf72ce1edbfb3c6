"""Settings that must match for two scores to be comparable."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ftlib.config.identity import ORIGINAL_KEYS, canonical_fields
from ftlib.config.schema import Evaluation
from ftlib.core import files

_MODEL_SETTINGS = ("model", "model_plugin", "loaded", "weights", "trained_on", "threshold", "without_context")
"""Settings that may differ: they identify the model, its threshold and the questions without context."""


_BY_DECODE = {
    "choose": ("positive", "min_precision"),
    "generate": ("num_beams", "max_new_tokens", "generation", "positive", "tokenize"),
}
_ANSWER_SETTINGS = ("decode", *dict.fromkeys(name for names in _BY_DECODE.values() for name in names))
"""Settings of an evaluation that a config chooses, and that change answers or scores."""


def answer_settings(evaluation: Evaluation) -> dict[str, Any]:
    """The settings of a config's `evaluation` that change answers or scores, as they stand in scores.json."""
    fields = canonical_fields(evaluation)
    names = _BY_DECODE[evaluation.decode]
    return {"decode": evaluation.decode, **{name: fields[name] for name in names if name in fields}}


def differing_settings(settings: Mapping[str, Any], evaluation: Evaluation) -> dict[str, Any]:
    """The answer settings of an evaluation that are not those of a config.

    Args:
        settings: of scores.json.

    Returns:
        Name → the evaluation's value; None for one that it does not have.
    """
    if "decode" not in settings:
        return {}
    own = answer_settings(evaluation)
    unknown = ORIGINAL_KEYS["Evaluation"] - settings.keys()
    names = [name for name in _ANSWER_SETTINGS if name in {**own, **settings} and name not in unknown]
    return {name: settings.get(name) for name in names if settings.get(name) != own.get(name)}


def settings_folder(settings: Mapping[str, Any]) -> str:
    """The name of the folder for evaluations with these settings, if they are not those of the run's config.

    Args:
        settings: of scores.json, or `answer_settings`.
    """
    own = {name: settings[name] for name in _ANSWER_SETTINGS if name in settings}
    return f"{SETTINGS_PREFIX}{files.json_sha256(own)[:8]}"


SETTINGS_PREFIX = "settings-"


def describe_settings(settings: Mapping[str, Any]) -> str:
    """Settings as text, such as `max_new_tokens 2, num_beams 4`."""
    return ", ".join(f"{name} {'not set' if value is None else value}" for name, value in settings.items())


def comparable_settings(scores: dict[str, Any]) -> dict[str, Any]:
    """What must match in scores.json: rows, prompt, generation and scoring, and the metric's rule."""
    settings = {name: value for name, value in scores["settings"].items() if name not in _MODEL_SETTINGS}
    return {**settings, "rule": scores["rule"]} if "rule" in scores else settings


def setting_differences(a: dict[str, Any], b: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The settings in which two scores differ.

    Returns:
        Name → the two values; None for a missing one.
    """
    first, second = comparable_settings(a), comparable_settings(b)
    pairs = {name: (first.get(name), second.get(name)) for name in {**first, **second}}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def describe_differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Why the scores before and after training are not comparable, a sentence for each setting; empty if they are."""
    return [
        f"the two scores are not comparable: the {name} differs ({one} before, {other} after)"
        for name, (one, other) in setting_differences(before, after).items()
    ]


def evaluation_fingerprint(scores: dict[str, Any]) -> str:
    """A hash that identifies an evaluation among those of a split."""
    return files.json_sha256(scores["settings"])[:16]
