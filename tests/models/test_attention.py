"""PaliGemma 2's attention and caps against a literal float64 model: loss, answers, likelihoods; what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import cross_entropy
from transformers import Gemma2Config, Gemma2ForCausalLM, PaliGemmaForConditionalGeneration

from ftlib.errors import UserError
from ftlib.models.attention import validate_trainable
from ftlib.models.encoding import EncodedExample, look_up, model_inputs
from ftlib.models.generation import generate_answers, label_loglikelihoods
from ftlib.models.loading import load_weights
from ftlib.models.loss import answer_loss
from ftlib.models.paligemma import PaliGemmaInputProcessor
from tests.models import literal_gemma2
from tests.models.tiny_paligemma import GEMMA2, save

pytestmark = pytest.mark.gates

PAIRS = [("which digit is this?", "3"), ("read", "three or eight"), ("", "三")]
LABELS = ["0", "1", "three or eight"]
CAP = GEMMA2["final_logit_softcapping"]
CAPS = {"auto": None, "off": None, "on": CAP}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("paligemma2"))


@pytest.fixture(scope="module", params=list(CAPS))
def softcap(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(folder: Path, softcap: str) -> torch.nn.Module:
    return load_weights(folder, "float32", final_softcap=softcap).eval()


@pytest.fixture(scope="module")
def inputs(folder: Path) -> PaliGemmaInputProcessor:
    return PaliGemmaInputProcessor.load(folder)


@pytest.fixture(scope="module")
def image() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 48, 3), dtype=np.uint8))


def literal(model: torch.nn.Module, row: EncodedExample, cap: float | None) -> torch.Tensor:
    """Logits of one row, shape (tokens, vocabulary)."""
    with torch.no_grad():
        embedded = model.get_input_embeddings()(torch.tensor(row.input_ids))
        image_tokens = model.get_image_features(look_up(row.image_inputs)["pixel_values"]).pooler_output[0]
    embedded[: len(image_tokens)] = image_tokens
    return literal_gemma2.logits(model, embedded, len(row.input_ids) - row.n_labels, cap)


def literal_cost(model: torch.nn.Module, row: EncodedExample, cap: float | None) -> torch.Tensor:
    """Minus the log-likelihood of a row's answer."""
    scores = literal(model, row, cap)[-row.n_labels - 1 : -1]
    return cross_entropy(scores, torch.tensor(row.input_ids[-row.n_labels :]), reduction="sum")


