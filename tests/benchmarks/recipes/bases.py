"""A base model of real widths with random weights, and rows for it, written where both recipes read them."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration

from ftlib.models.tiny import tiny_processor

ROWS = 64


def make_paligemma(
    folder: Path, size: int, dtype: torch.dtype, language_layers: int = 18, vision_layers: int = 27
) -> None:
    """PaliGemma-3B's widths and 257,216 rows of embeddings."""
    processor = tiny_processor(size, 14)
    tokens = processor.tokenizer
    special = {f"{name}_token_id": getattr(tokens, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    config = PaliGemmaConfig(
        vision_config={"model_type": "siglip_vision_model", "image_size": size, "patch_size": 14, "hidden_size": 1152,
                       "intermediate_size": 4304, "num_hidden_layers": vision_layers, "num_attention_heads": 16,
                       "vision_use_head": False, "projection_dim": 2048},
        text_config={"model_type": "gemma", "hidden_size": 2048, "intermediate_size": 16384,
                     "num_hidden_layers": language_layers, "num_attention_heads": 8, "num_key_value_heads": 1,
                     "head_dim": 256, "vocab_size": 257216, **special},
        projection_dim=2048,
        image_token_index=processor.image_token_id,
        **special,
    )  # fmt: skip
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    PaliGemmaForConditionalGeneration(config).save_pretrained(folder)
    torch.set_default_dtype(before)
    processor.save_pretrained(folder)


def make_rows(folder: Path) -> None:
    """Questions of 20 to 60 characters (a character is a token) about noise, and answers of 4 to 16."""
    draw = random.Random(0)
    folder.mkdir(parents=True)
    lines = []
    for number in range(ROWS):
        row = {"id": str(number), "prefix": "q" * draw.randint(20, 60), "suffix": "a" * draw.randint(4, 16)}
        pixels = np.random.default_rng(number).integers(0, 256, (480, 640, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.jpg")
        lines.append(json.dumps({**row, "image": f"{number}.jpg"}))
    (folder / "data.jsonl").write_text("\n".join(lines) + "\n")
