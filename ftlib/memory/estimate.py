"""GPU memory of one optimizer step of a config, in bytes by part.

The model is built on the meta device (shapes without weights), adapted by the same code as for training, and one step
is run on it while its allocations are counted (`tracing.py`). So the parts do not come from a formula: they are the
allocations of the libraries' own code.

    weights      parameters and buffers of the base, in their types or quantized; of a sharded model this GPU's part,
                 and the blocks that are gathered at a time
    adapter      parameters that train in an adapter
    gradients    one for every trainable parameter, in its type
    optimizer    its state, from `state_bytes`
    logits       at the peak, with their gradients: those of a chunk of tokens, or where `linear_cross_entropy.LossHead`
                 does not apply micro-batch × (answer + 1) × vocabulary, in 16 and in 32 bits
    activations  all other tensors at the peak: those saved for the backward pass, and temporaries
    context      of CUDA itself
    buckets      with several GPUs: copies of gradients that are being reduced, of all of them without sharding
"""

from __future__ import annotations

import contextlib
import functools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ftlib.config.schema import Config, Lora
from ftlib.errors import UserError
from ftlib.hub.cache import require_model
from ftlib.hub.offline import offline
from ftlib.memory.tracing import AllocationTracker, GpuKernelEmulation, IntegerValues
from ftlib.models import sharding
from ftlib.models.adapters import prepare_for_training
from ftlib.models.attention import unchecked_implementation, use_full_attention
from ftlib.models.custom_code import load_error_message
from ftlib.models.dropout import add_dropout
from ftlib.models.loss import answer_loss
from ftlib.models.registry import family_of

CONTEXT_BYTES = 640 << 20
"""Assumed for every GPU: CUDA's context with torch's kernels (about 0.5 GiB) and cuBLAS' workspace."""


