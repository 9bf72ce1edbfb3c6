"""Settings that must match for two scores to be comparable."""

from __future__ import annotations

from typing import Any

from ftlib.core import files

_MODEL_SETTINGS = ("model", "model_plugin", "loaded", "weights", "trained_on", "threshold", "without_context")
"""Settings that may differ: they identify the model, its threshold and the questions without context."""


def comparable_settings(scores: dict[str, Any]) -> dict[str, Any]:
    """The settings in scores.json that must match: rows, prompt, generation and scoring."""
    return {name: value for name, value in scores["settings"].items() if name not in _MODEL_SETTINGS}


def setting_differences(a: dict[str, Any], b: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The settings in which two scores differ.

    Returns:
        Name → the two values; None for a missing one.
    """
    first, second = comparable_settings(a), comparable_settings(b)
    pairs = {name: (first.get(name), second.get(name)) for name in {**first, **second}}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def evaluation_fingerprint(scores: dict[str, Any]) -> str:
    """A hash that identifies an evaluation among those of a split."""
    return files.json_sha256(scores["settings"])[:16]
