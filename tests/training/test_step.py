"""What a training step asks of a GPU: nothing that the CPU has to wait for, no cache, no copy of the logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ftlib.config.schema import Lora
from ftlib.models.adapters import prepare_for_training
from ftlib.models.causal_lm import CausalProcessor
from ftlib.models.encoding import IGNORE_INDEX, model_inputs
from ftlib.models.loss import answer_loss, count_items, cut_labels
from ftlib.models.paligemma import PaliGemmaInputProcessor, skip_image_token_count
from ftlib.models.registry import InputProcessor
from ftlib.models.tiny import tiny_model, tiny_neox, tiny_processor, tiny_tokenizer

WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique")
"""Operations whose result the CPU needs before it can go on: on a GPU each waits for all work before it."""


class NeverWait(TorchDispatchMode):
    """Fails where a GPU would be waited for."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert function.overloadpacket.__name__ not in WAITS, f"waits for the GPU: {function}"
        return function(*args, **(kwargs or {}))


def family(name: str) -> tuple[Any, InputProcessor, Image.Image | None]:
    if name == "paligemma":
        processor = tiny_processor()
        return tiny_model(processor), PaliGemmaInputProcessor(processor), Image.new("RGB", (40, 40), "red")
    tokenizer = tiny_tokenizer()
    return tiny_neox(tokenizer), CausalProcessor(tokenizer, max_length=60), None


def batch_of(inputs: InputProcessor, image: Image.Image | None) -> dict[str, Tensor]:
    pairs = [("a question", "yes"), ("another one", "a longer answer"), ("q", "no")]
    return inputs.collate([inputs.encode_train(f"{prompt}\n", image, answer) for prompt, answer in pairs])


def test_a_step_never_waits_for_the_gpu() -> None:
    model, inputs, image = family("paligemma")
    skip_image_token_count(model)
    adapted = prepare_for_training(model, Lora(method="lora", r=2), "base").train()
    batch = cut_labels(batch_of(inputs, image))
    with NeverWait():
        answer_loss(adapted, batch, "token", count_items(batch["labels"], "token")).backward()
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in adapted.parameters())


def test_image_features_go_where_transformers_puts_them() -> None:
    model, inputs, image = family("paligemma")
    batch = model_inputs(batch_of(inputs, image))
    with torch.no_grad():
        theirs = model(**batch).logits
        skip_image_token_count(model)
        assert torch.equal(model(**batch).logits, theirs)


@pytest.mark.parametrize("name", ["paligemma", "causal"])
def test_labels_are_cut_to_the_columns_that_hold_any(name: str) -> None:
    _, inputs, image = family(name)
    batch = batch_of(inputs, image)
    cut = cut_labels(batch)["labels"]
    width = cut.shape[1]
    assert cut[:, 0].ne(IGNORE_INDEX).any() and width < batch["labels"].shape[1]
    assert torch.equal(cut, batch["labels"][:, -width:]) and batch["labels"][:, :-width].eq(IGNORE_INDEX).all()
    without = cut_labels({**batch, "labels": torch.full_like(batch["labels"], IGNORE_INDEX)})
    assert without["labels"].shape == (3, 1)


@pytest.mark.parametrize("average", ["token", "example"])
@pytest.mark.parametrize("name", ["paligemma", "causal"])
def test_cut_labels_have_the_loss_of_all(name: str, average: Any) -> None:
    model, inputs, image = family(name)
    batch = batch_of(inputs, image)
    torch.testing.assert_close(
        answer_loss(model, cut_labels(batch), average, smoothing=0.1), answer_loss(model, batch, average, smoothing=0.1)
    )


@pytest.mark.parametrize("name", ["paligemma", "causal"])
def test_no_cache_is_made(name: str) -> None:
    model, inputs, image = family(name)
    assert model(**model_inputs(batch_of(inputs, image))).past_key_values is None


def test_the_loss_copies_no_logits() -> None:
    model, inputs, image = family("causal")
    batch = cut_labels(batch_of(inputs, image))
    seen = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            found = function(*args, **(kwargs or {}))
            if isinstance(found, Tensor) and model.config.vocab_size in found.shape and found.grad_fn is None:
                seen.add(function.overloadpacket.__name__)
            return found

    with Watch():
        answer_loss(model, batch, "token").backward()
    assert {"_log_softmax", "nll_loss_backward"} <= seen
    assert not seen & {"clone", "copy_", "_to_copy", "slice", "slice_backward", "transpose"}


def test_checkpointing_runs_no_backward_pass_through_a_frozen_vision_tower() -> None:
    model, inputs, image = family("paligemma")
    adapted = prepare_for_training(model, Lora(method="lora", r=2), "base").train()
    adapted.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    wanted = []
    model.model.multi_modal_projector.register_forward_hook(lambda *seen: wanted.append(seen[-1].requires_grad))
    answer_loss(adapted, batch_of(inputs, image), "token").backward()
    assert wanted == [False]
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in adapted.parameters())
