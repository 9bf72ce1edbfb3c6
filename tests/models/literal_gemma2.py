"""PaliGemma's language model written out in float64, row by row, from the paper and the authors' mask.

Gemma 2 (arXiv:2408.00118): norms before and after each block, grouped queries, rotary positions, scores scaled by
query_pre_attn_scalar and capped, GELU-gated MLP, capped logits. Mask (big_vision, models/proj/paligemma/paligemma.py,
`make_attn_mask`): a token sees those whose count of causal tokens up to them is at most its own; every layer is global.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

Array = np.ndarray


def norm(x: Array, weight: Array) -> Array:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * (1.0 + weight)


def rotated(x: Array, positions: Array) -> Array:
    """x: shape (tokens, heads, size); pairs are (i, i + size / 2)."""
    half = x.shape[-1] // 2
    angles = positions[:, None, None] * 10_000.0 ** (-np.arange(half) / half)
    first, second = x[..., :half], x[..., half:]
    return np.concatenate(
        [first * np.cos(angles) - second * np.sin(angles), second * np.cos(angles) + first * np.sin(angles)], -1
    )


def seen(n_prompt: int, length: int) -> Array:
    """Whether token i (row) sees token j (column)."""
    causal_so_far = np.cumsum([0] * n_prompt + [1] * (length - n_prompt))
    return causal_so_far[None, :] <= causal_so_far[:, None]


def attended(
    x: Array, w: Mapping[str, Array], at: str, heads: tuple[int, int], scale: float, cap: float, mask: Array
) -> Array:
    """One attention block for one row."""
    positions = np.arange(1, len(x) + 1)
    queries = rotated((x @ w[at + "q_proj.weight"].T).reshape(len(x), heads[0], -1), positions)
    keys = rotated((x @ w[at + "k_proj.weight"].T).reshape(len(x), heads[1], -1), positions)
    values = (x @ w[at + "v_proj.weight"].T).reshape(len(x), heads[1], -1)
    found = []
    for head in range(heads[0]):
        shared = head * heads[1] // heads[0]
        scores = cap * np.tanh(queries[:, head] @ keys[:, shared].T * scale / cap)
        weights = np.where(mask, np.exp(scores), 0.0)
        found.append(weights / weights.sum(-1, keepdims=True) @ values[:, shared])
    return np.concatenate(found, -1) @ w[at + "o_proj.weight"].T


def gelu(x: Array) -> Array:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def logits(model: torch.nn.Module, embedded: torch.Tensor, n_prompt: int, final_cap: float | None) -> torch.Tensor:
    """
    Args:
        model: a PaliGemma 2 of transformers; only its weights and four numbers of its config are used.
        embedded: one row without padding, shape (tokens, hidden).
        n_prompt: how many of its first tokens see each other both ways.

    Returns:
        Shape (tokens, vocabulary), float32.
    """
    text = model.config.text_config
    prefix = "model.language_model."
    w = {
        name.removeprefix(prefix): tensor.double().numpy()
        for name, tensor in model.state_dict().items()
        if name.startswith(prefix)
    }
    x = embedded.double().numpy()
    mask = seen(n_prompt, len(x))
    heads = (text.num_attention_heads, text.num_key_value_heads)
    for number in range(text.num_hidden_layers):
        at = f"layers.{number}."
        block = norm(x, w[at + "input_layernorm.weight"])
        scale = text.query_pre_attn_scalar**-0.5
        block = attended(block, w, at + "self_attn.", heads, scale, text.attn_logit_softcapping, mask)
        x = x + norm(block, w[at + "post_attention_layernorm.weight"])
        block = norm(x, w[at + "pre_feedforward_layernorm.weight"])
        block = gelu(block @ w[at + "mlp.gate_proj.weight"].T) * (block @ w[at + "mlp.up_proj.weight"].T)
        block = block @ w[at + "mlp.down_proj.weight"].T
        x = x + norm(block, w[at + "post_feedforward_layernorm.weight"])
    scores = norm(x, w["norm.weight"]) @ w["embed_tokens.weight"].T
    if final_cap:
        scores = final_cap * np.tanh(scores / final_cap)
    return torch.tensor(scores, dtype=torch.float32)
