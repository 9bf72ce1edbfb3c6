"""What two scores must have in common before their difference tells something of the models."""

from __future__ import annotations

from typing import Any

from ftlib import files

_OF_THE_MODEL = ("model", "loaded", "weights", "trained_on", "threshold", "without_context")
"""Settings that tell whose answers they are, and those of a second question; a threshold is the model's own."""


def how_asked(scores: dict[str, Any]) -> dict[str, Any]:
    """The settings in scores.json that two models must share: rows, prompt, how answers are found and judged."""
    return {name: value for name, value in scores["settings"].items() if name not in _OF_THE_MODEL}


def unlike(a: dict[str, Any], b: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The settings in which two scores were asked differently.

    Returns:
        Name → its value in either; None where it is not there.
    """
    first, second = how_asked(a), how_asked(b)
    pairs = {name: (first.get(name), second.get(name)) for name in {**first, **second}}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def settings_hash(scores: dict[str, Any]) -> str:
    """Tells one evaluation from every other one of that split."""
    return files.fingerprint(scores["settings"])[:16]
