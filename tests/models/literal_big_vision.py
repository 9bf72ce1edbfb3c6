"""PaliGemma as its authors define it, written out in float64 on the arrays of their checkpoints, and such checkpoints.

Vision: ViT So400m/14 of SigLIP without its head: patches, learned positions, blocks with norms before them, a norm at
the end, a linear layer to the language model's width. Language: Gemma and Gemma 2 (arXiv:2403.08295, arXiv:2408.00118).
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.models.literal_gemma2 import gelu, norm, rotated, seen

Array = np.ndarray[Any, Any]

FIRST = {"L": 2, "W": 12, "N": 3, "H": 4, "F": 20, "P": 4, "S": 16, "D": 3, "E": 24, "M": 40, "Q": 2, "K": 1, "G": 8}
"""Of the vision tower: layers, width, heads, their size, MLP, patch, patches. Of the language model: layers, width,
MLP, heads of queries, heads of keys and values, their size.
"""
SECOND = {**FIRST, "D": 2, "E": 28, "M": 44, "Q": 4, "K": 2}
BLOCK = "img/Transformer/encoderblock/"
ATTENTION = f"{BLOCK}MultiHeadDotProductAttention_0/"


def parameters(sizes: Mapping[str, int], rows: int, gemma2: bool, seed: int = 0) -> dict[str, Array]:
    """Random float32 arrays by big_vision's names, all layers in one, of sizes that keep every part audible."""
    shapes = {
        "img/embedding/kernel": "P P 3 W",
        "img/embedding/bias": "W",
        "img/pos_embedding": "1 S W",
        **{f"{BLOCK}LayerNorm_{n}/{part}": "L W" for n in (0, 1) for part in ("scale", "bias")},
        f"{BLOCK}MlpBlock_0/Dense_0/kernel": "L W F",
        f"{BLOCK}MlpBlock_0/Dense_0/bias": "L F",
        f"{BLOCK}MlpBlock_0/Dense_1/kernel": "L F W",
        f"{BLOCK}MlpBlock_0/Dense_1/bias": "L W",
        **{f"{ATTENTION}{name}/kernel": "L W N H" for name in ("query", "key", "value")},
        **{f"{ATTENTION}{name}/bias": "L N H" for name in ("query", "key", "value")},
        f"{ATTENTION}out/kernel": "L N H W",
        f"{ATTENTION}out/bias": "L W",
        "img/Transformer/encoder_norm/scale": "W",
        "img/Transformer/encoder_norm/bias": "W",
        "img/head/kernel": "W E",
        "img/head/bias": "E",
        "llm/embedder/input_embedding": "V E",
        "llm/layers/attn/q_einsum/w": "D Q E G",
        "llm/layers/attn/kv_einsum/w": "D 2 K E G",
        "llm/layers/attn/attn_vec_einsum/w": "D Q G E",
        "llm/layers/mlp/gating_einsum": "D 2 E M",
        "llm/layers/mlp/linear": "D M E",
        "llm/layers/pre_attention_norm/scale": "D E",
        "llm/layers/pre_ffw_norm/scale": "D E",
        "llm/final_norm/scale": "E",
    }
    if gemma2:
        shapes |= {f"llm/layers/post_{name}_norm/scale": "D E" for name in ("attention", "ffw")}
    random, known = np.random.default_rng(seed), {**sizes, "V": rows}
    found = {}
    for name, axes in shapes.items():
        shape = [known.get(axis) or int(axis) for axis in axes.split()]
        spread = 0.3 if "scale" in name or "bias" in name else shape[-1] ** -0.5
        found[name] = (random.standard_normal(shape) * spread + (name.startswith("img") and "scale" in name)).astype(
            "f4"
        )
    return found


def as_bfloat16(array: Array) -> Array:
    """The two bytes of each number, as numpy stores a type that it does not know."""
    return torch.from_numpy(array).bfloat16().view(torch.int16).numpy().view("V2")


def as_float32(array: Array) -> Array:
    """The numbers of an array in any stored form."""
    if array.dtype == "V2":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16).float().numpy()
    return array.astype("f4")


def in_form(arrays: Mapping[str, Array], form: str) -> dict[str, Array]:
    """The arrays as float32, float16, bfloat16, or mixed as the authors' notebook saves them."""
    if form == "bfloat16":
        return {name: as_bfloat16(array) for name, array in arrays.items()}
    whole = {"float32": "", "mixed": "llm/layers/attn/", "float16": " "}[form]
    return {name: array if name.startswith(whole) else array.astype("f2") for name, array in arrays.items()}


def unstacked(arrays: Mapping[str, Array]) -> dict[str, Array]:
    """One array for each layer."""
    found = {}
    for name, array in arrays.items():
        for stacked, single in ((BLOCK, "img/Transformer/encoderblock_{}/"), ("llm/layers/", "llm/layers/{}/")):
            if name.startswith(stacked):
                rest = name.removeprefix(stacked)
                found |= {single.format(number) + rest: layer for number, layer in enumerate(array)}
                break
        else:
            found[name] = array
    return found


