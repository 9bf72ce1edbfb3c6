"""Flex attention stays compiled whatever it is used for, by dynamo itself; what it compiles to needs a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from PIL import Image
from torch._dynamo.eval_frame import _debug_get_cache_entry_list
from torch.nn.attention import flex_attention as flex
from transformers.integrations.flex_attention import WrappedFlexAttention

from ftlib.models.attention import raise_recompile_limit
from ftlib.models.generation import generate_answers
from ftlib.models.loading import load_weights
from ftlib.models.loss import answer_loss, cut_labels
from ftlib.models.paligemma import PaliGemmaInputProcessor
from tests.models.tiny_paligemma import save

USUAL_LIMIT = 8
ROWS = [[5, 9, 20, 40], [150, 3, 8], [30], [170], [60, 2]]
"""Lengths of prompts: several rows and one, in one block of 128 and in two."""


@pytest.fixture
def dynamo(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Its own settings, and no compiler behind it; past the limit it fails, where it would go on uncompiled."""
    saved = torch._dynamo.config.save_config()
    torch._dynamo.reset()
    monkeypatch.setattr(WrappedFlexAttention, "_instance", None)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    monkeypatch.setattr(flex, "_validate_device", lambda *tensors: None)  # it refuses gradients on a CPU
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    yield torch._dynamo.config
    torch._dynamo.config.load_config(saved)
    torch._dynamo.reset()


def use(folder: Path) -> None:
    """Steps of training with questions between them."""
    inputs, image = PaliGemmaInputProcessor.load(folder), Image.new("RGB", (48, 48), "red")
    model = load_weights(folder, "float32", attention="eager")
    model.config.get_text_config()._attn_implementation = "flex_attention"
    for lengths in ROWS:
        rows = [inputs.encode_train("p" * length, image, "a" * (1 + length % 7)) for length in lengths]
        answer_loss(model.train(), cut_labels(inputs.collate(rows)), "token").backward()
        with torch.no_grad():
            generate_answers(
                model.eval(), inputs, inputs.encode_prompts(["p" * length for length in lengths], image), 3
            )


@pytest.mark.long
def test_training_and_asking_in_turn_stay_compiled(tmp_path: Path, dynamo: Any) -> None:
    save(tmp_path)
    assert dynamo.recompile_limit == USUAL_LIMIT
    with pytest.raises(Exception, match="fail_on_recompile_limit_hit"):
        use(tmp_path)
    raise_recompile_limit()
    torch._dynamo.reset()
    use(tmp_path)
    assert USUAL_LIMIT < len(_debug_get_cache_entry_list(flex.create_block_mask)) < dynamo.recompile_limit / 2
