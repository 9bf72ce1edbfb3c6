"""The log-probabilities of generated tokens, by the model's own forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

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
    for row, answer in zip(rows, answers, strict=True):
        count = len(answer.token_ids)
        assert count == len(answer.logprobs) > 0
        assert (answer.token_ids[-1] in inputs.stop_token_ids) == answer.ended
        batch = inputs.collate([replace(row, input_ids=[*row.input_ids, *answer.token_ids], n_labels=count)])
        with torch.no_grad():
            logits = model(**model_inputs(batch)).logits[0].float()
        own = logits.log_softmax(dim=-1)[-count - 1 : -1].gather(1, torch.tensor(answer.token_ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(answer.logprobs), own, rtol=tolerance, atol=tolerance)
