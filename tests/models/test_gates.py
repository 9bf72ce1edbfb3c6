"""The gates of a right PaliGemma: mask, labels, loss, adapters. Run on the newest and the lowest transformers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import cross_entropy

from ftlib.config.schema import Full, Lora
from ftlib.errors import UserError
from ftlib.models.adapters import count_parameters, prepare_for_training
from ftlib.models.encoding import IGNORE_INDEX, EncodedExample, look_up, model_inputs
from ftlib.models.generation import generate_answers
from ftlib.models.loading import load_adapter, load_weights
from ftlib.models.loss import answer_loss, count_items
from ftlib.models.paligemma import PaliGemmaInputProcessor
from ftlib.models.tiny import tiny_processor

pytestmark = pytest.mark.gates
LORA = Lora(method="lora", r=4, alpha=8, freeze=[])


@pytest.fixture(scope="module")
def inputs(folder: Path) -> PaliGemmaInputProcessor:
    return PaliGemmaInputProcessor.load(folder)


@pytest.fixture
def model(folder: Path) -> torch.nn.Module:
    return load_weights(folder, "float32").eval()


@pytest.fixture(scope="module")
def image(shared: Path) -> Image.Image:
    return Image.open(shared / "data" / "images" / "0003.png").convert("RGB")


def rows_of(inputs: PaliGemmaInputProcessor, image: Image.Image) -> list[EncodedExample]:
    """Rows of different prompt and answer lengths, an empty prompt among them."""
    other = Image.fromarray(255 - np.asarray(image))
    return [
        inputs.encode_train("which digit is this?", image, "3"),
        inputs.encode_train("read", other, "three or eight"),
        inputs.encode_train("", image, "三"),
    ]


def logits_of(model: torch.nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(**model_inputs(batch)).logits
    return logits


def with_token(batch: dict[str, Tensor], column: int, token: int) -> dict[str, Tensor]:
    changed = {name: tensor.clone() for name, tensor in batch.items()}
    changed["input_ids"][0, column] = token
    return changed


def differing_columns(a: Tensor, b: Tensor) -> list[int]:
    return (a - b).abs().amax(dim=(0, 2)).gt(1e-6).nonzero().flatten().tolist()


def test_the_answer_does_not_leak_backwards(
    model: torch.nn.Module, inputs: PaliGemmaInputProcessor, image: Image.Image
) -> None:
    row = inputs.encode_train("read", image, "abcdef")
    batch = inputs.collate([row])
    length = len(row.input_ids)
    for train in (False, True):  # transformers builds the mask by another path in training
        model.train(train)
        for module in model.modules():
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.0
        before = logits_of(model, batch)
        for column in range(length - row.n_labels, length):
            after = logits_of(model, with_token(batch, column, inputs.tokenizer.convert_tokens_to_ids("Z")))
            assert differing_columns(before, after) == list(range(column, length))


def test_the_prompt_sees_itself_both_ways_and_all_of_the_answer_sees_it(
    model: torch.nn.Module, inputs: PaliGemmaInputProcessor, image: Image.Image
) -> None:
    row = inputs.encode_train("which one", image, "abc")
    batch = inputs.collate([row])
    last_of_prompt = len(row.input_ids) - row.n_labels - 2
    after = logits_of(model, with_token(batch, last_of_prompt, inputs.tokenizer.convert_tokens_to_ids("Z")))
    assert differing_columns(logits_of(model, batch), after) == list(range(len(row.input_ids)))


def test_without_token_types_the_mask_would_be_wrong(
    model: torch.nn.Module, inputs: PaliGemmaInputProcessor, image: Image.Image
) -> None:
    """The trap that they are there for: the prompt would be causal, or (SDPA, no padding) the answer would leak."""
    row = inputs.encode_train("which one", image, "abc")
    batch = inputs.collate([row])
    assert batch["token_type_ids"].tolist() == [[0] * (len(row.input_ids) - row.n_labels) + [1] * row.n_labels]
    asked = inputs.collate_generate(inputs.encode_prompts(["which one", "x"], image))
    assert asked["token_type_ids"].shape == asked["input_ids"].shape and not asked["token_type_ids"].any()
    without = {name: tensor for name, tensor in batch.items() if name != "token_type_ids"}
    assert (logits_of(model, without) - logits_of(model, batch)).abs().max() > 1e-3


def test_the_image_is_looked_at_and_learned_from(
    model: torch.nn.Module, inputs: PaliGemmaInputProcessor, image: Image.Image
) -> None:
    row = inputs.encode_train("read", image, "3")
    other = inputs.encode_train("read", Image.fromarray(255 - np.asarray(image)), "3")
    changed = logits_of(model, inputs.collate([row])) - logits_of(model, inputs.collate([other]))
    assert changed.abs().amax(dim=-1).min() > 1e-6
    answer_loss(model, inputs.collate([row]), "token").backward()
    towers = [p for name, p in model.named_parameters() if "vision_tower" in name and "k_proj.bias" not in name]
    assert towers and all(p.grad is not None and p.grad.abs().max() > 0 for p in towers)


def test_embedded_prompts_are_what_pixels_give(
    model: torch.nn.Module, inputs: PaliGemmaInputProcessor, image: Image.Image
) -> None:
    """Image features computed beforehand go in as embeddings: as `mm_encoder_outputs` some versions swallow them."""
    rows = inputs.encode_prompts(["which one", "read"], image)
    batch = inputs.embed_prompts(model, rows)
    assert "pixel_values" not in batch and "input_ids" not in batch
    with torch.no_grad():
        pixels = logits_of(model, inputs.collate_generate(rows))
        embedded = model(**model_inputs(batch)).logits
    seen = batch["attention_mask"].bool()
    torch.testing.assert_close(embedded[seen], pixels[seen], rtol=1e-5, atol=1e-5)


def test_positions_count_from_one_and_leave_padding_out(inputs: PaliGemmaInputProcessor, image: Image.Image) -> None:
    long, short = (inputs.encode_train(prompt, image, "3") for prompt in ("which one", "read"))
    padding = len(long.input_ids) - len(short.input_ids)
    positions = model_inputs(inputs.collate([long, short]))["position_ids"].tolist()
    assert positions[0] == list(range(1, len(long.input_ids) + 1))
    assert positions[1][padding:] == list(range(1, len(short.input_ids) + 1))


@pytest.mark.parametrize(("size", "tokens"), [(224, 256), (448, 1024), (896, 4096)])
def test_an_image_has_the_tokens_of_its_resolution(size: int, tokens: int) -> None:
    inputs = PaliGemmaInputProcessor(tiny_processor(size, 14))
    wide = Image.fromarray(np.arange(90 * 30 * 3, dtype=np.uint8).reshape(30, 90, 3))
    row = inputs.encode_train("a", wide, "b")
    assert row.input_ids[:tokens] == [inputs.processor.image_token_id] * tokens
    assert row.input_ids[tokens] == inputs.tokenizer.bos_token_id and len(row.input_ids) == tokens + 5
    pixels = look_up(row.image_inputs)["pixel_values"]
    assert pixels.shape == (1, 3, size, size) and -1 <= pixels.min() < pixels.max() <= 1
    theirs = inputs.processor(images=wide, text="<image>a", suffix="b", return_tensors="pt")
    assert row.input_ids == theirs["input_ids"][0].tolist()
    torch.testing.assert_close(pixels, theirs["pixel_values"], rtol=0, atol=1e-6)


def test_rows_are_what_the_processor_makes(inputs: PaliGemmaInputProcessor, image: Image.Image) -> None:
    for prompt, answer in [
        ("which digit is this?", "3"),
        ("detect  x ; y", "<loc0001><loc1023> x"),
        ("", "あ"),
        ("a\n", "b"),
    ]:
        row = inputs.encode_train(prompt, image, answer)
        theirs = inputs.processor(images=image, text=f"<image>{prompt.rstrip()}", suffix=answer, return_tensors="pt")
        assert row.input_ids == theirs["input_ids"][0].tolist()
        assert row.n_labels == int(theirs["token_type_ids"].sum())
        pixels = look_up(row.image_inputs)["pixel_values"]
        torch.testing.assert_close(pixels, theirs["pixel_values"], rtol=0, atol=1e-6)


def test_location_and_mask_words_are_one_token_each(inputs: PaliGemmaInputProcessor) -> None:
    for word in ("<loc0000>", "<loc0123>", "<loc1023>", "<seg000>", "<seg127>"):
        ids = inputs.tokenizer(word, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert len(ids) == 1
        assert inputs.decode(torch.tensor(ids)) == word


def test_special_tokens_in_user_text_stay_text(inputs: PaliGemmaInputProcessor, image: Image.Image) -> None:
    row = inputs.encode_train("count <image> and <eos> <bos><pad>", image, "x<eos>y")
    plain = inputs.encode_train("", image, "")
    for token in (
        inputs.processor.image_token_id,
        inputs.eos_token_id,
        inputs.tokenizer.bos_token_id,
        inputs.pad_token_id,
    ):
        assert row.input_ids.count(token) == plain.input_ids.count(token)


def test_labels_are_answer_and_eos_and_every_row_has_some(inputs: PaliGemmaInputProcessor, image: Image.Image) -> None:
    rows = rows_of(inputs, image)
    batch = inputs.collate(rows)
    for row, ids, labels in zip(rows, batch["input_ids"], batch["labels"], strict=True):
        labelled = labels.ne(IGNORE_INDEX)
        assert labelled.sum() == row.n_labels >= 2
        assert labels[-1] == inputs.eos_token_id
        assert torch.equal(labels[labelled], ids[labelled])
        assert not labels[labelled].eq(inputs.pad_token_id).any()


def full_loss(model: torch.nn.Module, batch: dict[str, Tensor], average: str, smoothing: float = 0.0) -> Tensor:
    """The loss from all logits, written out row by row; smoothed by the paper's formula."""
    logits = logits_of(model, batch)
    per_row = []
    for row_logits, labels in zip(logits, batch["labels"], strict=True):
        kept = labels[1:].ne(IGNORE_INDEX)
        hard = cross_entropy(row_logits[:-1][kept], labels[1:][kept], reduction="none")
        uniform = -row_logits[:-1][kept].log_softmax(dim=-1).mean(dim=-1)
        per_row.append((1 - smoothing) * hard + smoothing * uniform)
    return torch.cat(per_row).mean() if average == "token" else torch.stack([row.mean() for row in per_row]).mean()


