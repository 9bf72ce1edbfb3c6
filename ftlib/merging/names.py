"""One name for a weight, whatever a transformers version called it, and what part of a model it belongs to.

PaliGemma's released files say `language_model.model.layers.0…` and `vision_tower.vision_model.encoder…`, a loaded
model `model.language_model.layers.0…`, a newer one `model.vision_tower.encoder…`, PEFT puts `base_model.model.` before
it, and a language model without its head lacks the first `model.`. These words only say how modules nest.
"""

from __future__ import annotations

import re

_NESTING = {"base_layer", "base_model", "model", "transformer", "gpt_neox", "vision_model", "module"}
_LAYER = re.compile(r"(?:^|\.)(?:layers|layer|h|blocks)\.(\d+)\.")
_BUFFER = re.compile(r"(rotary_emb\.inv_freq|position_ids|(?:^|\.)(?:attn|attention)\.(?:masked_)?bias)$")
_PARTS = {
    "vision": re.compile(r"(^|\.)vision_tower\."),
    "projector": re.compile(r"(^|\.)multi_modal_projector\."),
    "embeddings": re.compile(r"(^|\.)(embed_tokens|embed_in|wte|wpe|word_embeddings)\."),
    "head": re.compile(r"^(lm_head|embed_out)\."),
}


def canonical(name: str) -> str:
    """A weight's name without the words that only nest; `language_model.lm_head` is the whole model's head."""
    words = [word for word in name.split(".") if word not in _NESTING]
    if words[:2] == ["language_model", "lm_head"]:
        words = words[1:]
    return ".".join(words)


def part_of(name: str) -> str:
    """vision, projector, embeddings, head or language, from a canonical name."""
    return next((part for part, pattern in _PARTS.items() if pattern.search(name)), "language")


def layer_of(name: str) -> int | None:
    """The number of the layer, counted from 0, that a weight lies in."""
    match = _LAYER.search(name)
    return int(match[1]) if match else None


def group_of(name: str) -> str:
    """The line of the table that a weight is counted in: `language 3`, `vision 12`, `projector` …"""
    layer = layer_of(name)
    return part_of(name) if layer is None else f"{part_of(name)} {layer}"


def is_buffer(name: str) -> bool:
    """Whether it is no weight but a constant that older versions of transformers saved too."""
    return _BUFFER.search(name) is not None
