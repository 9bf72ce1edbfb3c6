"""What a config needs: parameters by hand, and activations against what the CPU's allocator really gave."""

from __future__ import annotations

import itertools
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, GPTNeoXConfig, PaliGemmaConfig

from ftlib.config.schema import Config, Job
from ftlib.core.paths import Site
from ftlib.memory.estimate import (
    MemoryEstimate,
    RowShape,
    build_meta_model,
    empty_batch,
    estimate_step,
    row_flops,
)
from ftlib.memory.search import ASSUMED_IMAGE, longest_row
from ftlib.memory.tracing import AllocationTracker, GpuKernelEmulation
from ftlib.models.adapters import prepare_for_training
from ftlib.models.attention import choose_implementation, use_full_attention
from ftlib.models.loading import load_weights
from ftlib.models.loss import answer_loss
from ftlib.models.registry import model_family
from tests.gpu.flops import paligemma_flops
from tests.models import tiny_vlm
from tests.models.test_vlm import ARCHITECTURES, require_packages

pytestmark = pytest.mark.gates
LORA = {"method": "lora", "r": 8}
FULL = {"method": "full"}


def config(family: str, adapter: dict[str, Any] = LORA, dtype: str = "bfloat16", **settings: Any) -> Config:
    training = {"per_device_train_batch_size": 4, **settings.pop("training", {})}
    model = {"family": family, "base": "base", "dtype": dtype, **settings}
    fields = {"name": "x", "task": "instruct" if family == "causal" else "vqa", "model": model, "adapter": adapter}
    return Config.model_validate({**fields, "data": {"source": "jsonl", "root": "x"}, "training": training})


def paligemma(size: int, **text: Any) -> PaliGemmaConfig:
    """PaliGemma-3B's shapes."""
    vision = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
    language = {"hidden_size": 2048, "intermediate_size": 16384, "num_hidden_layers": 18, "num_attention_heads": 8}
    return PaliGemmaConfig(
        vision_config={"model_type": "siglip_vision_model", "image_size": size, "patch_size": 14,
                       "vision_use_head": False, "projection_dim": 2048, **vision},
        text_config={"model_type": "gemma", **language, "num_key_value_heads": 1, "head_dim": 256,
                     "vocab_size": 257216, **text},
        projection_dim=2048,
        image_token_index=257152,
    )  # fmt: skip


def small_paligemma(size: int, text: str = "gemma") -> PaliGemmaConfig:
    widths = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 3, "head_dim": 32, "vocab_size": 2048}
    shapes = paligemma(size, model_type=text, **widths)
    for name, value in {
        "hidden_size": 96,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "projection_dim": 128,
    }.items():
        setattr(shapes.vision_config, name, value)
    shapes.projection_dim, shapes.image_token_index = 128, 2000
    return shapes


def neox(**settings: Any) -> GPTNeoXConfig:
    return GPTNeoXConfig(**settings, use_cache=False, tie_word_embeddings=False)


def test_bytes_of_paligemma_3b(tmp_path: Path) -> None:
    """2,923,466,480 parameters in 16 bits (and a few buffers); LoRA on seven projections of 18 layers in 32 bits."""
    paligemma(224).save_pretrained(tmp_path)
    chosen = config("paligemma")
    found = estimate_step(build_meta_model(tmp_path, chosen), chosen, RowShape(304, 17), 1, checkpointing=False)
    projections = (2048 + 2048) + (2048 + 256) + (2048 + 256) + (2048 + 2048) + 3 * (2048 + 16384)
    adapter = 18 * 8 * projections
    assert adapter == 9_805_824
    assert 0 <= found.weights - 2 * 2_923_466_480 < 1 << 20
    assert found.adapter == 4 * adapter and found.optimizer == 8 * adapter
    assert found.gradients <= 4 * adapter


