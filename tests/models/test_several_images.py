"""Rows with several images and rows without one, of PaliGemma and of models with a chat template."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, PreTrainedModel

from ftlib.errors import UserError
from ftlib.models.encoding import EncodedExample, join_image_inputs, look_up, model_inputs
from ftlib.models.generation import generate_answers, label_loglikelihoods, truncate_prompts
from ftlib.models.loading import load_weights
from ftlib.models.loss import answer_loss
from ftlib.models.paligemma import PaliGemmaInputProcessor
from ftlib.models.registry import InputProcessor
from ftlib.models.vlm import VisionLanguageProcessor
from tests.models import tiny_vlm
from tests.models.test_vlm import ARCHITECTURES, pictures, require_packages  # noqa: F401

QUESTIONS = ("same?", "and this?", "hm\nhm")


def check_batches(model: PreTrainedModel, inputs: InputProcessor, images: list[Image.Image]) -> list[EncodedExample]:
    """Rows of two images, of one and of none: in a batch, loss and answers are those of each row alone.

    Returns:
        The training rows.
    """
    shown = ([images[0], images[1]], images[2], None)
    rows = [inputs.encode_train(prompt, images, "yes") for prompt, images in zip(QUESTIONS, shown, strict=True)]
    sizes = [[images[0].size, images[1].size], [images[2].size], []]
    lengths = inputs.token_lengths(QUESTIONS, ["yes"] * 3, sizes)
    assert lengths == [(len(row.input_ids) - row.n_labels, row.n_labels) for row in rows]
    with torch.no_grad():
        whole = float(answer_loss(model, inputs.collate(rows), "token"))
        alone = [float(answer_loss(model, inputs.collate([row]), "token")) * row.n_labels for row in rows]
    assert whole == pytest.approx(sum(alone) / sum(row.n_labels for row in rows), abs=1e-4)
    asked = [
        row
        for prompt, images in zip(QUESTIONS, shown, strict=True)
        for row in inputs.encode_prompts([prompt, "x"], images)
    ]
    assert [asked[2 * index].input_ids for index in range(3)] == [row.input_ids[: -row.n_labels] for row in rows]
    found = generate_answers(model, inputs, asked, 6)
    assert found == [generate_answers(model, inputs, [row], 6)[0] for row in asked]
    assert found == generate_answers(model, inputs, asked, 6, generation={"do_sample": False})
    likely = label_loglikelihoods(model, inputs, asked, ["yes", "no"])
    assert likely[::2, 0].tolist() == pytest.approx([-loss for loss in alone], abs=1e-3)
    turned = inputs.encode_train(QUESTIONS[0], [images[1], images[0]], "yes")
    with torch.no_grad():
        other = float(answer_loss(model, inputs.collate([turned]), "token")) * turned.n_labels
    assert other != pytest.approx(alone[0], abs=1e-7), "the order of the images does not matter"
    return rows


@pytest.mark.gates
def test_paligemma(folder: Path, pictures: list[Image.Image]) -> None:  # noqa: F811
    """Images stand one behind the other before bos, as the authors stack frames and as transformers' processor does."""
    inputs, model = PaliGemmaInputProcessor.load(folder), load_weights(folder, "float32").eval()
    rows = check_batches(model, inputs, pictures)
    theirs = inputs.processor(
        text=["same?"], images=[[pictures[0], pictures[1]]], suffix=["yes"], return_tensors="pt", padding=True
    )
    assert rows[0].input_ids == theirs["input_ids"][0].tolist()
    assert torch.allclose(look_up(join_image_inputs(rows[:1]))["pixel_values"], theirs["pixel_values"], atol=1e-6)
    assert rows[2].input_ids[0] == inputs.tokenizer.bos_token_id and not rows[2].image_inputs


def test_a_long_question_keeps_all_images(paligemmas: dict[str, Path], pictures: list[Image.Image]) -> None:  # noqa: F811
    inputs = PaliGemmaInputProcessor.load(paligemmas["paligemma"])
    (row,) = inputs.encode_prompts(["a b c d e f"], pictures[:2])
    images = row.input_ids.count(inputs.processor.image_token_id)
    inputs.max_length = images + 4
    (cut,) = truncate_prompts(inputs, [row], 1)
    assert len(cut.input_ids) == images + 3 and cut.input_ids[: images + 1] == row.input_ids[: images + 1]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def vlm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    require_packages(request.param)
    path = tmp_path_factory.mktemp("vlm") / request.param
    tiny_vlm.save(request.param, path)
    yield path


def test_models_with_a_chat_template(vlm: Path, pictures: list[Image.Image]) -> None:  # noqa: F811
    inputs, model = VisionLanguageProcessor.load(vlm), load_weights(vlm, "float32", "vlm").eval()
    rows = check_batches(model, inputs, pictures)
    theirs = AutoProcessor.from_pretrained(vlm, use_fast=False)
    text = inputs._render("same?", 2)
    one = theirs(text=[text], images=[pictures[:2]], add_special_tokens=False, padding=False, return_tensors="pt")
    assert rows[0].input_ids[: -rows[0].n_labels] == one["input_ids"][0].tolist()
    joined = model_inputs(join_image_inputs(rows[:1]))
    assert all(torch.equal(joined[name], torch.as_tensor(one[name])) for name in joined if name != "use_cache")


def test_images_between_words_and_in_later_turns(vlm: Path, pictures: list[Image.Image]) -> None:  # noqa: F811
    """Labels on all answers: each stands behind what generation would see when it is asked for."""
    inputs = VisionLanguageProcessor.load(vlm, conversations=True, all_turns=True)
    image = {"type": "image"}
    turns = [
        {"role": "user", "content": [image, {"type": "text", "text": "what?"}]},
        {"role": "assistant", "content": "a cat"},
        {"role": "user", "content": [{"type": "text", "text": "and"}, image, {"type": "text", "text": "?"}]},
    ]
    shown = pictures[:2]
    row = inputs.encode_train(json.dumps(turns), shown, "two")
    # LLaVA-OneVision cuts the only image of a row into tiles, but none of several.
    texts = inputs._image_texts([one.size for one in shown])
    (first,) = inputs._prompt_ids([json.dumps(turns[:1])], [texts[:1]])
    (second,) = inputs.encode_prompts([json.dumps(turns)], shown)
    answer = inputs.encode_answer("a cat")
    labels = inputs.collate([row])["labels"][0].tolist()
    expected = [-100] * len(second.input_ids) + inputs.encode_answer("two")
    expected[len(first) : len(first) + len(answer)] = answer
    assert labels == expected and row.input_ids[: len(first)] == first
    assert inputs.token_lengths([json.dumps(turns)], ["two"], [[one.size for one in shown]]) == [
        (len(first), len(row.input_ids) - len(first))
    ]
    with pytest.raises(UserError, match="shows 2 images, but its row has 1"):
        inputs.encode_prompts([json.dumps(turns)], shown[:1])