@pytest.mark.parametrize("average", ["token", "example"])
def test_loss_from_the_answers_logits_is_the_loss_from_all(
    model: torch.nn.Module, inputs: PaliGemmaInputProcessor, image: Image.Image, average: str
) -> None:
    batch = inputs.collate(rows_of(inputs, image))
    torch.testing.assert_close(
        answer_loss(model, batch, average), full_loss(model, batch, average), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("average", ["token", "example"])
def test_label_smoothing_is_shifted_and_leaves_prompts_out(
    model: torch.nn.Module, inputs: PaliGemmaInputProcessor, image: Image.Image, average: str
) -> None:
    batch = inputs.collate(rows_of(inputs, image))
    ours = answer_loss(model, batch, average, smoothing=0.3)
    torch.testing.assert_close(ours, full_loss(model, batch, average, 0.3), rtol=1e-5, atol=1e-5)
    assert abs(ours - answer_loss(model, batch, average)) > 0.01


@pytest.mark.parametrize("average", ["token", "example"])
def test_rows_without_labels_weigh_nothing(
    model: torch.nn.Module, inputs: PaliGemmaInputProcessor, image: Image.Image, average: str
) -> None:
    """A rank whose share of a batch is empty takes part with such rows: loss and gradient are zero, not NaN."""
    rows = rows_of(inputs, image)
    unlabelled = [replace(row, n_labels=0) for row in rows]
    batch = inputs.collate(rows)
    assert count_items(inputs.collate([*rows, *unlabelled])["labels"], average) == count_items(batch["labels"], average)
    loss = answer_loss(model, inputs.collate(unlabelled), average, items=3)
    loss.backward()
    assert loss == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
    both = answer_loss(model, inputs.collate([*rows, *unlabelled]), average)
    torch.testing.assert_close(both, answer_loss(model, batch, average), rtol=1e-5, atol=1e-5)


def test_token_average_is_transformers_own_loss(
    model: torch.nn.Module, inputs: PaliGemmaInputProcessor, image: Image.Image
) -> None:
    batch = inputs.collate(rows_of(inputs, image))
    with torch.no_grad():
        theirs = model(**model_inputs(batch), labels=batch["labels"]).loss
    torch.testing.assert_close(answer_loss(model, batch, "token"), theirs, rtol=1e-6, atol=1e-6)


def to_the_right(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same rows, padded on the right."""
    shifts = [int(mask.eq(0).sum()) for mask in batch["attention_mask"]]
    moved = {name: tensor for name, tensor in batch.items() if name.startswith("pixel_values")}
    for name in ("input_ids", "attention_mask", "token_type_ids", "labels"):
        moved[name] = torch.stack([row.roll(-shift) for row, shift in zip(batch[name], shifts, strict=True)])
    return moved


@pytest.mark.parametrize("average", ["token", "example"])
def test_loss_does_not_depend_on_padding_side(
    model: torch.nn.Module, inputs: PaliGemmaInputProcessor, image: Image.Image, average: str
) -> None:
    batch = inputs.collate(rows_of(inputs, image))
    right = full_loss(model, to_the_right(batch), average)
    torch.testing.assert_close(answer_loss(model, batch, average), right, rtol=1e-5, atol=1e-5)


def cuts(rows: list[EncodedExample], size: int) -> Iterator[list[EncodedExample]]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


@pytest.mark.parametrize("average", ["token", "example"])
@pytest.mark.parametrize("size", [1, 2])
def test_micro_batches_add_up_to_the_whole(
    model: torch.nn.Module, inputs: PaliGemmaInputProcessor, image: Image.Image, average: str, size: int
) -> None:
    rows = rows_of(inputs, image)
    whole = inputs.collate(rows)
    items = count_items(whole["labels"], average)
    answer_loss(model, whole, average).backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    losses = [answer_loss(model, inputs.collate(cut), average, items) for cut in cuts(rows, size)]
    torch.stack(losses).sum().backward()
    torch.testing.assert_close(torch.stack(losses).sum(), answer_loss(model, whole, average), rtol=1e-5, atol=1e-5)
    for ours, theirs in zip([p.grad for p in model.parameters() if p.grad is not None], gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_generation_in_a_batch_is_teacher_forcing(
    model: torch.nn.Module, inputs: PaliGemmaInputProcessor, image: Image.Image
) -> None:
    """Greedy answers of a padded batch equal those of single rows, and the argmax of a training row's own logits."""
    rows = inputs.encode_prompts(("which digit is this?", "read", ""), image)
    together = generate_answers(model, inputs, rows, max_new_tokens=6)
    for prompt, row, answer in zip(("which digit is this?", "read", ""), rows, together, strict=True):
        assert generate_answers(model, inputs, [row], max_new_tokens=6) == [answer]
        ids = list(row.input_ids)
        for _ in range(6):
            forced = EncodedExample([*ids, inputs.pad_token_id], len(ids) + 1 - len(row.input_ids), row.image_inputs)
            logits = logits_of(model, inputs.collate([forced]))
            ids.append(int(logits[0, len(ids) - 1].argmax()))
            if ids[-1] == inputs.eos_token_id:
                break
        assert inputs.decode(torch.tensor(ids[len(row.input_ids) :])) == answer, prompt


def train_a_little(model: torch.nn.Module, batch: dict[str, Tensor]) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for _ in range(3):
        answer_loss(model, batch, "token").backward()
        optimizer.step()
        optimizer.zero_grad()


def test_a_saved_adapter_is_really_loaded(
    model: torch.nn.Module, inputs: PaliGemmaInputProcessor, image: Image.Image, folder: Path, tmp_path: Path
) -> None:
    batch = inputs.collate(rows_of(inputs, image))
    base = logits_of(model, batch)
    adapted = prepare_for_training(model, LORA, "some/base")
    trained, total = count_parameters(adapted)
    assert 0 < trained < total / 4
    train_a_little(adapted, batch)
    ours = logits_of(adapted.eval(), batch)
    assert (ours - base).abs().max() > 0.1
    adapted.save_pretrained(tmp_path, save_embedding_layers=False)

    again = load_adapter(load_weights(folder, "float32"), tmp_path).eval()
    assert torch.equal(logits_of(again, batch), ours)

    from peft import PeftModel

    plain = PeftModel.from_pretrained(load_weights(folder, "float32"), tmp_path).eval()
    assert torch.equal(logits_of(plain, batch), ours)
    torch.testing.assert_close(logits_of(plain.merge_and_unload(), batch), ours, rtol=1e-4, atol=1e-4)


def test_an_adapter_with_other_keys_is_refused(model: torch.nn.Module, folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    prepare_for_training(model, LORA, "some/base").save_pretrained(tmp_path, save_embedding_layers=False)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    name = sorted(weights)[0]
    weights["renamed." + name] = weights.pop(name)
    save_file(weights, tmp_path / "adapter_model.safetensors")
    with pytest.raises(UserError, match="1 missing weights"):
        load_adapter(load_weights(folder, "float32"), tmp_path)


def test_adapters_go_where_they_should(folder: Path) -> None:
    def adapted(**settings: object) -> list[str]:
        model = prepare_for_training(load_weights(folder, "float32"), Lora(method="lora", **settings), "x")
        return [name for name, parameter in model.named_parameters() if parameter.requires_grad]

    assert all("language_model" in name for name in adapted())
    assert not any("mlp" in name for name in adapted(targets=["attention"]))
    assert any("vision_tower" in name and "fc1" in name for name in adapted(freeze=[]))
    assert len(adapted()) == 2 * 2 * 7  # A and B, two layers, q k v o gate up down
    with pytest.raises(UserError, match="nothing is left to adapt"):
        adapted(freeze=["vision", "language"])


@pytest.mark.parametrize("part", ["vision", "projector", "embeddings", "language"])
def test_frozen_parts_stay(
    model: torch.nn.Module, inputs: PaliGemmaInputProcessor, image: Image.Image, part: str
) -> None:
    words = {"vision": "vision_tower", "projector": "multi_modal_projector", "embeddings": "embed_tokens"}
    prepare_for_training(model, Full(method="full", freeze=[part]), "x")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train_a_little(model, inputs.collate(rows_of(inputs, image)))
    for name, parameter in model.named_parameters():
        in_part = words[part] in name if part in words else not any(word in name for word in words.values())
        if in_part:
            assert torch.equal(parameter, before[name]), name
        elif "k_proj.bias" not in name:  # a shift of all keys cancels in the softmax
            assert not torch.equal(parameter, before[name]), name


def test_a_model_without_some_weights_is_refused(folder: Path, tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    dropped = next(name for name in sorted(weights) if "q_proj" in name)
    kept = {name: tensor for name, tensor in weights.items() if name != dropped}
    save_file(kept, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"1 missing weights: .*q_proj"):
        load_weights(tmp_path / "model", "float32")
    save_file(
        {**weights, "odd.weight": torch.zeros(2)}, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"}
    )
    with pytest.raises(UserError, match=r"1 unexpected weights: odd\.weight"):
        load_weights(tmp_path / "model", "float32")


def test_weights_under_older_key_names_are_found(model: torch.nn.Module, folder: Path, tmp_path: Path) -> None:
    """Checkpoints of the released models name their weights `language_model.model.…`; transformers maps them."""
    import shutil

    from safetensors.torch import save_file

    shutil.copytree(folder, tmp_path / "model")
    older = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue  # tied
        name = name.removeprefix("model.").replace("language_model.", "language_model.model.", 1)
        older[name] = tensor.contiguous()
    save_file(older, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    again = load_weights(tmp_path / "model", "float32")
    for (name, ours), theirs in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
