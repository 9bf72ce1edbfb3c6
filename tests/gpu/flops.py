"""The FLOPs of a training row: the forward pass and the gradients that the method needs; nothing recomputed counts.

A product of a matrix with a vector costs 2 FLOPs a weight, the gradient of its input as many, and that of its weights
as many again. Attention's two products cost 4·T²·heads·head_dim forward and twice as many backward.
"""

from __future__ import annotations

from typing import Any


def paligemma_flops(config: Any, tokens: tuple[float, float], method: str) -> float:
    """Of one row.

    Args:
        tokens: of a row, image and answer included, and of the answer.
        method: lora (a frozen base; the adapters' own few do not count), attention (only those weights train), full.
    """
    text, vision = config.text_config, config.vision_config
    length, answer = tokens
    width, heads, head = text.hidden_size, text.num_attention_heads, text.head_dim
    projections = width * head * (2 * heads + 2 * text.num_key_value_heads)
    mlp = 3 * width * text.intermediate_size
    layer = (projections + mlp) * length * 4 + 12 * length**2 * heads * head
    layer += 2 * length * {"lora": 0, "attention": projections, "full": projections + mlp}[method]
    images = (vision.image_size // vision.patch_size) ** 2
    one = 4 * vision.hidden_size**2 + 2 * vision.hidden_size * vision.intermediate_size
    tower = vision.num_hidden_layers * (2 * one * images + 4 * images**2 * vision.hidden_size)
    whole = method == "full"
    head_flops = (6 if whole else 4) * width * text.vocab_size * answer
    return text.num_hidden_layers * layer + head_flops + tower * (3 if whole else 1)


def neox_flops(config: Any, length: float, answer: float) -> float:
    """Of one row with LoRA; attention is causal, and half of its products count."""
    width = config.hidden_size
    layer = 4 * (4 * width**2 + 2 * width * config.intermediate_size) * length + 6 * length**2 * width
    return float(config.num_hidden_layers * layer + 4 * width * config.vocab_size * answer)
