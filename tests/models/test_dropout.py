"""model.dropout: where PaliGemma's authors have it, the same with gradient checkpointing, none in evaluation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from ftlib.models.dropout import add_dropout
from ftlib.models.encoding import model_inputs
from ftlib.models.loss import answer_loss
from ftlib.models.paligemma import PaliGemmaInputProcessor
from ftlib.models.tiny import tiny_model, tiny_processor
from tests.models.tiny_paligemma import GEMMA2


def model_and_batch(kind: str) -> tuple[Any, dict[str, Tensor]]:
    processor = tiny_processor()
    model = tiny_model(processor, **(GEMMA2 if kind == "gemma2" else {}))
    model.set_attn_implementation("eager")  # SDPA ignores Gemma 2's cap
    inputs, image = PaliGemmaInputProcessor(processor), Image.new("RGB", (40, 40), "red")
    return model, inputs.collate(
        [inputs.encode_train("which digit?", image, "seven"), inputs.encode_train("q", image, "1")]
    )


def authors_layer(layer: Any, hidden: Tensor, drop: Any, **arguments: Any) -> Tensor:
    """A layer with dropout, in the order of the authors' Block."""
    attended, _ = layer.self_attn(hidden_states=layer.input_layernorm(hidden), **arguments)
    if hasattr(layer, "pre_feedforward_layernorm"):
        attended = drop(layer.post_attention_layernorm(attended)) + hidden
        output = drop(layer.mlp(layer.pre_feedforward_layernorm(attended)))
        return attended + layer.post_feedforward_layernorm(output)
    attended = drop(attended) + hidden
    return attended + drop(layer.mlp(layer.post_attention_layernorm(attended)))


@pytest.mark.parametrize("kind", ["gemma", "gemma2"])
def test_dropout_is_where_the_authors_have_it(kind: str) -> None:
    model, batch = model_and_batch(kind)
    seen: list[tuple[Any, Tensor, dict[str, Any], Tensor]] = []
    for layer in model.model.language_model.layers:
        layer.register_forward_hook(
            lambda module, args, kwargs, out: seen.append((module, args[0], kwargs, out)), with_kwargs=True
        )
    model.eval()
    with torch.no_grad():
        plain = model(**model_inputs(batch)).logits
    seen.clear()
    add_dropout(model, 0.5)
    with torch.no_grad():
        assert torch.equal(model(**model_inputs(batch)).logits, plain), "none in evaluation"
        model.train()
        seen.clear()
        torch.manual_seed(1)
        model(**model_inputs(batch))
        calls = list(seen)
        assert len(calls) == 2, "one call of each layer"
        for hooked in model.model.language_model.layers:
            for module in hooked.modules():
                module._forward_hooks.clear()
        torch.manual_seed(1)
        for layer, hidden, arguments, output in calls:
            ours = authors_layer(layer, hidden, lambda x: functional.dropout(x, 0.5), **arguments)
            found = output[0] if isinstance(output, tuple) else output
            torch.testing.assert_close(found, ours, rtol=0, atol=1e-6)


def test_gradient_checkpointing_repeats_the_masks() -> None:
    model, batch = model_and_batch("gemma")
    add_dropout(model, 0.3)
    model.train()

    def gradients(checkpointing: bool) -> list[Tensor]:
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        torch.manual_seed(0)
        answer_loss(model, batch, "token").backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    first, again, other = gradients(False), gradients(True), gradients(True)
    assert first and all(torch.equal(a, b) and torch.equal(b, c) for a, b, c in zip(first, again, other, strict=True))
    torch.manual_seed(1)
    assert answer_loss(model, batch, "token") != answer_loss(model, batch, "token")
