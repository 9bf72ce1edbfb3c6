"""The loss in chunks of tokens equals that of all logits, and never holds all logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from ftlib.memory.tracing import AllocationTracker
from ftlib.models import adapters, linear_cross_entropy
from ftlib.models.adapters import prepare_for_training
from ftlib.models.encoding import IGNORE_INDEX
from ftlib.models.linear_cross_entropy import LossHead
from ftlib.models.loss import Average, answer_loss
from tests.models.test_columns import CUT, METHODS, load

TOKENS, WIDTH, VOCABULARY = 23, 16, 301


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("mixed", [False, True], ids=["float32", "bfloat16"])
def test_equals_cross_entropy(smoothing: float, mixed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_cross_entropy, "CHUNK", 5)
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(TOKENS, WIDTH), torch.randn(VOCABULARY, WIDTH), torch.randn(VOCABULARY)
    targets = torch.randint(0, VOCABULARY, (TOKENS,))
    targets[[3, 20]] = IGNORE_INDEX
    upstream = torch.rand(TOKENS)

    def compute(fused: bool) -> tuple[Tensor, Tensor]:
        given = hidden.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            if fused:
                losses = linear_cross_entropy.linear_cross_entropy(given, weight, bias, targets, smoothing)
            else:
                losses = cross_entropy(
                    linear(given, weight, bias).float(),
                    targets,
                    ignore_index=IGNORE_INDEX,
                    reduction="none",
                    label_smoothing=smoothing,
                )
        (losses * upstream).sum().backward()
        assert given.grad is not None
        return losses.detach(), given.grad

    (losses, gradient), (expected, expected_gradient) = compute(True), compute(False)
    torch.testing.assert_close(losses, expected, rtol=1e-6, atol=1e-6)
    assert (gradient - expected_gradient).norm() <= (1e-2 if mixed else 2e-6) * expected_gradient.norm()


def count_calls(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Note the losses that heads return."""
    real, returned = linear_cross_entropy.linear_cross_entropy, []

    def counted(*given: Any) -> Tensor:
        returned.append(real(*given))
        return returned[-1]

    monkeypatch.setattr(linear_cross_entropy, "linear_cross_entropy", counted)
    return returned


def train(name: str, method: str, average: Average, mixed: bool, shared: Path, folder: Path) -> dict[str, Tensor]:
    """The loss of a micro-batch, and all gradients."""
    model, batch = load(name, shared, folder)
    torch.manual_seed(0)
    trained = prepare_for_training(model, METHODS[method], "x", CUT.get(name, "causal")).train()
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        loss = answer_loss(trained, batch, average, items=3, smoothing=0.1 if method == "attention" else 0.0)
    loss.backward()  # type: ignore[no-untyped-call]
    gradients = {name: one.grad for name, one in trained.named_parameters() if one.grad is not None}
    return {"": loss.detach(), **gradients}


@pytest.mark.parametrize("average", ["token", "example"])
@pytest.mark.parametrize(
    ("name", "method"), [*((name, "lora") for name in CUT), ("paligemma", "attention"), ("paligemma", "full")]
)
def test_same_loss_and_gradients_of_models(
    name: str, method: str, average: Average, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trained head returns logits; those of Gemma 2 are capped."""
    monkeypatch.setattr(linear_cross_entropy, "CHUNK", 3)
    for mixed in (False, True):
        with monkeypatch.context() as context:
            context.setattr(adapters, "LossHead", lambda model: None)
            expected = train(name, method, average, mixed, shared, tmp_path)
        with monkeypatch.context() as context:
            returned = count_calls(context)
            found = train(name, method, average, mixed, shared, tmp_path)
        assert len(returned) == (method != "full" and name != "gemma2")
        assert found.keys() == expected.keys()
        torch.testing.assert_close(found.pop(""), expected.pop(""), rtol=1e-6, atol=1e-6)
        largest = max(gradient.norm() for gradient in expected.values())
        for key, gradient in found.items():
            bound = 3e-2 if mixed else 1e-5
            assert (gradient - expected[key]).norm() <= bound * expected[key].norm() + bound * 1e-2 * largest, key


def test_a_model_that_changes_its_logits_is_called_again(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once, with the same random numbers; then its head returns logits."""
    model, batch = load("gemma2", shared, tmp_path)
    adapter = METHODS["lora"].model_copy(update={"dropout": 0.5})
    torch.manual_seed(0)
    settings = model.config.get_text_config()
    cap, settings.final_logit_softcapping = settings.final_logit_softcapping, None
    trained = prepare_for_training(model, adapter, "x", "causal").train()
    settings.final_logit_softcapping = cap  # so that it is not known beforehand
    for key, parameter in trained.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(parameter)
    returned = count_calls(monkeypatch)
    losses = []
    for _ in range(2):
        torch.manual_seed(1)
        losses.append(answer_loss(trained, batch, "token").item())
    assert losses[0] == losses[1] and len(returned) == 1
    trained.get_output_embeddings().__dict__.pop("forward")
    torch.manual_seed(1)
    assert answer_loss(trained, batch, "token").item() == losses[0]


def test_logits_of_all_tokens_are_never_in_memory() -> None:
    tokens, vocabulary = 16 * linear_cross_entropy.CHUNK, 1000
    head = torch.nn.Linear(8, vocabulary, bias=False, device="meta").requires_grad_(False)
    hidden = torch.empty(tokens, 8, device="meta", requires_grad=True)
    with AllocationTracker(head, vocabulary) as counted:
        targets = torch.empty(tokens, dtype=torch.int64, device="meta")
        linear_cross_entropy.linear_cross_entropy(hidden, head.weight, None, targets).sum().backward()
    assert counted.peak["logits"] <= 2 * linear_cross_entropy.CHUNK * vocabulary * 4


def test_heads_that_are_left_alone() -> None:
    """Capped by ftlib's hook, or no plain linear layer."""

    class Model(torch.nn.Module):
        def __init__(self, head: torch.nn.Module) -> None:
            super().__init__()
            self.head = head

        def get_output_embeddings(self) -> torch.nn.Module:
            return self.head

    class Quantized(torch.nn.Linear):
        pass

    capped = torch.nn.Linear(2, 3)
    capped.register_forward_hook(lambda head, inputs, output: output.tanh())
    for head in (capped, Quantized(2, 3)):
        LossHead(Model(head))
        assert "forward" not in head.__dict__
