"""ftlib against the authors' own code of PaliGemma: arrays that `make oracle` wrote (`make_big_vision.py`)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import PaliGemmaForConditionalGeneration

from ftlib.config.npz_checkpoints import NpzCheckpoint
from ftlib.models import big_vision
from ftlib.models.encoding import EncodedExample, look_up
from ftlib.models.generation import generate_answers
from ftlib.models.loading import load_weights
from ftlib.models.loss import answer_logits, answer_loss, cut_labels
from ftlib.models.paligemma import PaliGemmaInputProcessor
from tests.golden.make_big_vision import BEAMS, EXAMPLES, FOLDER, SMOOTHING, TOKENIZER, VARIANTS
from tests.models import literal_big_vision as literal

Array = np.ndarray[Any, Any]
Convert = Callable[[str], "Model"]

TOLERANCE = 1e-5
"""Of the largest number of an array."""


class Model:
    """A converted model beside what the authors' code gives for its parameters."""

    def __init__(self, folder: Path, expected: dict[str, Array]) -> None:
        self.folder = folder
        self.expected = expected
        self.inputs = PaliGemmaInputProcessor.load(folder)
        self.weights: PaliGemmaForConditionalGeneration = load_weights(folder, "float32").eval()

    def rows(self, answers: bool) -> list[EncodedExample]:
        """The golden rows with the authors' own pixels and token ids, with or without answers."""
        found = []
        pixels, *names = (self.expected[name] for name in ("image", "text", "mask_ar", "mask_loss"))
        for image, text, causal, labels in zip(pixels, *names, strict=True):
            prompt, n_labels = int((causal == 0).sum()), int(labels.sum()) if answers else 0
            ids = [*self.inputs._image_ids, *text[: prompt + n_labels].tolist()]
            image_inputs = {"pixel_values": torch.from_numpy(image).permute(2, 0, 1)[None]}
            found.append(EncodedExample(ids, n_labels, image_inputs))
        return found


def read(path: Path) -> dict[str, Array]:
    with np.load(path) as arrays:
        return dict(arrays)


def difference(found: torch.Tensor | Array, expected: Array) -> float:
    """The largest one, as a share of the largest number."""
    found = found.detach().numpy() if isinstance(found, torch.Tensor) else found
    assert found.shape == expected.shape
    return float(np.abs(found.astype("f8") - expected).max() / np.abs(expected).max())


def convert_file(npz: Path, folder: Path) -> Path:
    folder.mkdir()
    big_vision.convert(NpzCheckpoint(npz, "digest", str(TOKENIZER), "digest", folder), TOKENIZER, folder)
    return folder


@pytest.fixture(scope="module")
def convert(tmp_path_factory: pytest.TempPathFactory) -> Convert:
    """Name of a golden model → it, converted once."""
    found: dict[str, Model] = {}

    def convert(name: str) -> Model:
        if name not in found:
            expected, folder = read(FOLDER / f"{name}-expected.npz"), tmp_path_factory.mktemp("converted") / "model"
            of_28b = name == "paligemma2-28b"
            with pytest.MonkeyPatch.context() as patch:
                if of_28b:  # tiny arrays that count as those of the 28B
                    patch.setattr(big_vision, "SCALED_BY_WIDTH", (2, 8, 4))
                convert_file(FOLDER / f"{name.removesuffix('-28b')}.npz", folder)
            found[name] = Model(folder, expected)
        return found[name]

    return convert


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_and_losses(name: str, convert: Convert) -> None:
    """Their loss averages each row over its own tokens first; the three rows have different numbers of them."""
    model = convert(name)
    rows, expected = model.rows(answers=True), model.expected
    assert len({row.n_labels for row in rows}) > 1
    batch = cut_labels(model.inputs.collate(rows))
    with torch.no_grad():
        logits, labels = answer_logits(model.weights, batch)
        assert difference(logits[labels >= 0], expected["logits"]) < TOLERANCE
        assert difference(answer_loss(model.weights, batch, "example"), expected["loss/batch"]) < TOLERANCE
        # They share what smoothing takes from the right token among the others, torch among all.
        size = expected["logits"].shape[-1]
        smoothing = SMOOTHING * size / (size - 1)
        smoothed = answer_loss(model.weights, batch, "example", smoothing=smoothing)
        assert difference(smoothed, expected["smoothed/batch"]) < TOLERANCE
        for row, loss, smooth in zip(rows, expected["loss/rows"], expected["smoothed/rows"], strict=True):
            alone = cut_labels(model.inputs.collate([row]))
            for average in ("example", "token"):
                assert difference(answer_loss(model.weights, alone, average), loss) < TOLERANCE
            assert difference(answer_loss(model.weights, alone, "token", smoothing=smoothing), smooth) < TOLERANCE


