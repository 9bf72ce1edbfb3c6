"""Tiny PaliGemmas of both generations with weights far from uniform, so that answers differ.

The caps and the window of the second are so small that they matter.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ftlib.models.tiny import tiny_model, tiny_processor

SIZE, PATCH = 48, 8
"""36 image tokens, more than the window."""

GEMMA2 = {
    "model_type": "gemma2",
    "sliding_window": 8,
    "attn_logit_softcapping": 3.0,
    "final_logit_softcapping": 4.0,
    "query_pre_attn_scalar": 24,
    "num_key_value_heads": 2,
}


def save(folder: Path, generation: int = 2, **text: Any) -> Path:
    """A model folder; `text` overrides fields of the language part."""
    processor = tiny_processor(SIZE, PATCH)
    model = tiny_model(processor, **{**(GEMMA2 if generation == 2 else {}), **text})
    torch.manual_seed(11)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
            if ".post_" in name:
                parameter.add_(3.0)  # blocks outweigh the embedding of the last token, the same in every prompt
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
