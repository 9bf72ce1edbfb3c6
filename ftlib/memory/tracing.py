"""Count the allocations of torch code on the meta device (tensors with shapes but without data).

`AllocationTracker` counts every tensor from its creation to its deletion, as the GPU's allocator would see it: saved
activations, temporaries, gradients. `GpuKernelEmulation` makes code on the meta device allocate what the same code
allocates on a GPU: attention in one kernel without materialized scores, and mixed precision with the casts of
torch.autocast on CUDA.
"""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map, tree_map_
from transformers import masking_utils

_AUTOCAST_LOWER = {
    functional.linear,
    torch.matmul,
    Tensor.matmul,
    Tensor.__matmul__,
    torch.bmm,
    Tensor.bmm,
    torch.baddbmm,
    torch.addmm,
    torch.conv2d,
    functional.conv2d,
}
"""Functions that torch.autocast computes in 16 bits on CUDA."""

_AUTOCAST_FLOAT32 = {functional.layer_norm, functional.softmax, torch.softmax, Tensor.softmax, torch.sum, Tensor.sum}
"""Functions that it computes in float32."""

_BIAS_ALIGNMENT = 16
"""The memory-efficient kernel pads rows of an attention mask to a multiple of this many elements."""


class AllocationTracker(TorchDispatchMode):
    """Allocated bytes, now and at the peak, by kind: weights, gradients, logits, activations.

    A storage counts once, however many tensors view it. Memory of the interpreter, of kernels and of the allocator's
    rounding is not counted.

    Args:
        model: its parameters and buffers count as weights.
        vocabulary: size of the vocabulary; a tensor counts as logits if its last dimension, or with three dimensions
            any, has this size.
    """

    def __init__(self, model: torch.nn.Module, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.now: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self._alive: dict[int, tuple[weakref.ref[Any], str, int]] = {}
        for tensor in (*model.parameters(), *model.buffers()):
            self._see(tensor, "weights")
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._hooks = [one.register_post_accumulate_grad_hook(self._relabel_gradient) for one in trainable]

    def __exit__(self, *error: Any) -> None:
        for hook in self._hooks:
            hook.remove()
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return True  # the library checks whether its inputs match; without data they do
        result = func(*args, **(kwargs or {}))
        tree_map_(self._see_any, result)
        return result

    def _see_any(self, value: Any) -> None:
        if isinstance(value, Tensor):
            logits = self.vocabulary in value.shape[-1 if value.dim() < 3 else 0 :]
            self._see(value, "logits" if logits else "activations")

    def _see(self, tensor: Tensor, kind: str) -> None:
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()
        if key in self._alive:
            return
        self._alive[key] = (weakref.ref(storage, partial(self._forget, key)), kind, size)
        self.now[kind] += size
        if self.now.total() > self.peak.total():
            self.peak = self.now.copy()

    def _forget(self, key: int, reference: weakref.ref[Any]) -> None:
        _, kind, size = self._alive.pop(key)
        self.now[kind] -= size

    def _relabel_gradient(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        key = id(parameter.grad.untyped_storage())
        reference, kind, size = self._alive[key]
        self._alive[key] = (reference, "gradients", size)
        self.now[kind] -= size
        self.now["gradients"] += size


class IntegerValues(TorchDispatchMode):
    """Keep the values of integers and booleans, on the CPU, while all other tensors are shapes on the meta device.

    Vision-language models compute shapes from them: the grid of every image's patches, positions, where a row's images
    are. What is computed from shapes and integers together is a shape. Inside of an `AllocationTracker` the integers
    count as well.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        valued = [one for one in given if not one.is_meta]
        if func in _COMPARED and not valued:
            return torch.full(args[0].shape, _COMPARED[func], device="cpu")
        if len(valued) == len(given):
            return self._with_values(func, args, kwargs, given)
        if valued and func._schema.is_mutable and not args[0].is_meta:
            return args[0]
        if func is _ATEN.masked_select.default and not args[1].is_meta:
            return args[0].new_empty(int(args[1].expand_as(args[0]).sum()))
        args = tuple(_indices(one) if isinstance(one, list) else one for one in args)
        kwargs = {name: value for name, value in kwargs.items() if name != "device"}  # that of the integers
        return func(*tree_map(_to_shape, args), **tree_map(_to_shape, kwargs))

    def _with_values(self, func: Any, args: Any, kwargs: Any, given: list[Tensor]) -> Any:
        """A function of nothing but values, or of nothing at all."""
        if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "meta":
            made = func(*args, **kwargs)
            small = isinstance(made, Tensor) and made.untyped_storage().nbytes() <= _MOST_VALUES
            kept = small and not (made.is_floating_point() or made.is_complex())
            return func(*args, **{**kwargs, "device": "cpu"}) if kept else made
        if len(given) > 1 and math.prod(map(max, zip(*(_sizes(one) for one in given), strict=True))) > _MOST_VALUES:
            return func(*tree_map(_to_shape, args), **tree_map(_to_shape, kwargs))
        return func(*args, **kwargs)


_ATEN = torch.ops.aten
_COMPARED = {_ATEN.eq.Scalar: False, _ATEN.ne.Scalar: True}
"""A tensor without values equals no number: so padded images, all of whose pixels are 0, are told from real ones."""
_MOST_VALUES = 1 << 24
"""Elements of a tensor that is computed; larger ones (attention masks of long rows) become shapes."""
_MOST_DIMENSIONS = 8


def _sizes(tensor: Tensor) -> list[int]:
    return [1] * (_MOST_DIMENSIONS - tensor.dim()) + list(tensor.shape)


def _to_shape(value: Any) -> Any:
    if not isinstance(value, Tensor) or value.is_meta:
        return value
    with _disable_current_modes():  # the same integers are not counted twice
        return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device="meta")


def _indices(values: list[Any]) -> list[Any]:
    """Booleans that select become the numbers of what they select."""
    found: list[Any] = []
    for one in values:
        chosen = isinstance(one, Tensor) and one.dtype == torch.bool and not one.is_meta
        found += one.nonzero().unbind(1) if chosen else [one]
    return found


class GpuKernelEmulation(TorchFunctionMode):
    """Make functions on the meta device allocate memory as on a GPU.

    Args:
        autocast: the 16-bit type of mixed precision; None: every function computes in its inputs' type.
    """

    def __init__(self, autocast: torch.dtype | None) -> None:
        super().__init__()
        self.autocast = autocast
        self._cached: dict[int, Tensor] = {}

    def __enter__(self) -> GpuKernelEmulation:
        self._fast_all = masking_utils.fast_all
        masking_utils.fast_all = lambda mask: False  # there is padding, as below
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        masking_utils.fast_all = self._fast_all
        self._cached.clear()
        super().__exit__(*error)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.all and len(args) == 1 and args[0].dim() == 2:
            return False  # the library checks whether there is no padding; there is
        if self.autocast and (func in _AUTOCAST_LOWER or func is functional.scaled_dot_product_attention):
            args, kwargs = self._all(args, kwargs, self._to_autocast_dtype)
        elif self.autocast and func in _AUTOCAST_FLOAT32:
            args, kwargs = self._all(args, kwargs, _to_float32)
        if func is functional.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        return func(*args, **kwargs)

    def _all(self, args: Any, kwargs: Any, cast: Callable[[Any], Any]) -> tuple[Any, Any]:
        return tuple(map(cast, args)), {name: cast(value) for name, value in kwargs.items()}

    def _to_autocast_dtype(self, value: Any) -> Any:
        """A 16-bit copy; that of a trainable float32 weight is cached until autocast ends, as in torch."""
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dtype == self.autocast:
            return value
        if not (value.is_leaf and value.requires_grad):
            return value.to(self.autocast)
        if id(value) not in self._cached:
            self._cached[id(value)] = value.to(self.autocast)
        return self._cached[id(value)]


def _to_float32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *_: Any, **__: Any
) -> Tensor:
    """Attention in one kernel; a boolean mask is first converted to numbers, with padded rows."""
    bias = None
    if attn_mask is not None:
        *outer, rows, columns = attn_mask.shape
        padded = -(-columns // _BIAS_ALIGNMENT) * _BIAS_ALIGNMENT
        bias = query.new_empty(*outer, rows, padded)
    output: Tensor = _FusedAttention.apply(query, key, value, bias)
    return output


class _FusedAttention(torch.autograd.Function):
    """Saves query, key, value, output and a float32 number per row and head (Dao et al. 2022, arXiv:2205.14135)."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        rows, heads, places, _ = query.shape
        output = query.new_empty(rows, places, heads, value.shape[-1]).transpose(1, 2)  # as the kernels lay it
        ctx.save_for_backward(query, key, value, bias, output, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None