def test_bytes_of_master_weights(tmp_path: Path) -> None:
    """Of all but the vision tower: 4 bytes a weight, 4 a gradient, 8 of Adam; half of that without them."""
    small_paligemma(56).save_pretrained(tmp_path)
    needs = {}
    for exact in (True, False):
        chosen = config("paligemma", {**FULL, "freeze": ["vision"], "master_weights": exact})
        model = build_meta_model(tmp_path, chosen)
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        frozen = sum(parameter.numel() for parameter in model.parameters() if not parameter.requires_grad)
        needs[exact] = found = estimate_step(model, chosen, RowShape(64, 17), 1, checkpointing=False)
        each = 4 if exact else 2
        assert found.optimizer == 2 * each * trained and found.adapter == 0
        assert 0 <= found.weights - (each * trained + 2 * frozen) < 1 << 16, "and buffers"
        assert 0.9 < found.gradients / (each * trained) <= 1
    assert needs[True].activations > needs[False].activations, "autocast keeps a 16-bit copy of every weight"


@pytest.mark.parametrize(("adapter", "dtype"), [(LORA, "bfloat16"), (FULL, "float32")])
def test_buckets_are_those_that_several_gpus_sum_gradients_in(
    tmp_path: Path, adapter: dict[str, Any], dtype: str
) -> None:
    small_paligemma(56).save_pretrained(tmp_path)
    found = {}
    for gpus in (1, 2):
        chosen = config("paligemma", adapter, dtype).model_copy(update={"job": Job(gpus=gpus)})
        found[gpus] = estimate_step(
            build_meta_model(tmp_path, chosen), chosen, RowShape(64, 17), 2, checkpointing=False
        )
    model = real_model(tmp_path, chosen)
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        facts = torch.nn.parallel.DistributedDataParallel(model)._get_ddp_logging_data()
    finally:
        distributed.destroy_process_group()
    assert found[2].buckets == sum(map(int, str(facts["bucket_sizes"]).split(", "))) > 0
    assert found[1].buckets == 0 and found[2].total - found[1].total >= found[2].buckets


def test_flex_attention_is_counted_as_one_kernel(tmp_path: Path) -> None:
    """Scores that are capped, too, are never all in memory."""
    for text, others in {"gemma": ("sdpa", "eager"), "gemma2": ("eager",)}.items():
        small_paligemma(56, text).save_pretrained(tmp_path)
        needs = {}
        for attention in ("flex", *others):
            chosen = config("paligemma", attention=attention)
            needs[attention] = estimate_step(
                build_meta_model(tmp_path, chosen), chosen, RowShape(256, 17), 4, checkpointing=False
            )
        assert needs["flex"] == needs.get("sdpa", needs["flex"])
        assert needs["flex"].activations < needs["eager"].activations


def test_bytes_of_a_quantized_7b(tmp_path: Path) -> None:
    """OpenCALM-7B's shapes: 32 layers of 12 × 4,096² weights in NF4, two tables of 52,224 × 4,096 in 16 bits."""
    neox(vocab_size=52224, hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, intermediate_size=16384,
         max_position_embeddings=2048).save_pretrained(tmp_path)  # fmt: skip
    chosen = config("causal", {**LORA, "targets": ["query_key_value"]}, quantization="nf4")
    found = estimate_step(build_meta_model(tmp_path, chosen), chosen, RowShape(64, 32), 1, checkpointing=False)
    linear = 32 * 12 * 4096**2
    tables = 2 * 52224 * 4096
    quantized = linear // 2 + linear // 64 + 4 * linear // (64 * 256)
    assert 0 <= found.weights - (quantized + 2 * tables) < 8 << 20  # norms, biases, position tables
    assert found.adapter == 4 * 32 * 8 * (4096 + 3 * 4096)


CASES = [
    ("paligemma-224", LORA, False),
    ("paligemma-224", FULL, True),
    ("paligemma-448", LORA, False),
    ("paligemma2-224", LORA, False),
    ("paligemma2-224", LORA, True),
    ("causal", LORA, True),
    ("causal", FULL, False),
]


