"""The last layer's MLP sees only the columns whose logits are read; losses and gradients stay the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel

from ftlib.config.schema import Attention, Full, Lora
from ftlib.models import columns
from ftlib.models.adapters import prepare_for_training
from ftlib.models.causal_lm import CausalProcessor
from ftlib.models.dropout import add_dropout
from ftlib.models.encoding import model_inputs
from ftlib.models.loading import load_weights
from ftlib.models.loss import answer_loss, cut_labels
from ftlib.models.paligemma import PaliGemmaInputProcessor
from tests.models.tiny_causal import ODD, save

CUT = {"paligemma": "paligemma", "gpt_neox": "causal", "gpt2": "causal", "llama": "causal", "gemma2": "causal"} | {
    "lfm2": "causal"
}
WHOLE = ("opt",)
METHODS = {
    "lora": Lora(method="lora", r=4, targets=["attention"]),
    "mlp": Lora(method="lora", r=4, targets=["mlp"]),
    "dora": Lora(method="dora", r=4),
    "attention": Attention(method="attention"),
    "full": Full(method="full"),
    "frozen": Full(method="full", freeze=["language"]),
}


def load(name: str, shared: Path, folder: Path) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """A model and a batch of two rows, with four labels at most."""
    if name == "paligemma":
        inputs = PaliGemmaInputProcessor.load(shared / "model")
        images = [Image.new("RGB", (32, 32), (shade, 90, 255 - shade)) for shade in (0, 200)]
        rows = [inputs.encode_train("read it", images[0], "7"), inputs.encode_train("", images[1], "011")]
        return load_weights(shared / "model", "float32"), cut_labels(inputs.collate(rows))
    folder = save(name, folder)
    causal = CausalProcessor.load(folder)
    encoded = [causal.encode_train("1+1=", None, "2"), causal.encode_train("spell two:", None, "two")]
    model = load_weights(folder, "float32", "causal")
    for module in model.modules():  # dropout would draw for fewer numbers, and so others
        for name in ("dropout", "p"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model, cut_labels(causal.collate(encoded))


def train(
    model: PreTrainedModel, batch: dict[str, Tensor], method: Any, family: str
) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(0)
    trained = prepare_for_training(model, method, "x", family).train()
    for name, parameter in trained.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    loss = answer_loss(trained, batch, "token")
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach(), {name: one.grad for name, one in trained.named_parameters() if one.grad is not None}


def watch(mlp: torch.nn.Module | None, seen: list[int]) -> None:
    """Note how many columns the first layer of the MLP computes."""
    assert mlp is not None
    first = next(module for module in mlp.modules() if not [*module.children()])
    first.register_forward_hook(lambda layer, inputs, output: seen.append(inputs[0].shape[1]))


@pytest.mark.parametrize("where", ["adapter", "model"])
def test_with_dropout_the_mlp_is_whole_and_draws_the_same(
    where: str, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run() -> tuple[Tensor, list[int], int]:
        model, batch = load("paligemma", shared, tmp_path)
        if where == "model":
            add_dropout(model, 0.3)
        seen: list[int] = []
        watch(model.get_decoder().layers[-1].mlp, seen)
        dropout = 0.3 if where == "adapter" else 0.0
        loss, _ = train(model, batch, Lora(method="lora", r=4, dropout=dropout, targets=["mlp"]), "paligemma")
        return loss, seen, batch["input_ids"].shape[1]

    loss, seen, length = run()
    assert seen == [length]
    monkeypatch.setattr(columns, "_last_mlp", lambda model: None)
    torch.testing.assert_close(loss, run()[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("name", "method"), [*((name, "lora") for name in (*CUT, *WHOLE)), *(("paligemma", one) for one in METHODS)]
)
def test_same_loss_and_gradients(
    name: str, method: str, checkpointing: bool, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = CUT.get(name, "causal")
    model, batch = load(name, shared, tmp_path)
    seen = []
    if name in CUT:
        watch(columns._last_mlp(model), seen)
    else:
        assert columns._last_mlp(model) is None
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    loss, gradients = train(model, batch, METHODS[method], family)
    assert not seen or (set(seen) == {batch["labels"].shape[1] + 1} and batch["labels"].shape[1] < 5)
    with monkeypatch.context() as context:
        context.setattr(columns, "_last_mlp", lambda model: None)
        whole, expected = train(load(name, shared, tmp_path)[0], batch, METHODS[method], family)
    torch.testing.assert_close(loss, whole, rtol=1e-6, atol=1e-6)
    assert gradients.keys() == expected.keys()
    largest = max(gradient.abs().max() for gradient in expected.values())
    for key, gradient in gradients.items():
        bound = 1e-5 * expected[key].abs().max() + 1e-7 * largest  # a key's bias has no gradient but rounding
        assert (gradient - expected[key]).abs().max() <= bound, key
    assert seen or name not in CUT


def test_all_columns_in_evaluation_and_without_a_number(shared: Path, tmp_path: Path) -> None:
    """Also after training steps: the number of columns is that of the call, not of the last training step."""
    model, batch = load("paligemma", shared, tmp_path)
    with torch.no_grad():
        torch.manual_seed(0)  # of dropout
        training, asking = (model.train(mode)(**model_inputs(batch)).logits for mode in (True, False))
    trained = prepare_for_training(model, Lora(method="lora", r=4), "x").train()
    answer_loss(trained, batch, "token").backward()  # type: ignore[no-untyped-call]
    with torch.no_grad():
        torch.manual_seed(0)
        torch.testing.assert_close(trained(**model_inputs(batch)).logits, training)
        trained.eval()
        torch.testing.assert_close(model(**model_inputs(batch)).logits, asking)


def test_the_head_is_one_product(shared: Path, tmp_path: Path) -> None:
    model, batch = load("paligemma", shared, tmp_path)
    trained = prepare_for_training(model, Lora(method="lora", r=4), "x").train()
    found = []
    trained.get_output_embeddings().register_forward_hook(
        lambda head, inputs, output: found.append(inputs[0].is_contiguous())
    )
    answer_loss(trained, batch, "token")
    assert found == [True]


@pytest.mark.parametrize("name", sorted(ODD))
def test_odd_architectures_are_cut_or_left_alone(name: str, shared: Path, tmp_path: Path) -> None:
    model, batch = load(name, shared, tmp_path)
    whole = answer_loss(model.train(), batch, "token")
    trained = prepare_for_training(model, METHODS["lora"], "x", "causal").train()
    torch.testing.assert_close(answer_loss(trained, batch, "token"), whole, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "method"),
    [
        *((name, None) for name in (*CUT, *WHOLE, *sorted(ODD))),
        *(("paligemma", one) for one in ("lora", "mlp", "dora")),
    ],
)
def test_a_prompt_is_read_with_the_last_column_alone(
    name: str, method: str | None, shared: Path, tmp_path: Path
) -> None:
    """The same next token, the same cache, and the whole MLP again afterwards."""
    model, batch = load(name, shared, tmp_path)
    if name == "paligemma":
        add_dropout(model, 0.3)
    asked: Any = model
    if method:
        asked = prepare_for_training(model, METHODS[method], "x", "paligemma")
        for key, parameter in asked.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(parameter, std=0.1)
    asked.eval()
    seen: list[int] = []
    if name in CUT:
        watch(columns._last_mlp(asked), seen)

    def read() -> tuple[Tensor, Any]:
        output = asked(**{**model_inputs(batch), "use_cache": True}, logits_to_keep=1)
        return output.logits, output.past_key_values

    with torch.no_grad():
        logits, cache = read()
        with columns.last_column_only(asked):
            found, own = read()
        again, _ = read()
    torch.testing.assert_close(found, logits, rtol=1e-5, atol=1e-6)
    assert torch.equal(again, logits)
    for mine, other in zip(own.layers, cache.layers, strict=True):
        for state in ("keys", "values"):
            assert torch.equal(*(getattr(layer, state, torch.zeros(1)) for layer in (mine, other)))
    length = batch["input_ids"].shape[1]
    assert seen == ([length, 1, length] if name in CUT else [])
