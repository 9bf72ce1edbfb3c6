"""The log-probabilities of generated tokens, by the model's own forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import takewhile

import torch

from ftlib.models.encoding import EncodedExample, model_inputs
from ftlib.models.generation import GeneratedAnswer
from ftlib.models.registry import InputProcessor


def assert_logprobs_are_the_models_own(
    model: torch.nn.Module,
    inputs: InputProcessor,
    rows: Sequence[EncodedExample],
    answers: Sequence[GeneratedAnswer],
    tolerance: float = 1e-4,
) -> None:
    """Prompt and answer as one training row; log_softmax of its logits."""
    image = getattr(inputs, "_image_id", None)  # a random model may write one; a row with it would need its pixels
    for row, answer in zip(rows, answers, strict=True):
        assert len(answer.token_ids) == len(answer.logprobs) > 0
        assert (answer.token_ids[-1] in inputs.stop_token_ids) == answer.ended
        ids = list(takewhile(lambda token: token != image, answer.token_ids))
        count = len(ids)
        if not ids:
            continue
        batch = inputs.collate([replace(row, input_ids=[*row.input_ids, *ids], n_labels=count)])
        with torch.no_grad():
            logits = model(**model_inputs(batch)).logits[0].float()
        own = logits.log_softmax(dim=-1)[-count - 1 : -1].gather(1, torch.tensor(ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(answer.logprobs[:count]), own, rtol=tolerance, atol=tolerance)