def save_npz(path: Path, arrays: Mapping[str, Array], before: str = "params/", compressed: bool = False) -> Path:
    """Write a checkpoint."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            with archive.open(f"{before}{name}.npy", "w") as file:
                np.lib.format.write_array(file, np.ascontiguousarray(array), allow_pickle=array.dtype.hasobject)
    return path


def layer_norm(x: Array, w: Mapping[str, Array], at: str) -> Array:
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * w[f"{at}/scale"] + w[f"{at}/bias"]


def softmax(x: Array) -> Array:
    powers = np.exp(x - x.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def image_tokens(w: Mapping[str, Array], image: Array) -> Array:
    """
    Args:
        image: shape (height, width, 3), in [-1, 1].

    Returns:
        Shape (positions, width of the language model).
    """
    kernel = w["img/embedding/kernel"]
    patch, side = kernel.shape[0], len(image) // kernel.shape[0]
    patches = [
        image[patch * row : patch * row + patch, patch * column : patch * column + patch]
        for row in range(side)
        for column in range(side)
    ]
    x = np.stack([np.einsum("hwc,hwcd->d", one, kernel) for one in patches]) + w["img/embedding/bias"]
    x = x + w["img/pos_embedding"][0]
    for number in range(len(w[f"{BLOCK}LayerNorm_0/scale"])):
        own = {name.removeprefix(BLOCK): array[number] for name, array in w.items() if name.startswith(BLOCK)}
        y, at = layer_norm(x, own, "LayerNorm_0"), "MultiHeadDotProductAttention_0/"
        q, k, v = (
            np.einsum("td,dnh->nth", y, own[f"{at}{part}/kernel"]) + own[f"{at}{part}/bias"][:, None]
            for part in ("query", "key", "value")
        )
        weights = softmax(np.einsum("nth,nsh->nts", q, k) / np.sqrt(q.shape[-1]))
        mixed = np.einsum("nts,nsh->tnh", weights, v)
        x = x + np.einsum("tnh,nhd->td", mixed, own[f"{at}out/kernel"]) + own[f"{at}out/bias"]
        y = layer_norm(x, own, "LayerNorm_1")
        y = gelu(y @ own["MlpBlock_0/Dense_0/kernel"] + own["MlpBlock_0/Dense_0/bias"])
        x = x + y @ own["MlpBlock_0/Dense_1/kernel"] + own["MlpBlock_0/Dense_1/bias"]
    return layer_norm(x, w, "img/Transformer/encoder_norm") @ w["img/head/kernel"] + w["img/head/bias"]


def logits(arrays: Mapping[str, Array], image: Array, prompt: list[int], answer: list[int], scale: float = 0) -> Array:
    """The logits of one row before any cap, for each of its positions.

    Args:
        arrays: all layers in one, float32.
        image: see `image_tokens`.
        scale: of the queries; the usual one is the size of a head to the power of -1/2.

    Returns:
        Shape (positions of the image + prompt + answer, rows of the table), float64.
    """
    w = {name: array.astype("f8") for name, array in arrays.items()}
    table = w["llm/embedder/input_embedding"]
    first = image_tokens(w, image.astype("f8"))
    x = np.concatenate([first, table[[*prompt, *answer]] * np.sqrt(table.shape[1])])
    mask, positions = seen(len(first) + len(prompt), len(x)), np.arange(len(x))
    gemma2 = "llm/layers/post_ffw_norm/scale" in w
    for number in range(len(w["llm/layers/mlp/linear"])):
        own = {name.removeprefix("llm/layers/"): a[number] for name, a in w.items() if name.startswith("llm/layers/")}
        y = norm(x, own["pre_attention_norm/scale"])
        q = rotated(np.einsum("td,ndh->tnh", y, own["attn/q_einsum/w"]), positions)
        k, v = np.einsum("td,zkdh->ztkh", y, own["attn/kv_einsum/w"])
        k = rotated(k, positions)
        grouped = q.reshape(len(x), k.shape[1], -1, q.shape[-1]) * (scale or q.shape[-1] ** -0.5)
        scores = np.einsum("tkgh,skh->kgts", grouped, k)
        if gemma2:
            scores = 50 * np.tanh(scores / 50)
        mixed = np.einsum("kgts,skh->tkgh", softmax(np.where(mask, scores, -np.inf)), v).reshape(q.shape)
        y = np.einsum("tnh,nhd->td", mixed, own["attn/attn_vec_einsum/w"])
        x = x + (norm(y, own["post_attention_norm/scale"]) if gemma2 else y)
        y = norm(x, own["pre_ffw_norm/scale"])
        gate, up = own["mlp/gating_einsum"]
        y = (gelu(y @ gate) * (y @ up)) @ own["mlp/linear"]
        x = x + (norm(y, own["post_ffw_norm/scale"]) if gemma2 else y)
    return norm(x, w["llm/final_norm/scale"]) @ table.T
