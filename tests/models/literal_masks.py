"""The mask networks a second time: numpy and loops, one output pixel or one input pixel at a time."""

from __future__ import annotations

import math

import numpy as np

Arrays = dict[str, np.ndarray]


def convolve(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, stride: int, pad: int) -> np.ndarray:
    """x (C, H, W), weight (out, C, k, k)."""
    out, _, k, _ = weight.shape
    padded = np.pad(x, ((0, 0), (pad, pad), (pad, pad)))
    rows, columns = ((size + 2 * pad - k) // stride + 1 for size in x.shape[1:])
    y = np.zeros((out, rows, columns))
    for i in range(rows):
        for j in range(columns):
            window = padded[:, i * stride : i * stride + k, j * stride : j * stride + k]
            y[:, i, j] = np.tensordot(weight, window, axes=3) + bias
    return y


def spread(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """Transposed convolution, stride 2, padding 1: every input pixel adds a stamp; weight (C, out, 4, 4)."""
    _, rows, columns = x.shape
    canvas = np.zeros((weight.shape[1], 2 * rows + 2, 2 * columns + 2))
    for i in range(rows):
        for j in range(columns):
            canvas[:, 2 * i : 2 * i + 4, 2 * j : 2 * j + 4] += np.tensordot(x[:, i, j], weight, axes=1)
    return canvas[:, 1:-1, 1:-1] + bias[:, None, None]


def positive(x: np.ndarray) -> np.ndarray:
    return np.where(x > 0, x, 0)


def block(x: np.ndarray, arrays: Arrays, name: str) -> np.ndarray:
    y = x
    for layer, pad in (("0", 1), ("2", 1), ("4", 0)):
        y = convolve(y, arrays[f"{name}.net.{layer}.weight"], arrays[f"{name}.net.{layer}.bias"], 1, pad)
        y = y if layer == "4" else positive(y)
    return x + y


def decode(arrays: Arrays, codes: list[int]) -> np.ndarray:
    """Sixteen codes → (64, 64)."""
    table = arrays["_vq_vae._embedding"]
    x = np.zeros((table.shape[1], 4, 4))
    for place, code in enumerate(codes):
        x[:, place // 4, place % 4] = table[code]
    x = positive(convolve(x, arrays["decoder.0.weight"], arrays["decoder.0.bias"], 1, 0))
    x = block(block(x, arrays, "decoder.2"), arrays, "decoder.3")
    for layer in (4, 6, 8, 10):
        x = positive(spread(x, arrays[f"decoder.{layer}.weight"], arrays[f"decoder.{layer}.bias"]))
    return convolve(x, arrays["decoder.12.weight"], arrays["decoder.12.bias"], 1, 0)[0]


def encode(arrays: Arrays, mask: np.ndarray) -> list[int]:
    """(64, 64) of 0…1 → sixteen codes."""
    x = mask[None] * 2.0 - 1.0
    for layer in (0, 2, 4, 6):
        x = positive(convolve(x, arrays[f"encoder.{layer}.weight"], arrays[f"encoder.{layer}.bias"], 2, 1))
    x = block(block(x, arrays, "encoder.8"), arrays, "encoder.9")
    x = convolve(x, arrays["encoder.10.weight"], arrays["encoder.10.bias"], 1, 0)
    table = arrays["_vq_vae._embedding"]
    return [int(((table - x[:, i, j]) ** 2).sum(axis=1).argmin()) for i in range(4) for j in range(4)]


def stretch(values: np.ndarray, size: int, axis: int) -> np.ndarray:
    """Linear interpolation along one axis, pixel centres at .5; the triangle widens where it shrinks."""
    values = np.moveaxis(values, axis, 0)
    ratio = len(values) / size
    reach = max(ratio, 1.0)
    result = np.zeros((size, *values.shape[1:]))
    for i in range(size):
        centre = (i + 0.5) * ratio
        weights = {
            place: 1 - abs(place + 0.5 - centre) / reach
            for place in range(max(0, math.floor(centre - reach)), min(len(values), math.ceil(centre + reach)))
            if abs(place + 0.5 - centre) < reach
        }
        for place, weight in weights.items():
            result[i] += weight / sum(weights.values()) * values[place]
    return np.moveaxis(result, 0, axis)


def resize(values: np.ndarray, width: int, height: int) -> np.ndarray:
    return stretch(stretch(values, width, 1), height, 0)