@pytest.mark.parametrize("name", ["paligemma", "paligemma2"])
def test_gradients(name: str, convert: Convert, tmp_path: Path) -> None:
    """Of all parameters. The authors' are put into transformers' names and shapes as a checkpoint is."""
    model = convert(name)
    gradients = {key.removeprefix("gradient/"): a for key, a in model.expected.items() if key.startswith("gradient/")}
    assert set(gradients) == {key.removeprefix("params/") for key in read(FOLDER / f"{name}.npz")}
    folder = convert_file(literal.save_npz(tmp_path / "gradients.npz", gradients), tmp_path / "gradients")
    expected = dict(load_weights(folder, "float32").named_parameters())
    model.weights.zero_grad()
    answer_loss(model.weights, cut_labels(model.inputs.collate(model.rows(answers=True))), "example").backward()
    found = dict(model.weights.named_parameters())
    assert set(found) == set(expected)
    largest = max(float(array.detach().abs().max()) for array in expected.values())
    for key, parameter in found.items():
        apart = (parameter.grad - expected[key]).abs().max() / largest
        assert apart < TOLERANCE and expected[key].any(), (key, float(apart))


def generate(
    model: Model, patch: pytest.MonkeyPatch, name: str, **settings: Any
) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids of the rows' answers without their ends: ours, and the authors' in an array of theirs."""
    answers: list[list[int]] = []
    patch.setattr(model.inputs, "decode", lambda ids: answers.append(list(ids)))
    theirs = model.expected[name]
    generate_answers(model.weights, model.inputs, model.rows(answers=False), theirs.shape[1], **settings)
    end = model.inputs.eos_token_id
    return answers, [[*row.tolist(), end][: [*row.tolist(), end].index(end)] for row in theirs]


@pytest.mark.parametrize("name", VARIANTS)
def test_greedy_answers(name: str, convert: Convert, monkeypatch: pytest.MonkeyPatch) -> None:
    answers, expected = generate(convert(name), monkeypatch, "decoded")
    assert answers == expected
    assert len({len(answer) for answer in answers}) > 1 and len({token for answer in answers for token in answer}) > 5


def beam_search(model: Model, row: EncodedExample, length: int, ends_anywhere: bool) -> list[int]:
    """The likeliest answer of a search that computes everything anew at every step.

    Args:
        ends_anywhere: every beam may end at every step, and the answer is one that ended; else a beam ends only where
            `<eos>` is among the `BEAMS` likeliest continuations, and an answer may be cut off at the maximum length.
    """
    end = model.inputs.eos_token_id
    live: list[tuple[float, list[int]]] = [(0.0, [])]
    found: list[tuple[float, list[int]]] = []
    for step in range(length):
        rows = [EncodedExample([*row.input_ids, *ids, end], step + 1, row.image_inputs) for _, ids in live]
        with torch.no_grad():
            logits = answer_logits(model.weights, cut_labels(model.inputs.collate(rows)))[0][:, step]
        scores = torch.tensor([[score] for score, _ in live]) + logits.log_softmax(dim=-1)
        if ends_anywhere:
            found += [(float(score), ids) for score, (_, ids) in zip(scores[:, end], live, strict=True)]
        best = scores.flatten().topk(2 * BEAMS)
        going = []
        for rank, (score, index) in enumerate(zip(best.values.tolist(), best.indices.tolist(), strict=True)):
            ids, token = live[index // scores.shape[1]][1], index % scores.shape[1]
            if token != end:
                going.append((score, [*ids, token]))
            elif rank < BEAMS and not ends_anywhere:
                found.append((score, ids))
        live = going[:BEAMS]
    return max(found if ends_anywhere else found + live)[1]


def test_answers_of_a_beam_search(convert: Convert, monkeypatch: pytest.MonkeyPatch) -> None:
    """ftlib's beam search (transformers') and the authors' differ in where a beam may end, and in nothing else."""
    n_equal = 0
    for name in VARIANTS:
        model, settings = convert(name), {"num_beams": BEAMS, "generation": {"length_penalty": 0.0}}
        answers, expected = generate(model, monkeypatch, "beams", **settings)
        length = model.expected["beams"].shape[1]
        for row, ours, theirs in zip(model.rows(answers=False), answers, expected, strict=True):
            assert theirs == beam_search(model, row, length, ends_anywhere=True), name
            assert ours == beam_search(model, row, length, ends_anywhere=False), name
            n_equal += ours == theirs
    assert n_equal >= len(VARIANTS)


