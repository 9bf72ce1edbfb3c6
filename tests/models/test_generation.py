"""Asking: every shortcut of the engine gives what the plain way gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import GenerationConfig

from ftlib.models import generation
from ftlib.models.encoding import EncodedExample, look_up
from ftlib.models.generation import generate_answers, generate_with_logprobs, label_loglikelihoods, token_ends
from ftlib.models.loading import load_weights
from ftlib.models.loss import answer_loss
from ftlib.models.paligemma import PaliGemmaInputProcessor
from tests.models.logprobs import assert_logprobs_are_the_models_own

pytestmark = pytest.mark.gates

PROMPTS = ["which digit is this?", "read", "and what, if I may ask, stands here?"]
LABELS = ["0", "1", "three or eight", "三", "0 1"]


@pytest.fixture(scope="module")
def inputs(folder: Path) -> PaliGemmaInputProcessor:
    return PaliGemmaInputProcessor.load(folder)


@pytest.fixture(scope="module")
def model(folder: Path) -> torch.nn.Module:
    """Weights far from uniform, so that answers differ and some end early."""
    model = load_weights(folder, "float32").eval()
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model


@pytest.fixture(scope="module")
def rows(shared: Path, inputs: PaliGemmaInputProcessor) -> list[EncodedExample]:
    images = [Image.open(path).convert("RGB") for path in sorted((shared / "data" / "images").iterdir())[:8]]
    return [row for image in images for row in inputs.encode_prompts(PROMPTS, image)]


@pytest.mark.parametrize("num_beams", [1, 3])
def test_answers_are_those_of_transformers(
    model: torch.nn.Module, inputs: PaliGemmaInputProcessor, rows: list[EncodedExample], num_beams: int
) -> None:
    answers = generate_answers(model, inputs, rows, 8, num_beams)
    batch = {name: tensor for name, tensor in look_up(inputs.collate(rows)).items() if name != "labels"}
    settings = GenerationConfig(
        max_new_tokens=8,
        do_sample=False,
        num_beams=num_beams,
        pad_token_id=inputs.pad_token_id,
        eos_token_id=inputs.eos_token_id,
    )
    ids = model.generate(**batch, generation_config=settings)[:, batch["input_ids"].shape[1] :]
    assert answers == [inputs.decode(row.tolist()) for row in ids]
    assert len(set(answers)) > 3


SAMPLING = {"do_sample": True, "temperature": 0.5, "top_k": 5, "repetition_penalty": 1.2}


@pytest.mark.parametrize(("num_beams", "generation"), [(1, None), (3, None), (1, SAMPLING)])
def test_logprobs_are_the_models_own(
    model: torch.nn.Module,
    inputs: PaliGemmaInputProcessor,
    rows: list[EncodedExample],
    num_beams: int,
    generation: dict[str, object] | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of the chosen beam, and without temperature and penalties; some answers end early, others are cut off."""
    monkeypatch.setattr(inputs, "eos_token_id", generate_with_logprobs(model, inputs, rows[:1], 4)[0].token_ids[2])
    answers = generate_with_logprobs(model, inputs, rows[:9], 8, num_beams, generation)
    assert [one.text for one in answers] == generate_answers(model, inputs, rows[:9], 8, num_beams, generation)
    assert_logprobs_are_the_models_own(model, inputs, rows[:9], answers)
    assert answers[0].ended or num_beams > 1 or generation
    for one in answers:
        ends = token_ends(inputs, one)
        assert ends == sorted(ends) and ends[-1] == len(one.text) and len(ends) == len(one.token_ids)


def test_logits_of_one_token_per_row_are_kept(
    model: torch.nn.Module, inputs: PaliGemmaInputProcessor, rows: list[EncodedExample]
) -> None:
    """Never those of all tokens: with 257,152 words 32 answers of 256 tokens would be 8 GiB. Nor is the last MLP needed
    for other tokens."""
    shapes, computed = [], set()
    watch = model.get_output_embeddings().register_forward_hook(lambda *seen: shapes.append(seen[-1].shape[:2]))
    last = model.get_decoder().layers[-1].mlp.gate_proj
    with last.register_forward_hook(lambda *seen: computed.add(seen[-1].shape[1])):
        generate_with_logprobs(model, inputs, rows, 8)
    assert computed == {1}
    generate_with_logprobs(model, inputs, rows, 8, generation={"do_sample": False})
    watch.remove()
    assert {columns for _, columns in shapes} == {1} and max(count for count, _ in shapes) == len(rows)


