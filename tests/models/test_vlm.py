"""Vision-language models of twelve architectures: rows are the processor's own, only answers carry labels, losses and
answers are the model's.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoProcessor, Florence2Config, PreTrainedModel

from ftlib.config.schema import Lora
from ftlib.errors import UserError
from ftlib.merging.checkpoint_io import canonical_name, canonical_names, model_part_of, open_weights
from ftlib.models import generation, prompt_cache
from ftlib.models.adapters import prepare_for_training
from ftlib.models.encoding import IGNORE_INDEX, PER_ROW, join_image_inputs, model_inputs, split_batch
from ftlib.models.generation import generate_answers, generate_with_logprobs, label_loglikelihoods
from ftlib.models.loading import load_weights
from ftlib.models.loss import answer_loss, count_items
from ftlib.models.prompt_cache import PromptReader
from ftlib.models.vlm import VisionLanguageProcessor, module_group
from ftlib.training.oom import MicroBatchSplitter
from tests.models import tiny_vlm
from tests.models.logprobs import assert_logprobs_are_the_models_own

WITHOUT_TORCHVISION = ("gemma3", "idefics3")
ARCHITECTURES = [
    pytest.param(name, marks=() if name in WITHOUT_TORCHVISION else pytest.mark.long) for name in tiny_vlm.ALL
]
SIZES = ((80, 60), (60, 120), (40, 40))
PROMPTS = ("what?", "which\n one", "say <image> or [IMG]")
ANSWERS = ("a cat", "<eos>", "two  blanks")


def require_packages(architecture: str) -> None:
    if architecture not in WITHOUT_TORCHVISION and importlib.util.find_spec("torchvision") is None:
        pytest.skip("needs torchvision: make vlm")


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    noise = np.random.default_rng(0)
    return [Image.fromarray(noise.integers(0, 255, (height, width, 3), dtype=np.uint8)) for width, height in SIZES]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    require_packages(request.param)
    path = tmp_path_factory.mktemp("vlm") / request.param
    tiny_vlm.save(request.param, path)
    yield path


@pytest.fixture(scope="module")
def inputs(folder: Path) -> VisionLanguageProcessor:
    return VisionLanguageProcessor.load(folder)


@pytest.fixture(scope="module")
def model(folder: Path) -> PreTrainedModel:
    return load_weights(folder, "float32", "vlm").eval()


def test_rows_are_the_processor_s_own(
    folder: Path, inputs: VisionLanguageProcessor, pictures: list[Image.Image]
) -> None:
    """Whole texts, images and all, given to transformers' processor at once; the text of PROMPTS has placeholders."""
    theirs = AutoProcessor.from_pretrained(folder, use_fast=False)
    rows = [inputs.encode_train(*row) for row in zip(PROMPTS, pictures, ANSWERS, strict=True)]
    asked = [inputs._render(prompt) for prompt in PROMPTS[:2]]
    for row, text, picture in zip(rows, asked, pictures, strict=False):
        one = theirs(text=[text], images=[[picture]], add_special_tokens=False, padding=False, return_tensors="pt")
        prompt = row.input_ids[: len(row.input_ids) - row.n_labels]
        assert prompt == one["input_ids"][0].tolist()
        assert set(row.image_inputs) == set(one) - {
            "input_ids",
            "attention_mask",
            "mm_token_type_ids",
            "token_type_ids",
        }
    both = theirs(
        text=asked, images=[[picture] for picture in pictures[:2]], add_special_tokens=False, padding=True,
        padding_side="left", return_tensors="pt",
    )  # fmt: skip
    for name, joined in join_image_inputs(rows[:2]).items():
        if name.endswith(PER_ROW):  # ftlib's own
            continue
        assert torch.equal(joined, torch.as_tensor(both[name])), name
    asked_only = inputs.collate([inputs.encode_prompts([PROMPTS[index]], pictures[index])[0] for index in (0, 1)])
    for name in set(both) & {"input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids"}:
        assert torch.equal(asked_only[name], both[name]), name