def test_conversion_keeps_every_number(convert: Convert) -> None:
    for name in ("paligemma", "paligemma2"):
        ours = load_file(convert(name).folder / "model.safetensors").values()
        theirs = read(FOLDER / f"{name}.npz").values()
        found, expected = (np.sort(np.concatenate([np.ravel(a) for a in arrays])) for arrays in (ours, theirs))
        assert np.array_equal(found, expected)


# Inputs.


def test_prompts_have_the_authors_token_ids(convert: Convert) -> None:
    """Except for newlines at a prompt's end, which ftlib removes."""
    inputs = convert("paligemma").inputs
    first = len(inputs._image_ids)
    cases = json.loads((FOLDER / "texts.json").read_text(encoding="ascii"))
    assert len(cases) > 10
    for text, ids in cases:
        [row] = inputs.encode_prompts([text], Image.new("RGB", (16, 16)))
        found, separator = row.input_ids[first:], inputs._text_ids("\n")
        if text.endswith("\n"):
            assert found[-1:] == separator and found[:-1] == ids[: len(found) - 1] and len(ids) > len(found), text
        else:
            assert found == ids, text


def test_rows_are_the_authors(convert: Convert) -> None:
    """Ids, and where prompt and answer are."""
    model = convert("paligemma")
    image = Image.new("RGB", (16, 16))
    expected = model.rows(answers=True)
    for (prefix, suffix), row in zip(EXAMPLES, expected, strict=True):
        found = model.inputs.encode_train(prefix, image, suffix)
        assert (found.input_ids, found.n_labels) == (row.input_ids, row.n_labels)


def test_pixels_are_within_one_step_of_the_authors(convert: Convert) -> None:
    """Of 255, as Pillow rounds where they truncate."""
    inputs = convert("paligemma").inputs
    pixels = read(FOLDER / "pixels.npz")
    numbers = [name.removeprefix("image/") for name in pixels if name.startswith("image/")]
    assert len(numbers) == 4
    for number in numbers:
        made = look_up(inputs._image_inputs([Image.fromarray(pixels[f"image/{number}"])]))["pixel_values"]
        found = made[0].permute(1, 2, 0).numpy()
        apart = np.abs(found - pixels[f"antialias/{number}"])
        assert apart.max() < 1.001 * 2 / 255, number
    shrunk = np.abs(pixels["plain/3"] - pixels["antialias/3"])
    assert shrunk.max() > 0.3  # without antialiasing, which `resize` does not do