@dataclass(frozen=True)
class RowShape:
    """The longest rows of a dataset.

    Attributes:
        tokens: of a whole row, image tokens included.
        answer: of its labels, at the end of the row.
        batch: the longest row as `InputProcessor.collate` returns it, for families whose images have no fixed size
            (`ModelEntry.auto_processor`).
    """

    tokens: int
    answer: int
    batch: Mapping[str, Tensor] | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on the GPU at the peak of a step."""

    weights: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    context: int = CONTEXT_BYTES
    buckets: int = 0

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return sum(asdict(self).values())


@offline()
def build_meta_model(folder: Path, config: Config) -> torch.nn.Module:
    """A config's model on the meta device, adapted as for training.

    Raises:
        UserError: no model in the folder, or an adapter that does not fit it.
    """
    from transformers import AutoConfig
    from transformers.initialization import no_init_weights

    require_model(folder)
    family = family_of(config.model)
    kind = family.model_class
    build = getattr(kind, "_from_config", None) or functools.partial(kind.from_config, trust_remote_code=False)
    try:
        shapes = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        if not family.local_attention:
            use_full_attention(shapes)
        flex = config.model.attention == "flex"
        if flex:  # like SDPA it never materializes all scores, but SDPA does not support the soft cap
            shapes.get_text_config().attn_logit_softcapping = None
        asked = unchecked_implementation(shapes, "eager" if flex else config.model.attention)
        with torch.device("meta"), no_init_weights():
            model = build(shapes, dtype=getattr(torch, config.model.dtype), attn_implementation=asked)
            model.tie_weights()
        if flex:  # it does not run on the meta device
            model.config.get_text_config()._attn_implementation = "sdpa"
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        reason = load_error_message(error, folder)
        raise UserError(f"{folder}: no model can be built from its config.json: {reason}") from None
    if config.model.dropout:
        add_dropout(model, config.model.dropout)
    with torch.device("meta"):
        adapted = prepare_for_training(model, config.adapter, config.model.base, family)
    if config.model.quantization != "none":
        quantize_shapes(adapted, config.model.quantization, family.never_quantized)
    return adapted.train()


def estimate_step(
    model: torch.nn.Module, config: Config, rows: RowShape, micro_batch: int, checkpointing: bool
) -> MemoryEstimate:
    """Memory of a step of `micro_batch` rows that are all as long as the longest.

    With gradient accumulation the gradients of earlier micro-batches exist from the start.

    Args:
        model: from `build_meta_model`; it is not changed.
        checkpointing: gradient checkpointing (recompute a layer's activations instead of keeping them).
    """
    mixed = {"bf16": torch.bfloat16, "fp16": torch.float16, None: None}[config.autocast]
    kernels = GpuKernelEmulation(mixed)
    if checkpointing:
        recompute = {"use_reentrant": False, "context_fn": lambda: (contextlib.nullcontext(), kernels)}
        model.gradient_checkpointing_enable(recompute)  # type: ignore[operator]
    passes = 2 if config.rows_per_gpu > micro_batch else 1
    with AllocationTracker(model, model.config.get_text_config().vocab_size) as counted, _values(rows):  # type: ignore[union-attr, operator]
        for _ in range(passes):
            with torch.device("meta"), kernels:
                loss = _loss(model, config, rows, micro_batch, mixed is not None)
            loss.backward()
            del loss
    model.zero_grad(set_to_none=True)
    if checkpointing:
        model.gradient_checkpointing_disable()  # type: ignore[operator]
    return _estimate_of(counted, config, [parameter for parameter in model.parameters() if parameter.requires_grad])


def row_flops(model: torch.nn.Module, config: Config, rows: RowShape) -> int:
    """Floating-point operations of the forward and backward pass of one longest row: two for each multiplication and
    addition of matrix products, convolutions and attention; what the method does not train gets no gradients, and what
    no logit of the answer needs is not computed (`models/columns.py`).

    Causal attention counts in full. Nothing is recomputed (gradient checkpointing would add a forward pass).

    Args:
        model: from `build_meta_model`; it is not changed.
    """
    vocabulary = model.config.get_text_config().vocab_size  # type: ignore[union-attr, operator]
    with AllocationTracker(model, vocabulary), _values(rows), FlopCounterMode(display=False) as counted:
        with torch.device("meta"):
            loss = _loss(model, config, rows, 1, mixed=False)
        loss.backward()
    model.zero_grad(set_to_none=True)
    return int(counted.get_total_flops())


def _values(rows: RowShape) -> contextlib.AbstractContextManager[Any]:
    """What keeps the numbers of a real batch."""
    return contextlib.nullcontext() if rows.batch is None else IntegerValues()


def _loss(model: torch.nn.Module, config: Config, rows: RowShape, micro_batch: int, mixed: bool) -> Tensor:
    """The loss as the Trainer computes it: mixed precision makes float32 copies of all outputs."""
    call = _FloatOutputs(model) if mixed else model
    batch = empty_batch(model, rows, micro_batch)
    return answer_loss(call, batch, config.loss.average, items=1, smoothing=config.loss.label_smoothing)


class _FloatOutputs(torch.nn.Module):
    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **arguments: Any) -> Any:
        outputs = self.model(**arguments)
        outputs["logits"] = outputs["logits"].float()
        return outputs


def empty_batch(model: torch.nn.Module, rows: RowShape, micro_batch: int) -> dict[str, Tensor]:
    """A batch on the meta device as `InputProcessor.collate` returns it, with labels only for the answer.

    Integers of a real row (`RowShape.batch`) keep their values.
    """
    if rows.batch is not None:
        repeated = {name: _repeat(tensor, micro_batch) for name, tensor in rows.batch.items()}
        return {**repeated, "labels": repeated["labels"][:, -rows.answer :]}
    ids = torch.empty(micro_batch, rows.tokens, dtype=torch.int64, device="meta")
    labels = torch.empty(micro_batch, rows.answer, dtype=torch.int64, device="meta")
    batch = {"input_ids": ids, "attention_mask": torch.empty_like(ids), "labels": labels}
    batch["position_ids"] = torch.empty_like(ids)
    vision = getattr(model.config, "vision_config", None)
    if vision is None:
        return batch
    pixels = torch.empty(micro_batch, 3, vision.image_size, vision.image_size, device="meta")
    return {**batch, "token_type_ids": torch.empty_like(ids), "pixel_values": pixels}


def _repeat(tensor: Tensor, times: int) -> Tensor:
    """Along the first axis, which counts rows, images, tiles or patches."""
    if tensor.is_floating_point():
        return torch.empty(times * len(tensor), *tensor.shape[1:], dtype=tensor.dtype, device="meta")
    return torch.cat([tensor] * times)


def _estimate_of(counted: AllocationTracker, config: Config, trainable: list[torch.nn.Parameter]) -> MemoryEstimate:
    own = sum(parameter.numel() * parameter.element_size() for parameter in trainable)
    adapter = 0 if config.adapter.method in ("full", "attention") else own
    optimizer = str(config.training.get("optim", "adamw_torch_fused"))
    return MemoryEstimate(
        weights=counted.peak["weights"] - adapter,
        adapter=adapter,
        gradients=counted.peak["gradients"],
        optimizer=state_bytes(optimizer, str(config.training.get("optim_args", "")), trainable),
        activations=counted.peak["activations"],
        logits=counted.peak["logits"],
        buckets=own if config.job.world_size > 1 else 0,
    )


_GATHERED_BLOCKS = 3
"""Blocks whose weights are whole at a time: the one that computes, the next one, and the buffer that it is gathered in.
"""


def shard_estimate(whole: MemoryEstimate, model: torch.nn.Module, shards: int) -> MemoryEstimate:
    """Memory of a step on each GPU if the model is sharded, from the estimate without sharding; see `models/sharding`.

    Args:
        model: from `build_meta_model`.
        shards: the number of GPUs that share a model.
    """
    replicated = {id(parameter) for parameter in sharding.replicated_parameters(model)}
    sizes = {id(one): one.numel() * one.element_size() for one in model.parameters() if id(one) not in replicated}
    trained = {id(one) for one in model.parameters() if one.requires_grad} - replicated
    blocks = [
        {id(one) for module in group for one in module.parameters()} & set(sizes) for group in sharding.groups(model)
    ]
    root = set(sizes).difference(*blocks)

    def largest(counted: set[int]) -> int:
        return max(sum(sizes[one] for one in block & counted) for block in [*blocks, root])

    always = sum(sizes[one] for one in root)  # the root's weights stay gathered until the backward pass
    kept = sum(sizes.values())
    parts = {
        "weights": whole.weights - kept + -(-kept // shards) + always + _GATHERED_BLOCKS * largest(set(sizes)),
    }
    if trained:  # gradients of one block at a time are whole, and copied to be reduced
        parts |= {
            "gradients": -(-whole.gradients // shards) + largest(trained),
            "optimizer": -(-whole.optimizer // shards),
            "buckets": largest(trained),
        }
    return replace(whole, **parts)


WRITE_BYTES_PER_SECOND = 1 << 30
"""Assumed for writing a checkpoint, by one process to shared storage."""

_LOADING_THREADS = 4
"""Weights that transformers reads at a time."""


@dataclass(frozen=True)
class HostEstimate:
    """Bytes that a run on several GPUs needs beside their memory.

    Attributes:
        loading: of a node's memory while its tasks load the model.
        gathering: of the first node's memory while a checkpoint or the result is written: the largest weight; 0 unless
            trained weights are sharded.
        checkpoint: of storage, for one checkpoint.
    """

    loading: int
    gathering: int
    checkpoint: int

    @property
    def write_seconds(self) -> float:
        """Time to write a checkpoint at the assumed speed."""
        return self.checkpoint / WRITE_BYTES_PER_SECOND


def host_estimate(model: torch.nn.Module, config: Config, shards: int) -> HostEstimate:
    """Memory of the hosts and storage, beside torch's own (about 1 GiB a task) and that of data loading.

    The parts of a sharded model are placed on the GPUs as they are read: a few rows are in a node's memory at a time,
    and one whole weight for each task, for DoRA and when a checkpoint is read. What has to load the whole model does so
    one task after the other, but for PiSSA (`Config.whole_load_reason`).

    Args:
        model: from `build_meta_model`.
        shards: number of GPUs that share the model.
    """
    tensors = [*model.parameters(), *model.buffers()]
    sizes = [tensor.numel() * tensor.element_size() for tensor in tensors]
    whole, largest = sum(sizes), max(sizes)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    state = state_bytes(
        str(config.training.get("optim", "adamw_torch_fused")), str(config.training.get("optim_args", "")), trained
    )
    checkpoint = sum(parameter.numel() * parameter.element_size() for parameter in trained) + state
    tasks = max(1, config.job.gpus)
    if shards == 1:
        loading = tasks * whole
    elif config.whole_load_reason is None:
        loading = min(whole, tasks * (_LOADING_THREADS * -(-largest // shards) + largest))
    else:
        loading = tasks * whole if isinstance(config.adapter, Lora) and config.adapter.pissa else whole
    gathers = shards > 1 and len(sharding.replicated_parameters(model)) < len(trained)
    return HostEstimate(loading, largest if gathers else 0, checkpoint)


# Quantized linear layers on the meta device, with the memory of bitsandbytes' layers; it need not be installed.

_QUANTIZED_BLOCK, _NESTED_BLOCK = 64, 256
"""NF4: weights that share a scale of 8 bits, and scales that share one of 32 (Dettmers et al. 2023, section 3)."""


def stored_bytes(rows: int, columns: int, quantization: Literal["int8", "nf4"]) -> int:
    """Bytes of a quantized weight with its scales: NF4 .5 + 1/64 + 4/(64 · 256) a weight, int8 1, and 4 a row."""
    count = rows * columns
    if quantization == "int8":
        return count + 4 * rows
    blocks = -(-count // _QUANTIZED_BLOCK)
    return -(-count // 2) + blocks + 4 * -(-blocks // _NESTED_BLOCK)


def quantize_shapes(
    model: torch.nn.Module, quantization: Literal["int8", "nf4"], never_quantized: Sequence[str]
) -> None:
    """Replace the linear layers that loading would quantize, except those of adapters, in place.

    Args:
        never_quantized: see `ModelFamily`.
    """
    skipped = re.compile("|".join(rf"(.*\.)?{name}(\..*)?" for name in never_quantized))
    for name, module in list(model.named_modules()):
        adapters = re.search(r"\.lora_", name)
        if type(module) is torch.nn.Linear and not adapters and not skipped.fullmatch(name):
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, _QuantizedLinear(module, quantization))


class _QuantizedLinear(torch.nn.Module):
    """A layer with packed weights; it computes with a temporary copy in the type of its input."""

    def __init__(self, layer: torch.nn.Linear, quantization: Literal["int8", "nf4"]) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.keeps_input = quantization == "int8"
        self.dtype = layer.weight.dtype
        self.bias = layer.bias
        size = stored_bytes(self.out_features, self.in_features, quantization)
        self.register_buffer("packed", torch.empty(size, dtype=torch.uint8, device="meta"))

    @property
    def weight(self) -> Tensor:
        """Dequantized."""
        return torch.empty(self.out_features, self.in_features, dtype=self.dtype, device="meta")

    def forward(self, inputs: Tensor) -> Tensor:
        output: Tensor = _Multiply.apply(inputs.to(self.dtype), self)
        return output if self.bias is None else output + self.bias


class _Multiply(torch.autograd.Function):
    """bitsandbytes saves the packed weight for the backward pass, and for int8 also the input."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, layer: _QuantizedLinear) -> Tensor:
        ctx.layer, ctx.shape = layer, inputs.shape
        ctx.save_for_backward(*([inputs] if layer.keeps_input else []))
        return inputs @ layer.weight.t()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] @ ctx.layer.weight, None


