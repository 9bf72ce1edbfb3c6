"""What is asked of whom, and everything that its scores depend on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftlib import files
from ftlib.config import Config
from ftlib.config_data import CHAT
from ftlib.data.examples import Example
from ftlib.data.prepared import Prepared
from ftlib.evaluation.choosing import Threshold
from ftlib.evaluation.contexts import FIELD
from ftlib.evaluation.subject import Subject
from ftlib.identity import lasting

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


def finished(folder: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The scores of an earlier evaluation of the same things."""
    if not files.is_complete(folder):
        return None
    scores: dict[str, Any] = files.read_json(folder / "scores.json")
    return scores if _placeless(scores["settings"]) == _placeless(settings) else None


def _placeless(settings: dict[str, Any]) -> dict[str, Any]:
    """A store may have moved; `weights` tells folders with a model of the same name apart."""
    return {**settings, "model": Path(settings["model"]).name}


def settings_of(asked: Asked, split: str, threshold: Threshold | None) -> dict[str, Any]:
    """Everything that the scores depend on."""
    evaluation, answers = asked.config.evaluation, lasting(asked.config.evaluation)
    own = {
        "choose": ["positive", "min_precision"],
        "generate": ["num_beams", "max_new_tokens", "generation", "positive"],
    }
    chat = asked.subject.inputs.remark if asked.config.data.prompt == CHAT else ""
    return {
        "model": asked.subject.name,
        "weights": asked.subject.digest,
        "loaded": lasting(asked.subject.config.model, {"Model": ("base", "revision", "attention")}),
        "task": asked.config.task,
        "prompt": asked.config.data.prompt,
        **({"prompts": asked.config.data.templates} if asked.config.data.parts else {}),
        "split": split,
        "fingerprint": asked.prepared.facts["splits"][split]["fingerprint"],
        "trained_on": files.fingerprint(sorted(row.digest for row in asked.trained_on))[:16],
        "decode": evaluation.decode,
        **{name: answers[name] for name in own[evaluation.decode] if name in answers},
        "mask_decoder": files.sha256(Path(evaluation.mask_decoder)) if evaluation.mask_decoder else None,
        "labels": asked.prepared.labels if evaluation.decode == "choose" else None,
        "threshold": threshold.as_json() if threshold else None,
        **({FIELD: True} if asked.without_context else {}),
        **({"chat_template": chat} if chat else {}),
    }


def questions_of(settings: dict[str, Any]) -> dict[str, Any]:
    """What an answer depends on, of everything that a score does."""
    return {name: value for name, value in settings.items() if name not in _LATER}
