"""The fields of transformers' GenerationConfig that `evaluation.generation` takes, with what they may be.

Kept by hand, so that a config can be checked where transformers is not installed; a test compares it with the installed
one. Left out is what ftlib decides itself (ends of answers, length, caches, what is returned).
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from typing import Any

Rule = tuple[type, float | None, float | None]
"""Type, least and greatest value."""

_SAMPLING: dict[str, Rule] = {
    "temperature": (float, 0, None),
    "top_k": (int, 0, None),
    "top_p": (float, 0, 1),
    "min_p": (float, 0, 1),
    "typical_p": (float, 0, 1),
    "epsilon_cutoff": (float, 0, 1),
    "eta_cutoff": (float, 0, 1),
}
"""What only sampling looks at."""

_OTHERS: dict[str, Rule] = {
    "do_sample": (bool, None, None),
    "repetition_penalty": (float, 0, None),
    "encoder_repetition_penalty": (float, 0, None),
    "length_penalty": (float, None, None),
    "early_stopping": (bool, None, None),
    "no_repeat_ngram_size": (int, 0, None),
    "min_new_tokens": (int, 0, None),
    "renormalize_logits": (bool, None, None),
    "remove_invalid_values": (bool, None, None),
    "seed": (int, 0, 2**32 - 1),
}

FIELDS: dict[str, Rule] = {**_SAMPLING, **_OTHERS}
OWN = ("seed",)
"""Those that GenerationConfig does not have."""

_POSITIVE = ("temperature", "repetition_penalty", "encoder_repetition_penalty")
_WORDS = {bool: "true or false", int: "a whole number", float: "a number"}


def fault(fields: Mapping[str, Any]) -> str | None:
    """What is wrong with a mapping of fields, in words; None if nothing is."""
    for name, value in fields.items():
        if name not in FIELDS:
            near = difflib.get_close_matches(name, FIELDS, n=1)
            return f"{name}: unknown key" + (f"; did you mean {near[0]}?" if near else "")
        if wrong := _wrong(name, value):
            return f"{name}: must be {wrong}, got {value!r}"
    if idle := [name for name in fields if name in _SAMPLING and not fields.get("do_sample")]:
        return f"{idle[0]} has no effect without do_sample: true"
    return None


def _wrong(name: str, value: Any) -> str | None:
    kind, least, greatest = FIELDS[name]
    accepted: tuple[type, ...] = (int, float) if kind is float else (kind,)
    if type(value) not in accepted or not math.isfinite(value):
        return _WORDS[kind]
    if name in _POSITIVE and value <= 0:
        return "greater than 0"
    if least is not None and value < least:
        return f"at least {least}"
    if greatest is not None and value > greatest:
        return f"at most {greatest}"
    return None