# Optimizer states of the trainable parameters in bytes, by TrainingArguments' names.

_OPTIMIZERS_BLOCK = 256
"""Elements that share a float32 scale in bitsandbytes' 8-bit states (Dettmers et al. 2021, arXiv:2110.02861)."""

_SMALLEST_8BIT = 4096
"""Smaller tensors have 32-bit states there."""

MOMENTS = {
    "adamw_torch": 2,
    "adamw_torch_fused": 2,
    "adamax": 2,
    "radam": 2,
    "nadam": 2,
    "rmsprop": 1,
    "adagrad": 1,
    "sgd": 0,
}
"""torch's optimizers: tensors of the parameter's own shape and type."""

MOMENTS_32BIT = {
    "paged_adamw": 2,
    "paged_adamw_32bit": 2,
    "lion": 1,
    "lion_32bit": 1,
    "paged_lion": 1,
    "paged_lion_32bit": 1,
}
MOMENTS_8BIT = {"adamw_8bit": 2, "adamw_bnb_8bit": 2, "paged_adamw_8bit": 2, "lion_8bit": 1, "paged_lion_8bit": 1}
"""bitsandbytes' optimizers. Paged states can move to the host's memory; here they count in full."""


def is_known_optimizer(name: str) -> bool:
    """Whether `state_bytes` knows this optimizer; others are treated like Adam."""
    return name == "adafactor" or name in MOMENTS | MOMENTS_32BIT | MOMENTS_8BIT


def state_bytes(name: str, arguments: str, parameters: Iterable[Tensor]) -> int:
    """Bytes of the states of all parameters.

    Args:
        name: TrainingArguments' `optim`.
        arguments: its `optim_args`, such as "momentum=0.9".
    """
    momentum = 1 if name == "sgd" and "momentum" in arguments else 0
    return sum(_parameter_state_bytes(name, momentum, parameter) for parameter in parameters)


def _parameter_state_bytes(name: str, momentum: int, parameter: Tensor) -> int:
    count = parameter.numel()
    if name in MOMENTS_8BIT:
        if count < _SMALLEST_8BIT:
            return MOMENTS_8BIT[name] * 4 * count
        return MOMENTS_8BIT[name] * (count + 4 * math.ceil(count / _OPTIMIZERS_BLOCK))
    if name in MOMENTS_32BIT:
        return MOMENTS_32BIT[name] * 4 * count
    if name == "adafactor":  # sums over rows and over columns (Shazeer & Stern 2018, arXiv:1804.04235)
        rows = parameter.shape[-1] if parameter.dim() > 1 else 0
        return 4 * (count // rows + count // parameter.shape[-2]) if rows else 4 * count
    return (MOMENTS.get(name, 2) + momentum) * count * parameter.element_size()
