"""What one optimizer step of a config needs on a GPU, in bytes by part.

The model is built on the meta device (shapes, no weights), adapted by the same code as for training, and one step is
run on it while its allocations are counted (`counting.py`). So the parts are not estimates of a formula but what the
libraries' own code would allocate:

    weights      parameters and buffers of the base, in their types or quantized
    adapter      parameters that train in an adapter
    gradients    one for every trainable parameter, in its type
    optimizer    its state, by `optimizers.py`
    logits       micro-batch × (answer + 1) × vocabulary, in 16 and in 32 bits, and their gradients, at the peak
    activations  everything else that is alive at the peak: kept for the backward pass, and temporaries
    context      what CUDA itself takes
    buckets      with several GPUs: a second copy of all gradients, in which DistributedDataParallel sums them up
"""

from __future__ import annotations

import contextlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ftlib.config import Config
from ftlib.errors import UserError
from ftlib.hub import require_model
from ftlib.memory.counting import Allocations, GpuKernels
from ftlib.memory.optimizers import state_bytes
from ftlib.memory.quantized import quantize_shapes
from ftlib.models.adapters import prepare_for_training
from ftlib.models.attention import attend_everywhere, implementation_of
from ftlib.models.families import FAMILIES
from ftlib.training.loss import answer_loss

CONTEXT_BYTES = 640 << 20
"""Assumed of every GPU: CUDA's context with torch's kernels (some 0.5 GiB) and cuBLAS' workspace."""


@dataclass(frozen=True)
class Rows:
    """The longest rows of a dataset.

    Attributes:
        tokens: of a whole row, image tokens included.
        answer: of its last tokens, those that carry labels.
    """

    tokens: int
    answer: int


@dataclass(frozen=True)
class Need:
    """Bytes on the GPU at the worst moment of a step."""

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
        """All parts together."""
        return sum(asdict(self).values())


def build_shapes(folder: Path, config: Config) -> torch.nn.Module:
    """A config's model as training makes it, on the meta device.

    Raises:
        UserError: no model in the folder, or an adapter that does not fit it.
    """
    from transformers import AutoConfig
    from transformers.initialization import no_init_weights

    require_model(folder)
    kind = FAMILIES[config.model.family].model_class
    build = getattr(kind, "_from_config", None) or kind.from_config
    try:
        shapes = AutoConfig.from_pretrained(folder, local_files_only=True)
        if not FAMILIES[config.model.family].local_attention:
            attend_everywhere(shapes)
        flex = config.model.attention == "flex"
        if flex:  # it never has all scores in memory, like SDPA, which lacks the cap
            shapes.get_text_config().attn_logit_softcapping = None
        asked = implementation_of(shapes, "eager" if flex else config.model.attention)
        with torch.device("meta"), no_init_weights():
            model = build(shapes, dtype=getattr(torch, config.model.dtype), attn_implementation=asked)
            model.tie_weights()
        if flex:  # it does not run on the meta device
            model.config.get_text_config()._attn_implementation = "sdpa"
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{folder}: no model can be built from its config.json: {str(error).splitlines()[0]}") from None
    with torch.device("meta"):
        adapted = prepare_for_training(model, config.adapter, config.model.base, config.model.family)
    if config.model.quantization != "none":
        quantize_shapes(adapted, config.model.quantization)
    return adapted.train()


def need(model: torch.nn.Module, config: Config, rows: Rows, micro_batch: int, checkpointing: bool) -> Need:
    """Count one step of `micro_batch` rows, all as long as the longest.

    With gradient accumulation the gradients of earlier micro-batches are there from the beginning.

    Args:
        model: from `build_shapes`; left as it was.
        checkpointing: gradient checkpointing (recompute a layer's activations instead of keeping them).
    """
    mixed = {"bf16": torch.bfloat16, "fp16": torch.float16, None: None}[config.autocast]
    kernels = GpuKernels(mixed)
    if checkpointing:
        recompute = {"use_reentrant": False, "context_fn": lambda: (contextlib.nullcontext(), kernels)}
        model.gradient_checkpointing_enable(recompute)  # type: ignore[operator]
    passes = 2 if config.rows_per_gpu > micro_batch else 1
    with Allocations(model, model.config.get_text_config().vocab_size) as counted:  # type: ignore[union-attr, operator]
        for _ in range(passes):
            with torch.device("meta"), kernels:
                loss = _loss(model, config, rows, micro_batch, mixed is not None)
            loss.backward()
            del loss
    model.zero_grad(set_to_none=True)
    if checkpointing:
        model.gradient_checkpointing_disable()  # type: ignore[operator]
    return _parts(counted, config, [parameter for parameter in model.parameters() if parameter.requires_grad])


def _loss(model: torch.nn.Module, config: Config, rows: Rows, micro_batch: int, mixed: bool) -> Tensor:
    """As the Trainer computes it: with mixed precision it takes float32 copies of all outputs."""
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


def empty_batch(model: torch.nn.Module, rows: Rows, micro_batch: int) -> dict[str, Tensor]:
    """A training batch as shapes: what `Inputs.batch` makes, with labels only where the answer is."""
    ids = torch.empty(micro_batch, rows.tokens, dtype=torch.int64, device="meta")
    labels = torch.empty(micro_batch, rows.answer, dtype=torch.int64, device="meta")
    batch = {"input_ids": ids, "attention_mask": torch.empty_like(ids), "labels": labels}
    vision = getattr(model.config, "vision_config", None)
    if vision is None:
        return {**batch, "position_ids": torch.empty_like(ids)}
    pixels = torch.empty(micro_batch, 3, vision.image_size, vision.image_size, device="meta")
    return {**batch, "token_type_ids": torch.empty_like(ids), "pixel_values": pixels}


def _parts(counted: Allocations, config: Config, trainable: list[torch.nn.Parameter]) -> Need:
    own = sum(parameter.numel() * parameter.element_size() for parameter in trainable)
    adapter = 0 if config.adapter.method in ("full", "attention") else own
    optimizer = str(config.training.get("optim", "adamw_torch_fused"))
    return Need(
        weights=counted.peak["weights"] - adapter,
        adapter=adapter,
        gradients=counted.peak["gradients"],
        optimizer=state_bytes(optimizer, str(config.training.get("optim_args", "")), trainable),
        activations=counted.peak["activations"],
        logits=counted.peak["logits"],
        buckets=own if config.job.tasks > 1 else 0,
    )