@pytest.mark.parametrize(("shapes", "adapter", "checkpointing"), CASES)
def test_a_step_needs_what_the_cpu_really_allocates(
    tmp_path: Path, shapes: str, adapter: dict[str, Any], checkpointing: bool
) -> None:
    """What is kept for the backward pass is the same but for what the CPU's attention kernel keeps besides (4 % of the
    causal case); at the peak it takes other temporaries.
    """
    causal = shapes == "causal"
    if causal:
        neox(vocab_size=2048, hidden_size=128, num_hidden_layers=3, num_attention_heads=4, intermediate_size=512,
             max_position_embeddings=512).save_pretrained(tmp_path)  # fmt: skip
        rows = RowShape(300, 200)
    else:
        family, pixels = shapes.split("-")
        size = int(pixels)
        small_paligemma(size, "gemma2" if family == "paligemma2" else "gemma").save_pretrained(tmp_path)
        rows = RowShape((size // 14) ** 2 + 36, 17)
    chosen = config("causal" if causal else "paligemma", adapter, dtype="float32")
    empty, model = build_meta_model(tmp_path, chosen), real_model(tmp_path, chosen)
    batch = {name: real(name, tensor, model.config) for name, tensor in empty_batch(model, rows, 2).items()}
    if not checkpointing:
        assert kept_on_shapes(empty, rows) == pytest.approx(
            kept_for_backward(model, batch), rel=0.05 if causal else 0.01
        )
    counted = estimate_step(empty, chosen, rows, 2, checkpointing)
    peak = peak_of_the_allocator(model, batch, checkpointing)
    assert counted.activations + counted.logits + counted.gradients == pytest.approx(peak, rel=0.1)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_step_of_a_vision_language_model(tmp_path: Path, architecture: str) -> None:
    """Without prepared data the image is 640 × 480; what is counted is what the CPU allocates, also with an image's
    tokens, patches and positions computed from its size.
    """
    require_packages(architecture)
    tiny_vlm.save(architecture, tmp_path)
    chosen = config("vlm", FULL, dtype="float32")
    empty = build_meta_model(tmp_path, chosen)
    rows, found = longest_row(chosen, Site(tmp_path, tmp_path), tmp_path, empty)
    assert not found and rows.batch is not None and ASSUMED_IMAGE == (640, 480)
    counted = estimate_step(empty, chosen, rows, 2, checkpointing=True)
    row = {**rows.batch, "labels": rows.batch["labels"][:, -rows.answer :]}  # as training cuts them
    batch = {name: torch.cat([tensor] * 2) for name, tensor in row.items()}
    batch["attention_mask"][0, :2] = 0
    model = prepare_for_training(load_weights(tmp_path, "float32", "vlm"), chosen.adapter, "base", "vlm").train()
    with FlopCounterMode(display=False) as real_flops, sdpa_kernel(SDPBackend.MATH):
        answer_loss(model, row, "token").backward()
    assert row_flops(empty, chosen, rows) == pytest.approx(real_flops.get_total_flops(), rel=0.15)
    peak = peak_of_the_allocator(model, batch, checkpointing=True)
    assert counted.activations + counted.logits + counted.gradients == pytest.approx(peak, rel=0.1)
    half = estimate_step(empty, chosen, rows, 1, checkpointing=True)
    assert 1.7 * half.activations < counted.activations < 2.1 * half.activations


@pytest.mark.parametrize("method", ["lora", "full"])
def test_flops_of_paligemma(tmp_path: Path, method: str) -> None:
    """As counted by hand, but for adapters, projector and patch embedding, which that leaves out, and the last MLP."""
    shapes = paligemma(224)
    shapes.save_pretrained(tmp_path)
    chosen = config("paligemma", {"method": method, **({"r": 8} if method == "lora" else {})})
    found = row_flops(build_meta_model(tmp_path, chosen), chosen, RowShape(304, 17))
    mlp = 3 * shapes.text_config.hidden_size * shapes.text_config.intermediate_size
    unread = (304 - 18) * mlp * (6 if method == "full" else 4)  # of the last layer, see models/columns.py
    assert found == pytest.approx(paligemma_flops(shapes, (304, 18), method) - unread, rel=0.03)


def kept_on_shapes(model: torch.nn.Module, rows: RowShape) -> int:
    with torch.device("meta"):
        batch = empty_batch(model, rows, 2)
    with AllocationTracker(model, 2048) as counted, torch.device("meta"), GpuKernelEmulation(None):
        loss = answer_loss(model, batch, "token", items=1)
        assert loss.shape == ()
        return counted.now["activations"] + counted.now["logits"]


def real_model(folder: Path, chosen: Config) -> torch.nn.Module:
    kind = model_family(chosen.model.family).model_class
    build = getattr(kind, "_from_config", None) or kind.from_config
    shapes = AutoConfig.from_pretrained(folder)
    use_full_attention(shapes)
    plain = build(shapes, attn_implementation=choose_implementation(shapes, "auto"))
    return prepare_for_training(plain, chosen.adapter, "base", chosen.model.family).train()


def kept_for_backward(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> int:
    """Bytes of all storages that autograd itself says it keeps, without the weights."""
    kept: weakref.WeakSet[Kept] = weakref.WeakSet()
    weights = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}

    def keep(tensor: torch.Tensor) -> Kept:
        kept.add(one := Kept(tensor))
        return one

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda one: one.tensor):
        loss = answer_loss(model, batch, "token")
    assert loss.shape == ()
    storages = {one.tensor.untyped_storage().data_ptr(): one.tensor.untyped_storage() for one in kept}
    return sum(storage.nbytes() for place, storage in storages.items() if place not in weights)


class Kept:
    """Lives as long as the node of the graph that keeps the tensor."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def peak_of_the_allocator(model: torch.nn.Module, batch: dict[str, torch.Tensor], checkpointing: bool) -> int:
    """By the allocator's own record, in the second of two micro-batches: with its inputs and all gradients."""
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    answer_loss(model, batch, "token").backward()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        answer_loss(model, batch, "token").backward()
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    in_order = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    inputs = sum(tensor.numel() * tensor.element_size() for tensor in batch.values())
    gradients = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    return max(itertools.accumulate(in_order)) + inputs + gradients


def real(name: str, empty: torch.Tensor, shapes: Any) -> torch.Tensor:
    """A batch's tensor with content that the model accepts: some padding, the image's tokens, a causal answer."""
    if name == "pixel_values":
        return torch.randn(empty.shape)
    values = torch.ones(empty.shape, dtype=torch.int64)
    if name == "input_ids" and hasattr(shapes, "vision_config"):
        values[:, 2 : 2 + (shapes.vision_config.image_size // 14) ** 2] = shapes.image_token_id
    if name == "attention_mask":
        values[0, :2] = 0
    if name == "token_type_ids":
        values[:, :-17] = 0
    if name == "position_ids":
        values = torch.arange(empty.shape[1]).expand(empty.shape)
    return values


def test_variants_of_lora_and_dropout(tmp_path: Path) -> None:
    """PiSSA and LoRA+ need what LoRA needs; a trained projector adds a float32 copy; dropout keeps masks."""
    small_paligemma(56).save_pretrained(tmp_path)

    def found(adapter: dict[str, Any] = LORA, **model: Any) -> MemoryEstimate:
        chosen = config("paligemma", {**LORA, **adapter}, training={"bf16": True}, **model)
        return estimate_step(build_meta_model(tmp_path, chosen), chosen, RowShape(40, 8), 4, checkpointing=False)

    plain = found()
    assert found({"init_lora_weights": "pissa", "loraplus_lr_ratio": 16.0}) == plain
    projector = 96 * 128 + 128
    full = found({"modules_to_save": ["projector"]})
    assert (full.adapter - plain.adapter, full.optimizer - plain.optimizer) == (4 * projector, 8 * projector)
    assert full.weights == plain.weights
    masks = 3 * 2 * 4 * 40 * 128  # a byte for each number: layers, blocks, rows, tokens, width
    assert found(dropout=0.1).total - plain.total >= masks