def test_only_the_answer_and_its_end_carry_labels(inputs: VisionLanguageProcessor, pictures: list[Image.Image]) -> None:
    rows = [inputs.encode_train(*row) for row in zip(PROMPTS, pictures, ANSWERS, strict=True)]
    batch = inputs.collate(rows)
    for labels, ids, answer in zip(batch["labels"], batch["input_ids"], ANSWERS, strict=True):
        kept = labels[labels != IGNORE_INDEX].tolist()
        assert inputs.decode(kept) == answer and kept[-1] == inputs.eos_token_id
        assert inputs._image_id not in kept and inputs._image_id in ids.tolist()
        assert kept.count(inputs.eos_token_id) == 1
    lengths = inputs.token_lengths(PROMPTS, ANSWERS, [[size] for size in SIZES])
    assert lengths == [(len(row.input_ids) - row.n_labels, row.n_labels) for row in rows]


def test_loss_is_the_model_s_own_and_does_not_depend_on_the_batch(
    model: PreTrainedModel, inputs: VisionLanguageProcessor, pictures: list[Image.Image]
) -> None:
    rows = [inputs.encode_train(*row) for row in zip(PROMPTS, pictures, ANSWERS, strict=True)]
    with torch.no_grad():
        batch = inputs.collate(rows)
        found = float(answer_loss(model, batch, "token"))
        own = float(model(**model_inputs(batch), labels=batch["labels"]).loss)
        alone = [float(answer_loss(model, inputs.collate([row]), "token")) * row.n_labels for row in rows]
        pieces = [
            answer_loss(model, piece, "token", count_items(batch["labels"], "token")) for piece in split_batch(batch, 2)
        ]
    assert len(pieces) == 2 and float(sum(pieces)) == pytest.approx(found, abs=1e-5)
    assert found == pytest.approx(own, abs=1e-5)
    assert found == pytest.approx(sum(alone) / sum(row.n_labels for row in rows), abs=1e-5)


def test_halves_of_rows_with_two_images_one_and_none_add_up(
    folder: Path, inputs: VisionLanguageProcessor, pictures: list[Image.Image]
) -> None:
    """After an out-of-memory error in the backward pass: the same loss and gradients, some pieces without an image."""
    model = load_weights(folder, "float32", "vlm")
    shown: list[list[Image.Image]] = [[], pictures[:2], [], pictures[2:]]
    batch = inputs.collate([inputs.encode_train("what?", images, "an answer") for images in shown])
    items, sizes = count_items(batch["labels"], "token"), []

    def compute(piece: dict[str, Tensor], largest: int = 1) -> Tensor:
        sizes.append(len(piece["input_ids"]))
        loss = answer_loss(model, piece, "token", items)
        loss.backward()
        if sizes[-1] > largest:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return loss.detach()

    def gradients() -> dict[str, Tensor]:
        found = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
        model.zero_grad()
        return found

    whole, expected = compute(batch, largest=4), gradients()
    found = MicroBatchSplitter().run(0, batch, compute, model.zero_grad)
    assert sizes[1:] == [4, 2, 1, 1, 1, 1]
    torch.testing.assert_close(found, whole)
    torch.testing.assert_close(gradients(), expected)


