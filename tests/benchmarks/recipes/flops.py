"""MFU: the FLOPs that the mathematics needs, over time, over the rate of a matrix product measured here."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from transformers import AutoConfig

from tests.benchmarks.recipes.worker import plan_rows


def add_mfu(results: dict[str, dict[str, float]], family: str, base: Path) -> None:
    """Add "mfu" to each recipe's results; nothing recomputed counts."""
    tokens = [len(row["prefix"]) + len(row["suffix"]) + 2 for row in plan_rows({"rows": base.parent / "rows"})]
    mean = sum(tokens) / len(tokens)
    labelled = 12 if family == "paligemma" else mean
    needed = flops_per_row(base, mean, labelled)
    rate = matmul_rate()
    for one in results.values():
        one["mfu"] = needed * one["rows_per_second"] / rate


def flops_per_row(base: Path, text_tokens: float, labelled: float) -> float:
    """A frozen base with adapters: 4 FLOPs a parameter and token (2 forward, 2 for the inputs' gradients), attention's
    two products forward and their four backward, the head where labels are, and the vision tower forward only.
    """
    config = AutoConfig.from_pretrained(base)
    text, vision = config.get_text_config(), getattr(config, "vision_config", None)
    width = text.hidden_size
    images = (vision.image_size // vision.patch_size) ** 2 if vision else 0
    tokens = images + text_tokens
    heads = text.num_attention_heads
    head = getattr(text, "head_dim", None) or width // heads
    groups = getattr(text, "num_key_value_heads", heads)
    gated = 3 if vision else 2
    layer = width * head * (2 * heads + 2 * groups) + gated * width * text.intermediate_size
    attention = 12 * tokens * tokens * heads * head
    language = text.num_hidden_layers * (4 * layer * tokens + attention)
    total = language + 4 * width * text.vocab_size * labelled
    if vision:
        one = 4 * vision.hidden_size**2 + 2 * vision.hidden_size * vision.intermediate_size
        total += vision.num_hidden_layers * (2 * one * images + 4 * images * images * vision.hidden_size)
    return float(total)


def matmul_rate(size: int = 8192, repeats: int = 20) -> float:
    """FLOPs a second of a bfloat16 matrix product on this GPU."""
    left, right = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        left @ right
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        left @ right
    torch.cuda.synchronize()
    return repeats * 2 * size**3 / (time.perf_counter() - start)
