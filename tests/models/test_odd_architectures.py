"""Architectures that do not take every mask: labels are asked one by one, and packing is refused where it leaks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ftlib.errors import UserError
from ftlib.models.adapters import validate_packing
from ftlib.models.causal_lm import CausalProcessor
from ftlib.models.generation import label_loglikelihoods
from ftlib.models.loading import load_weights
from ftlib.models.loss import answer_loss
from tests.models.tiny_causal import ARCHITECTURES, ODD, WINDOW, save

pytestmark = pytest.mark.gates

PROMPTS = ["reverse: abc, and then some more", "x"]
LABELS = ["0", "yes", "three or eight"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("odd")
    return {name: save(name, root / name) for name in (*ODD, *ARCHITECTURES)}


def load(folder: Path) -> tuple[torch.nn.Module, CausalProcessor]:
    return load_weights(folder, "float32", "causal").eval(), CausalProcessor.load(folder)


def forced(model: torch.nn.Module, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """The log-likelihood of an answer by plain teacher forcing."""
    with torch.no_grad():
        scores = model(input_ids=torch.tensor([prompt + answer])).logits[0].log_softmax(dim=-1)
    return sum(scores[len(prompt) - 1 + step, token] for step, token in enumerate(answer))


@pytest.mark.parametrize("name", list(ODD))
def test_likelihoods_are_those_of_each_label_alone(folders: dict[str, Path], name: str) -> None:
    model, inputs = load(folders[name])
    rows = inputs.encode_prompts(PROMPTS, None)
    found = label_loglikelihoods(model, inputs, rows, LABELS)
    for row, numbers in zip(rows, found, strict=True):
        for label, number in zip(LABELS, numbers, strict=True):
            torch.testing.assert_close(
                number, forced(model, row.input_ids, inputs.encode_answer(label)), rtol=1e-4, atol=1e-3
            )


def test_labels_that_fit_the_window_share_a_pass(folders: dict[str, Path]) -> None:
    model, inputs = load(folders["mistral"])
    (row,) = inputs.encode_prompts(["x"], None)
    labels = ["no", "yes", "1"]
    assert len(row.input_ids) + sum(len(inputs.encode_answer(label)) for label in labels) <= WINDOW
    passes = []
    model.register_forward_hook(lambda *_: passes.append(1))
    (found,) = label_loglikelihoods(model, inputs, [row], labels)
    assert len(passes) == 2, "the prompt, and all labels behind it"
    for label, number in zip(labels, found, strict=True):
        torch.testing.assert_close(
            number, forced(model, row.input_ids, inputs.encode_answer(label)), rtol=1e-4, atol=1e-3
        )


LEAKS = ("falcon", "lfm2", "opt")


@pytest.mark.parametrize("name", [*ODD, *ARCHITECTURES])
def test_packing_is_refused_exactly_where_rows_see_each_other(folders: dict[str, Path], name: str) -> None:
    model, inputs = load(folders[name])
    losses = []
    for packing in (False, True):
        inputs = CausalProcessor.load(folders[name], packing=packing)
        rows = [
            inputs.encode_train(prompt, None, "cba") for prompt in ("a long row, so that both others fit", "x", "y")
        ]
        with torch.no_grad():
            losses.append(answer_loss(model, inputs.collate(rows), "token").item())
    if name in LEAKS:
        assert losses[1] != pytest.approx(losses[0], rel=1e-4)
        with pytest.raises(UserError, match=rf"loss\.packing: .*\({name}\).* see each other"):
            validate_packing(model, inputs)
    else:
        assert losses[1] == pytest.approx(losses[0], rel=1e-4)
        validate_packing(model, inputs)


def test_the_look_at_packing_leaves_no_trace(folders: dict[str, Path]) -> None:
    model, inputs = load(folders["gpt2"])
    model.train()
    state = torch.get_rng_state()
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    validate_packing(model, inputs)
    assert model.training and all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_quantized_rows_are_packed(folders: dict[str, Path], quantization: str) -> None:
    """8-bit logits change with what is computed beside them, seen or not."""
    models = {name: load_weights(folders[name], "bfloat16", "causal", quantization) for name in ("llama", "lfm2")}
    validate_packing(models["llama"], CausalProcessor.load(folders["llama"]))
    with pytest.raises(UserError, match="see each other"):
        validate_packing(models["lfm2"], CausalProcessor.load(folders["lfm2"]))