@pytest.mark.parametrize(("num_beams", "generation"), [(1, None), (2, None), (1, SAMPLING)])
def test_no_more_rows_than_the_batch_size_are_answered_at_a_time(
    model: torch.nn.Module,
    inputs: PaliGemmaInputProcessor,
    rows: list[EncodedExample],
    num_beams: int,
    generation: dict[str, object] | None,
) -> None:
    """What transformers generates does not depend on the rows behind a batch either."""
    batches = [rows[:4], rows[4:8], rows[8:9]]
    wanted = [one for batch in batches for one in generate_answers(model, inputs, batch, 8, num_beams, generation)]
    seen = []
    with model.get_output_embeddings().register_forward_hook(lambda *given: seen.append(len(given[-1]))):
        found = generate_with_logprobs(model, inputs, rows[:9], 8, num_beams, generation, batch_size=4)
    assert [one.text for one in found] == wanted and max(seen) <= 4 * num_beams


def test_a_finished_row_leaves_the_batch(
    model: torch.nn.Module, inputs: PaliGemmaInputProcessor, rows: list[EncodedExample], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that end at once are not carried through the others' steps."""
    answers = generate_answers(model, inputs, rows, 8)
    first = inputs.encode_answer(answers[0])[0]
    monkeypatch.setattr(inputs, "eos_token_id", first)
    ended = [not answer or inputs.encode_answer(answer)[0] == first for answer in answers]
    assert 0 < sum(ended) < len(rows)
    shapes = []
    watch = model.register_forward_pre_hook(
        lambda _, __, given: shapes.append(given["position_ids"].shape), with_kwargs=True
    )
    shorter = generate_answers(model, inputs, rows, 8)
    watch.remove()
    sizes = [size for size, columns in shapes if columns == 1]
    assert sum(size for size, columns in shapes if columns > 1) == len(rows)
    assert sizes[0] == len(rows) - sum(ended) and sizes == sorted(sizes, reverse=True)
    for answer, short, end in zip(answers, shorter, ended, strict=True):
        assert short == "" if end else answer.startswith(short)


def test_an_image_goes_through_the_vision_tower_once(
    model: torch.nn.Module, inputs: PaliGemmaInputProcessor, rows: list[EncodedExample], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    plain = type(model).get_image_features

    def counted(self, pixel_values, **more):
        seen.append(len(pixel_values))
        return plain(self, pixel_values, **more)

    monkeypatch.setattr(type(model), "get_image_features", counted)
    together = generate_answers(model, inputs, rows, 4)
    assert seen == [8] and len(rows) == 24
    apart = [EncodedExample(row.input_ids, 0, dict(row.image_inputs)) for row in rows]
    assert generate_answers(model, inputs, apart, 4) == together


@pytest.mark.parametrize(("chunk", "head"), [(512, 2048), (4, 2048), (512, 80), (4, 1)])
def test_likelihoods_are_the_training_loss(
    model: torch.nn.Module,
    inputs: PaliGemmaInputProcessor,
    rows: list[EncodedExample],
    chunk: int,
    head: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Behind prompts that are read once, labels in one pass or in several, of few rows or many, give what each would
    cost as the answer of a training row."""
    monkeypatch.setattr(generation, "MAX_LABEL_TOKENS", chunk)
    monkeypatch.setattr(generation, "MAX_HEAD_TOKENS", head)
    sizes = []
    watch = model.get_output_embeddings().register_forward_hook(lambda *seen: sizes.append(seen[-1].shape[:2]))
    found = label_loglikelihoods(model, inputs, rows[:6], LABELS)
    watch.remove()
    read, *scored = sizes
    assert read == (6, 1) and all(rows == 1 or rows * columns <= head for rows, columns in scored)
    assert sum(rows for rows, _ in scored) % 6 == 0 and (len(scored) == 1) == ((chunk, head) == (512, 2048))
    for row, numbers in zip(rows[:6], found, strict=True):
        for label, number in zip(LABELS, numbers, strict=True):
            answer = inputs.encode_answer(label)
            forced = inputs.collate([EncodedExample([*row.input_ids, *answer], len(answer), row.image_inputs)])
            with torch.no_grad():
                cost = answer_loss(model, forced, "token") * len(answer)
            torch.testing.assert_close(number, -cost, rtol=1e-4, atol=1e-4)
