"""Cross entropy of a linear head in chunks of tokens: logits of all tokens are never in memory at once.

The plain way holds tokens × vocabulary three times in float32: logits, their log-softmax, and its gradient (and twice
more in 16 bits). Here it is a chunk of them. Each chunk's numbers come from the same torch functions as in the plain
way: losses are the same, gradients up to rounding.

In training `LossHead` makes the head of a model return losses instead of logits, inside the model's own forward pass,
where DDP, FSDP and autocast expect the head's weights to be used.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from ftlib.models.encoding import IGNORE_INDEX

CHUNK = 256
"""Tokens of a chunk: enough for the head's product to be as fast as for all of them."""


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, smoothing: float = 0.0
) -> Tensor:
    """Return the cross entropy of each token, in float32: shape (tokens,), 0 where there is no target.

    The gradient of `hidden` is computed with the logits, and only scaled in the backward pass. Weight and bias get no
    gradients: these would be sums over the chunks, for which the backward pass would have to compute the logits again.

    Args:
        hidden: shape (tokens, width).
        weight: shape (vocabulary, width).
        bias: shape (vocabulary,).
        targets: shape (tokens,); `IGNORE_INDEX`: none.
        smoothing: see `loss.answer_loss`.
    """
    wanted = torch.is_grad_enabled() and hidden.requires_grad
    losses: Tensor = _LinearCrossEntropy.apply(hidden, weight, bias, targets, smoothing, wanted)
    return losses


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        smoothing: float,
        wanted: bool,
    ) -> Tensor:
        dtype = _product_dtype(hidden, weight)
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        losses, gradients = [], []
        for part, target in zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True):
            scores = torch.log_softmax(linear(part.to(dtype), weight, bias), dim=-1, dtype=torch.float32)
            losses.append(_losses(scores, target, smoothing))
            if wanted:
                gradients.append(_gradient_of_logits(scores, target, smoothing).to(dtype) @ weight)
            del scores  # before the next chunk's logits
        ctx.hidden_dtype = hidden.dtype
        ctx.save_for_backward(targets, *([torch.cat(gradients)] if wanted else []))
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        targets, gradient = ctx.saved_tensors
        scale = upstream[0].masked_fill(targets == IGNORE_INDEX, 0.0)[:, None]
        return (gradient * scale).to(ctx.hidden_dtype), None, None, None, None, None


def _losses(scores: Tensor, targets: Tensor, smoothing: float) -> Tensor:
    """The losses of tokens from their log-probabilities, as torch's `cross_entropy` computes them."""
    ignored = targets == IGNORE_INDEX
    losses = -scores.gather(1, targets.masked_fill(ignored, 0)[:, None])[:, 0]
    if smoothing:
        losses = (1 - smoothing) * losses - smoothing * scores.mean(dim=1)
    return losses.masked_fill(ignored, 0.0)


def _gradient_of_logits(scores: Tensor, targets: Tensor, smoothing: float) -> Tensor:
    """Replace log-probabilities by the gradients of the losses with respect to the logits."""
    gradient = scores.exp_()
    if smoothing:
        gradient -= smoothing / scores.shape[1]
    index = targets.masked_fill(targets == IGNORE_INDEX, 0)[:, None]
    return gradient.scatter_add_(1, index, torch.full_like(index, smoothing - 1, dtype=gradient.dtype))


@dataclass
class LossRequest:
    """What a caller of the model asks its head for.

    Attributes:
        labels: shape (rows, columns), aligned with the columns of logits that the call keeps.
        head: the head that has returned losses; None: it has returned logits.
    """

    labels: Tensor
    smoothing: float
    head: LossHead | None = None

    def losses(self, output: Tensor) -> Tensor | None:
        """Return the losses, shape (rows, columns), from what the model returned as logits.

        None if these are logits, or if the model has scaled or capped what its head returned. Then the random state is
        that of before the call, which is to be repeated; this head will return logits from now on.
        """
        return self.head.check(output) if self.head else None


_request: ContextVar[LossRequest | None] = ContextVar("request", default=None)


@contextlib.contextmanager
def request_losses(labels: Tensor, smoothing: float) -> Iterator[LossRequest]:
    """Context of a model call whose head, if it can, returns losses instead of logits, shape (rows, columns, 1)."""
    request = LossRequest(labels, smoothing)
    token = _request.set(request)
    try:
        yield request
    finally:
        _request.reset(token)


class LossHead:
    """Makes the head of a model return losses where they are asked for (`request_losses`).

    Left alone are heads that are trained, or no plain linear layer (with an adapter, quantized, or whose logits ftlib
    caps), and training in float16, where unscaled gradients would underflow.

    Args:
        model: the outermost module, with its adapters.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        head: Any = model.get_output_embeddings()  # type: ignore[operator]
        if type(head) is not torch.nn.Linear or head._forward_hooks:
            return
        if getattr(model.config.get_text_config(), "final_logit_softcapping", None):  # type: ignore[union-attr,operator]
            return
        self._head = head
        self._logits = head.forward
        self._usable: bool | None = None
        """Whether the model returns what its head returns; None: not known yet."""
        self._random: list[Tensor] = []
        self._returned = (torch.empty(0), 0)
        head.__dict__["forward"] = self._forward  # an instance attribute, so that hooks stay where they are
        model.register_forward_pre_hook(self._begin)

    def _begin(self, module: torch.nn.Module, inputs: Any) -> None:
        if not torch.compiler.is_compiling() and self._usable is None and _request.get():
            self._random = random_states()

    def _forward(self, hidden: Tensor) -> Tensor:
        request = None if torch.compiler.is_compiling() else _request.get()
        if request is None or self._usable is False:
            return self._logits(hidden)
        weight: Tensor = self._head.weight
        if any(parameter.requires_grad for parameter in self._head.parameters()):
            return self._logits(hidden)
        if torch.float16 in (weight.dtype, _product_dtype(hidden, weight)):
            return self._logits(hidden)
        request.head = self
        targets = request.labels.flatten()
        losses = linear_cross_entropy(hidden.flatten(0, 1), weight, self._head.bias, targets, request.smoothing)
        returned = losses.view(*request.labels.shape, 1)
        self._returned = (returned, returned._version)
        return returned

    def check(self, output: Tensor) -> Tensor | None:
        """See `LossRequest.losses`."""
        (returned, version), self._returned = self._returned, (torch.empty(0), 0)
        if self._usable is None:
            # DDP may return a copy.
            same = output is returned or (not output.is_meta and torch.equal(output, returned))
            self._usable = same and returned._version == version
            if not self._usable:
                set_random_states(self._random)
            self._random = []
        return output[..., 0] if self._usable else None


def random_states() -> list[Tensor]:
    """Return torch's random states of the CPU and of all GPUs."""
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [])]


def set_random_states(states: list[Tensor]) -> None:
    """Set what `random_states` has returned."""
    torch.set_rng_state(states[0])
    if states[1:]:
        torch.cuda.set_rng_state_all(states[1:])


def _product_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The type in which the head is computed: autocast's, if it is on."""
    return linear(hidden.flatten(0, -2)[:1], weight[:1]).dtype