@pytest.mark.parametrize("training", [False, True])
def test_logits_and_loss_are_the_literal_ones(
    model: torch.nn.Module, inputs: PaliGemmaInputProcessor, image: Image.Image, softcap: str, training: bool
) -> None:
    """In a padded batch; rows are longer than the window and scores beyond the caps, so that each would show."""
    rows = [inputs.encode_train(prompt, image, answer) for prompt, answer in PAIRS]
    model.train(training)
    batch = inputs.collate(rows)
    with torch.no_grad():
        found = model(**model_inputs(batch)).logits
        loss = answer_loss(model, batch, "token")
    model.eval()
    for row, ours in zip(rows, found, strict=True):
        torch.testing.assert_close(
            ours[-len(row.input_ids) :], literal(model, row, CAPS[softcap]), rtol=1e-3, atol=1e-3
        )
    cost = sum(literal_cost(model, row, CAPS[softcap]) for row in rows) / sum(row.n_labels for row in rows)
    torch.testing.assert_close(loss, cost, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("generation", [None, {"min_new_tokens": 0}], ids=["ours", "transformers"])
def test_answers_are_the_literal_ones(
    model: torch.nn.Module,
    inputs: PaliGemmaInputProcessor,
    image: Image.Image,
    softcap: str,
    generation: dict[str, int] | None,
) -> None:
    rows = inputs.encode_prompts([prompt for prompt, _ in PAIRS], image)
    answers = generate_answers(model, inputs, rows, 6, generation=generation)
    assert len(set(answers)) > 1
    for row, answer in zip(rows, answers, strict=True):
        ids = list(row.input_ids)
        while len(ids) < len(row.input_ids) + 6:
            scores = literal(model, EncodedExample(ids, len(ids) - len(row.input_ids), row.image_inputs), CAPS[softcap])
            ids.append(int(scores[-1].argmax()))
            if ids[-1] == inputs.eos_token_id:
                break
        assert inputs.decode(ids[len(row.input_ids) :]) == answer


def test_likelihoods_are_the_literal_ones(
    model: torch.nn.Module, inputs: PaliGemmaInputProcessor, image: Image.Image, softcap: str
) -> None:
    rows = inputs.encode_prompts([prompt for prompt, _ in PAIRS], image)
    for row, numbers in zip(rows, label_loglikelihoods(model, inputs, rows, LABELS), strict=True):
        for label, number in zip(LABELS, numbers, strict=True):
            answer = inputs.encode_answer(label)
            cost = literal_cost(
                model, EncodedExample([*row.input_ids, *answer], len(answer), row.image_inputs), CAPS[softcap]
            )
            torch.testing.assert_close(number, -cost, rtol=1e-4, atol=1e-3)


def test_each_of_them_matters(folder: Path, inputs: PaliGemmaInputProcessor, image: Image.Image) -> None:
    """What the literal comparison rests on: this tiny model shows a window, a missing cap, and a final cap."""
    batch = model_inputs(inputs.collate([inputs.encode_train("read", image, "three")]))
    plain = PaliGemmaForConditionalGeneration.from_pretrained(folder, attn_implementation="eager").eval()
    text = plain.config.text_config
    with torch.no_grad():
        ours = load_weights(folder, "float32").eval()(**batch).logits[0, -6:]
        windowed = plain(**batch).logits[0, -6:]
        assert text.layer_types == ["sliding_attention", "full_attention"] and text.sliding_window == 8
        for layer in plain.model.language_model.layers:
            layer.self_attn.attn_logit_softcapping = None
        uncapped = plain(**batch).logits[0, -6:]
        capped = load_weights(folder, "float32", final_softcap="on").eval()(**batch).logits[0, -6:]
    assert (ours - windowed).abs().max() > 0.1
    assert (windowed - uncapped).abs().max() > 0.1
    assert (ours - capped).abs().max() > 0.1 and capped.abs().max() <= CAP


@pytest.mark.parametrize(
    ("generation", "attention", "language"),
    [
        ("paligemma", "auto", "sdpa"),
        ("paligemma", "eager", "eager"),
        ("paligemma", "flex", "flex_attention"),
        ("paligemma2", "auto", "eager"),
        ("paligemma2", "eager", "eager"),
        ("paligemma2", "flex", "flex_attention"),
    ],
)
def test_the_language_model_attends_as_asked(
    paligemmas: dict[str, Path], generation: str, attention: str, language: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _pretend_a_gpu(monkeypatch)
    model = load_weights(paligemmas[generation], "float32", attention=attention)
    assert model.model.language_model.config._attn_implementation == language
    assert model.model.vision_tower.config._attn_implementation == "sdpa"


def test_sdpa_is_refused_where_scores_are_capped(folder: Path) -> None:
    with pytest.raises(UserError, match="caps attention scores at 3, which SDPA leaves out"):
        load_weights(folder, "float32", attention="sdpa")


def test_what_a_checkpoint_says_of_attention_does_not_count(
    folder: Path, paligemmas: dict[str, Path], tmp_path: Path
) -> None:
    """FlashAttention leaves the two-way prompt out."""
    for source in (folder, paligemmas["paligemma"]):
        shutil.copytree(source, tmp_path / "model", dirs_exist_ok=True)
        config = json.loads((tmp_path / "model" / "config.json").read_text())
        config["text_config"]["attn_implementation"] = config["attn_implementation"] = "flash_attention_2"
        config["_attn_implementation"] = "flash_attention_2"
        (tmp_path / "model" / "config.json").write_text(json.dumps(config))
        model = load_weights(tmp_path / "model", "float32")
        assert "flash" not in model.config.text_config._attn_implementation
        assert "flash" not in model.config.vision_config._attn_implementation


def test_a_final_cap_that_is_not_there_cannot_be_on(paligemmas: dict[str, Path]) -> None:
    with pytest.raises(UserError, match="this model has no cap on its final logits"):
        load_weights(paligemmas["paligemma"], "float32", final_softcap="on")
    assert load_weights(paligemmas["paligemma"], "float32", final_softcap="off")


def test_flex_wants_a_gpu_and_no_dropout(
    folder: Path, paligemmas: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    validate_trainable(load_weights(paligemmas["paligemma2"], "float32"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="flex runs on a GPU"):
        load_weights(folder, "float32", attention="flex")
    _pretend_a_gpu(monkeypatch)
    validate_trainable(load_weights(folder, "float32", attention="flex"))
    with pytest.raises(UserError, match="this model drops attention"):
        validate_trainable(load_weights(paligemmas["paligemma2"], "float32", attention="flex"))


@pytest.fixture(scope="module")
def gemma2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A causal Gemma 2 of its own."""
    folder = tmp_path_factory.mktemp("gemma2")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    settings = {name: value for name, value in GEMMA2.items() if name != "model_type"}
    torch.manual_seed(3)
    model = Gemma2ForCausalLM(Gemma2Config(vocab_size=64, head_dim=16, **sizes, **settings))
    model.save_pretrained(folder)
    return folder


def test_a_causal_gemma_2_keeps_its_window_and_its_caps(gemma2: Path) -> None:
    """It was trained with them; transformers' own eager model is the measure."""
    ids = torch.arange(3, 43)[None]
    with torch.no_grad():
        plain = Gemma2ForCausalLM.from_pretrained(gemma2, attn_implementation="eager")(ids).logits
        ours = load_weights(gemma2, "float32", "causal")(ids).logits
        uncapped = load_weights(gemma2, "float32", "causal", final_softcap="off")(ids).logits
    assert torch.equal(ours, plain)
    assert not torch.equal(ours, uncapped)
    torch.testing.assert_close(torch.tanh(uncapped / CAP) * CAP, ours)


def _pretend_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch says that it sees one; whether its programs run there is not asked."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr("ftlib.models.loading.require_kernels", lambda *given: None)
