"""Flex attention gives what eager gives, in every use of it; on a GPU, run by `make long`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ftlib.models.generation import generate_answers, label_loglikelihoods
from ftlib.models.loading import load_weights
from ftlib.models.loss import answer_loss
from ftlib.models.paligemma import PaliGemmaInputProcessor
from tests import needs
from tests.models.tiny_paligemma import save

PROMPTS = ["which digit is this?", "read", ""]
LABELS = ["0", "three or eight"]


@pytest.mark.long
@pytest.mark.parametrize("generation", [1, 2])
def test_flex_is_eager(tmp_path: Path, generation: int) -> None:
    if not torch.cuda.is_available():
        needs.lack("gpu")
    save(tmp_path, generation)
    inputs = PaliGemmaInputProcessor.load(tmp_path)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 48, 3), dtype=np.uint8))
    rows = inputs.encode_prompts(PROMPTS, image)
    batch = inputs.collate([inputs.encode_train(prompt, image, prompt[:3]) for prompt in PROMPTS])
    batch = {name: tensor.cuda() for name, tensor in batch.items()}
    found = []
    for attention in ("eager", "flex"):
        model = load_weights(tmp_path, "float32", attention=attention).eval().cuda()
        with torch.no_grad():
            loss = answer_loss(model, batch, "token")
        found.append(
            (loss, label_loglikelihoods(model, inputs, rows, LABELS), generate_answers(model, inputs, rows, 4))
        )
    (loss, likelihoods, answers), (flex_loss, flex_likelihoods, flex_answers) = found
    torch.testing.assert_close(flex_loss, loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(flex_likelihoods, likelihoods, rtol=1e-4, atol=1e-4)
    assert flex_answers == answers and len(set(answers)) > 1
