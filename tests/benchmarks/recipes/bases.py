"""Base models of real widths with random weights, and rows for them, written where both recipes read them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PaliGemmaConfig, PaliGemmaForConditionalGeneration

from ftlib.models.tiny import tiny_processor
from ftlib.models.tiny_neox import tiny_tokenizer

IMAGE_ROWS = TEXT_ROWS = 64


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
    _save(PaliGemmaForConditionalGeneration, config, dtype, folder)
    processor.save_pretrained(folder)


def make_neox(folder: Path, width: int, layers: int, dtype: torch.dtype) -> None:
    """OpenCALM's shapes: 3B is 2,560 wide with 32 layers, 7B 4,096 with 32."""
    tokenizer = tiny_tokenizer()
    eos = tokenizer.eos_token_id
    config = GPTNeoXConfig(
        vocab_size=52224, hidden_size=width, num_hidden_layers=layers, num_attention_heads=32, use_cache=False,
        intermediate_size=4 * width, max_position_embeddings=2048, tie_word_embeddings=False,
        bos_token_id=eos, eos_token_id=eos, pad_token_id=eos,
    )  # fmt: skip
    _save(GPTNeoXForCausalLM, config, dtype, folder)
    tokenizer.save_pretrained(folder)


def _save(kind: Any, config: Any, dtype: torch.dtype, folder: Path) -> None:
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    kind(config).save_pretrained(folder)
    torch.set_default_dtype(before)


def make_rows(folder: Path, images: bool) -> None:
    """Questions of 20 to 60 characters (a character is a token) and answers of 4 to 16; or texts of 200 to 500."""
    draw = random.Random(0)
    folder.mkdir(parents=True)
    lines = []
    for number in range(IMAGE_ROWS if images else TEXT_ROWS):
        row = {"id": str(number), "prefix": "q" * draw.randint(20, 60), "suffix": "a" * draw.randint(4, 16)}
        if images:
            pixels = np.random.default_rng(number).integers(0, 256, (480, 640, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.jpg")
            row["image"] = f"{number}.jpg"
        else:
            row |= {"prefix": "q" * draw.randint(150, 300), "suffix": "a" * draw.randint(50, 200)}
        lines.append(json.dumps(row))
    (folder / "data.jsonl").write_text("\n".join(lines) + "\n")