def test_answers_are_those_of_generate(
    model: PreTrainedModel,
    inputs: VisionLanguageProcessor,
    pictures: list[Image.Image],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In a batch padded on the left, with two questions about one image."""
    rows = [*inputs.encode_prompts(PROMPTS[:2], pictures[0]), *inputs.encode_prompts(["x"], pictures[1])]
    found = generate_answers(model, inputs, rows, 8)
    assert any(found)
    assert found == generate_answers(model, inputs, rows, 8, generation={"do_sample": False})
    assert found == [generate_answers(model, inputs, [row], 8)[0] for row in rows]
    assert_logprobs_are_the_models_own(model, inputs, rows, generate_with_logprobs(model, inputs, rows, 8))
    with monkeypatch.context() as context:
        context.setattr(prompt_cache, "CPU_CHUNK_TOKENS", 1)
        assert generate_answers(model, inputs, rows, 8) == found, "each row read on its own, with its own image"
    longest = max(len(row.input_ids) for row in rows)
    monkeypatch.setattr(inputs, "max_length", longest + 2)  # the longest row is done before the others
    assert generate_answers(model, inputs, rows, 8) == [generate_answers(model, inputs, [row], 8)[0] for row in rows]


@pytest.mark.parametrize("chunk", [1, 640])
def test_an_image_is_read_once_for_all_questions_about_it(
    model: PreTrainedModel,
    inputs: VisionLanguageProcessor,
    pictures: list[Image.Image],
    chunk: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Image and template go through the model once an image where it keeps keys and values only."""
    questions = ["what?", "which one", "?", "how many, then", "is it"]
    rows = [row for picture in pictures[:2] for row in inputs.encode_prompts(questions, picture)]
    monkeypatch.setattr(prompt_cache, "_LEAST_SAVED", -1)  # images have few tokens here
    shared = prompt_cache._find_shared_prefixes(model, rows)
    assert shared is not None
    shares = prompt_cache._keeps_key_values(model, shared.longest + shared.rest + 8)
    monkeypatch.setattr(prompt_cache, "CPU_CHUNK_TOKENS", chunk)
    tokens, images = [], 0

    def note(module: Any, inputs: Any, named: dict[str, Any]) -> None:
        nonlocal images
        tokens.append(named["position_ids"].shape[-2:])
        images += len(named.get("pixel_values", ()))

    with model.register_forward_pre_hook(note, with_kwargs=True):
        found = generate_with_logprobs(model, inputs, rows, 8)
    read = sum(shape.numel() for shape in tokens if shape[1] > 1)
    assert (read <= 2 * shared.longest + 10 * shared.rest) == shares
    pixels = rows[0].image_inputs["pixel_values"], rows[5].image_inputs["pixel_values"]
    assert not shares or images == sum(map(len, pixels))
    assert [one.text for one in found] == generate_answers(model, inputs, rows, 8, generation={"do_sample": False})
    alone = [generate_with_logprobs(model, inputs, [row], 8)[0] for row in rows]
    assert [one.token_ids for one in found] == [one.token_ids for one in alone]
    for one, other in zip(found, alone, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


def test_rows_take_the_places_of_ended_ones(
    model: PreTrainedModel,
    inputs: VisionLanguageProcessor,
    pictures: list[Image.Image],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    questions = [f"{'and ' * (number % 3)}how many, {number}?" for number in range(9)]
    rows = [inputs.encode_prompts([one], pictures[number % 3])[0] for number, one in enumerate(questions)]
    monkeypatch.setattr(VisionLanguageProcessor, "stop_token_ids", set())  # answers end where positions do
    monkeypatch.setattr(inputs, "max_length", max(len(row.input_ids) for row in rows) + 2)
    alone = [generate_with_logprobs(model, inputs, [row], 8)[0] for row in rows]
    assert len({len(one.token_ids) for one in alone}) > 1
    joined, join = [], generation._Batch.join
    monkeypatch.setattr(generation._Batch, "join", lambda *given: joined.append(given) or join(*given))
    found = generate_with_logprobs(model, inputs, rows, 8, batch_size=4)
    assert bool(joined) == PromptReader(model, inputs, rows, 8).can_join
    assert [one.token_ids for one in found] == [one.token_ids for one in alone]
    for one, other in zip(found, alone, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


def test_likelihoods_are_those_of_training_rows(
    model: PreTrainedModel, inputs: VisionLanguageProcessor, pictures: list[Image.Image]
) -> None:
    labels, questions = ("a", "b c", "dd"), [(PROMPTS[0], pictures[0]), (PROMPTS[1], pictures[0]), ("x", pictures[1])]
    rows = [inputs.encode_prompts([prompt], picture)[0] for prompt, picture in questions]
    found = label_loglikelihoods(model, inputs, rows, labels)
    for index, (prompt, picture) in enumerate(questions):
        for number, label in enumerate(labels):
            row = inputs.encode_train(prompt, picture, label)
            with torch.no_grad():
                loss = float(answer_loss(model, inputs.collate([row]), "token"))
            assert float(found[index, number]) == pytest.approx(-loss * row.n_labels, abs=1e-4)


def test_parts_and_adapters(folder: Path, model: PreTrainedModel) -> None:
    """Every part has parameters; adapters on attention and mlp reach the layers of language model and tower."""
    parts = {name: module_group(model, name) for name, _ in model.named_parameters()}
    assert set(parts.values()) == {"vision", "projector", "embeddings", "language"}
    words = {"language": ("language_model", "text_model"), "vision": ("vision", "visual")}
    for name, part in parts.items():
        assert part not in words or any(word in name for word in words[part]), (name, part)
    fresh = load_weights(folder, "float32", "vlm")
    adapted = prepare_for_training(fresh, Lora(method="lora", r=2, alpha=4, freeze=[]), "base", "vlm")
    names = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    for part in words.values():
        assert any(word in name for name in names for word in part), names


@pytest.mark.parametrize(
    ("method", "quantization"), [("lora", "none"), ("dora", "none"), ("lora", "nf4"), ("lora", "int8")]
)
def test_gradients_of_a_method(
    folder: Path,
    inputs: VisionLanguageProcessor,
    pictures: list[Image.Image],
    method: Literal["lora", "dora"],
    quantization: Literal["none", "nf4", "int8"],
) -> None:
    """Adapters of language model and vision tower get gradients, the same with gradient checkpointing; quantization
    leaves the vision tower, the projector and the head as they are.
    """
    base = load_weights(folder, "float32", "vlm", quantization)
    packed = {
        module_group(base, f"{name}.weight")
        for name, one in base.named_modules()
        if type(one).__name__ in ("Linear4bit", "Linear8bitLt")
    }
    assert packed == (set() if quantization == "none" else {"language"})
    adapter = Lora(method=method, r=2, alpha=4, dropout=0.0, freeze=[])
    model = prepare_for_training(base, adapter, "base", "vlm").train()
    batch = inputs.collate([inputs.encode_train(*row) for row in zip(PROMPTS, pictures, ANSWERS, strict=True)])
    trained = {name: one for name, one in model.named_parameters() if one.requires_grad and "lora_B" in name}
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad(set_to_none=True)
        answer_loss(model, batch, "token").backward()
        gradients.append({name: one.grad for name, one in trained.items() if one.grad is not None and one.grad.any()})
    plain, checkpointed = gradients
    for part in (("language_model", "text_model"), ("vision", "visual")):
        assert any(word in name for name in plain for word in part), part
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        assert torch.allclose(gradient, checkpointed[name], atol=1e-6), name


def test_merges_know_names_and_parts(folder: Path, model: PreTrainedModel) -> None:
    """Files and modules are named differently; both have one canonical name, and its part is the module's."""
    stored = set(canonical_names(open_weights(folder)).values())
    for name, _ in model.named_parameters():
        key = canonical_name(name)
        assert key in stored, name
        part = model_part_of(key)
        assert module_group(model, name) == {"head": "embeddings"}.get(part, part), name


def test_an_image_is_never_cut(inputs: VisionLanguageProcessor, folder: Path, pictures: list[Image.Image]) -> None:
    (asked,) = inputs.encode_prompts(["what?"], pictures[0])
    short = VisionLanguageProcessor.load(folder, len(asked.input_ids) + 2)
    row = short.encode_train("what?", pictures[0], "a long answer")
    assert row.input_ids[: len(asked.input_ids)] == asked.input_ids and row.n_labels == 2
    tight = VisionLanguageProcessor.load(folder, len(asked.input_ids))
    with pytest.raises(UserError, match="no room for an answer"):
        generate_answers(torch.nn.Linear(1, 1), tight, [asked], 4)


def test_a_batch_is_split_with_its_images() -> None:
    """Of rows with two patches, with three, and without an image."""
    batch = {
        "input_ids": torch.arange(3)[:, None],
        "pixel_values": torch.tensor([0, 0, 1, 1, 1])[:, None],
        "pixel_values_per_row": torch.tensor([2, 3, 0]),
    }
    first, second, third = split_batch(batch, 1)
    assert first["pixel_values"].flatten().tolist() == [0, 0] and second["pixel_values"].flatten().tolist() == [1, 1, 1]
    assert list(third) == ["input_ids"] and third["input_ids"].tolist() == [[2]]
    assert list(model_inputs(first)) == ["input_ids", "pixel_values", "use_cache"]


def test_an_encoder_decoder_is_refused_by_name(tmp_path: Path) -> None:
    Florence2Config().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(UserError, match="florence2 is an encoder-decoder"):
        VisionLanguageProcessor.load(tmp_path)


@pytest.mark.parametrize("file", ["config.json", "processor_config.json"])
def test_code_of_a_model_is_refused_with_the_file_that_names_it(tmp_path: Path, file: str) -> None:
    tiny_vlm.save("gemma3", tmp_path)
    other = {"config.json": {"model_type": "mine"}, "processor_config.json": {"processor_class": "Mine"}}[file]
    classes = {"AutoConfig": "mine.Mine", "AutoProcessor": "mine.Mine"}
    settings = json.loads((tmp_path / file).read_text())
    (tmp_path / file).write_text(json.dumps({**settings, **other, "auto_map": classes}))
    (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')")
    with pytest.raises(UserError, match=f"ftlib runs none; it is named in {file}\n") as caught:
        VisionLanguageProcessor.load(tmp_path)
    assert "without trust_remote_code" in caught.value.remedy
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda content: content[:-8], "its header tells of"),
        (lambda content: content[:50], "its header would be longer than the file"),
        (lambda content: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a git-lfs pointer"),
    ],
)
def test_damaged_weights_are_refused_by_name(tmp_path: Path, damage: Any, told: str) -> None:
    tiny_vlm.save("gemma3", tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(damage(weights.read_bytes()))
    with pytest.raises(UserError, match=f"model.safetensors: .*{told}"):
        load_weights(tmp_path, "float32", "vlm")


def test_arguments_that_the_image_processor_lacks_are_refused(tmp_path: Path) -> None:
    tiny_vlm.save("gemma3", tmp_path)
    with pytest.raises(UserError, match=r"model\.image_arguments: .*Gemma3ImageProcessorPil.* has no max_pixel"):
        VisionLanguageProcessor.load(tmp_path, image_arguments={"max_pixel": 3})


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (
            {"min_pixels": 9, "max_pixels": 4},
            r"model\.image_arguments: min_pixels \(9\) is larger than max_pixels \(4\)",
        ),
        ({"size": {"shortest_edge": 9, "longest_edge": 4}}, "shortest_edge .9. is larger than longest_edge .4."),
        ({"size": {}}, "rejects an image of .* size must have"),
        ({"do_resize": "big"}, "rejects an image of .*do_resize"),
    ],
)
def test_image_arguments_that_make_no_sense_are_refused(tmp_path: Path, arguments: dict[str, Any], told: str) -> None:
    tiny_vlm.save("gemma3", tmp_path)
    with pytest.raises(UserError, match=told) as caught:
        VisionLanguageProcessor.load(tmp_path, image_arguments=arguments)
    assert "model.image_arguments" in f"{caught.value.problem} {caught.value.remedy}"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda config, processor: setattr(processor, "chat_template", None), "no chat template"),
        (lambda config, processor: setattr(processor, "chat_template", {"default": "x"}), "several chat templates"),
        (lambda config, processor: delattr(config, "image_token_index"), "names no image token"),
    ],
)
def test_what_a_model_lacks_is_named(spoil: Any, message: str) -> None:
    config, processor = tiny_vlm.gemma3()
    plain = SimpleNamespace(model_type="gemma3", image_token_index=config.image_token_index)
    spoil(plain, processor)
    with pytest.raises(UserError, match=message):
        VisionLanguageProcessor(processor, plain)  # type: ignore[arg-type]
