"""Quantized linear layers as shapes: what those of bitsandbytes hold and keep; it need not be installed."""

from __future__ import annotations

import re
from typing import Any, Literal

import torch
from torch import Tensor

from ftlib.models.loading import NEVER_QUANTIZED

_BLOCK, _NESTED_BLOCK = 64, 256
"""NF4: weights that share a scale of 8 bits, and scales that share one of 32 (Dettmers et al. 2023, section 3)."""


def stored_bytes(rows: int, columns: int, quantization: Literal["int8", "nf4"]) -> int:
    """Bytes of a quantized weight with its scales: NF4 .5 + 1/64 + 4/(64 · 256) a weight, int8 1, and 4 a row."""
    count = rows * columns
    if quantization == "int8":
        return count + 4 * rows
    blocks = -(-count // _BLOCK)
    return -(-count // 2) + blocks + 4 * -(-blocks // _NESTED_BLOCK)


def quantize_shapes(model: torch.nn.Module, quantization: Literal["int8", "nf4"]) -> None:
    """Replace the linear layers that loading would quantize, adapters' own left out, in place."""
    skipped = re.compile("|".join(rf"(.*\.)?{name}(\..*)?" for name in NEVER_QUANTIZED))
    for name, module in list(model.named_modules()):
        adapters = re.search(r"\.lora_", name)
        if type(module) is torch.nn.Linear and not adapters and not skipped.fullmatch(name):
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, _QuantizedLinear(module, quantization))


class _QuantizedLinear(torch.nn.Module):
    """Holds packed bytes; computes with a temporary copy of the weight in the type of its input."""

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
    """bitsandbytes keeps the packed weight for the backward pass, and for int8 the input as well."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, layer: _QuantizedLinear) -> Tensor:
        ctx.layer, ctx.shape = layer, inputs.shape
        ctx.save_for_backward(*([inputs] if layer.keeps_input else []))
        return inputs @ layer.weight.t()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] @ ctx.layer.weight, None
