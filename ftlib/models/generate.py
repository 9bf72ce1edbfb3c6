"""The one generation engine: evaluation, `predict` and every other command ask models through it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import GenerationConfig

from ftlib.models.paligemma import PaliGemmaInputs, Row


def answer_rows(model: torch.nn.Module, inputs: PaliGemmaInputs, rows: Sequence[Row], max_new_tokens: int) -> list[str]:
    """Answer one batch of rows, greedily; each row stops at its own `<eos>`.

    Args:
        rows: prompts of any lengths; they are padded on the left.

    Returns:
        One text per row.
    """
    device = next(model.parameters()).device
    batch = {name: tensor.to(device) for name, tensor in inputs.prompt_batch(rows).items()}
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=inputs.pad_id, eos_token_id=inputs.eos_id
    )
    model.eval()
    with torch.inference_mode():
        ids: Tensor = model.generate(**batch, generation_config=settings)  # type: ignore[operator]
    return [inputs.decode(answer) for answer in ids[:, batch["input_ids"].shape[1] :]]


def by_length(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Indices in batches of similar length, longest first, so that the biggest batch fails at once or never."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]
