"""PaliGemma's masks: sixteen `<seg>` codes ↔ the pixels of a mask in its box.

The codes are those of a vector-quantised autoencoder of 64 × 64 masks (Ning et al. 2023, arXiv:2301.02229), on a grid
of 4 × 4. Its weights are the file `vae-oid.npz` of PaliGemma's authors (gs://big_vision/paligemma/vae-oid.npz), whose
arrays carry PyTorch's names: `decoder.*`, `encoder.*` and the codes' vectors, `_vq_vae._embedding`.

    codec = MaskCodec.load(Path("vae-oid.npz"))
    mask = codec.masks(parse(text).objects, width, height)[0]                   # bool, (height, width), or None
    text = to_text([codec.locate(from_polygons(polygons, height, width), "cat")])
"""

from __future__ import annotations

import contextlib
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from numpy.lib import format as npy
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from ftlib.data.location_tokens import SEG_CODES, Box, LocatedObject, to_fractions
from ftlib.errors import UserError
from ftlib.metrics.segmentation import Mask, run_lengths

SIDE = 64
"""Pixels of a mask before it is put into its box."""

GRID = 4
WIDTHS = (16, 32, 64, 128)
"""Channels of the encoder's halvings; the decoder goes back the same way."""

_MAX_WIDTH = 4096
"""Numbers of a code's vector; the authors' have 512."""

_CODES = "_vq_vae._embedding"
_REMEDY = "It must be the vae-oid.npz of PaliGemma's authors: gs://big_vision/paligemma/vae-oid.npz"

Pixels = NDArray[np.bool_]


class _Residual(nn.Module):
    """x + two 3 × 3 convolutions and a 1 × 1 of it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.net(x)


def _decoder(code_width: int) -> nn.Sequential:
    """Codes' vectors (n, width, 4, 4) → mask (n, 1, 64, 64), positive inside."""
    last = WIDTHS[-1]
    layers: list[nn.Module] = [nn.Conv2d(code_width, last, 1), nn.ReLU(), _Residual(last), _Residual(last)]
    for before, after in pairwise([last, *reversed(WIDTHS)]):
        layers += [nn.ConvTranspose2d(before, after, 4, stride=2, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(WIDTHS[0], 1, 1))


def _encoder(code_width: int) -> nn.Sequential:
    """Mask in [-1, 1] (n, 1, 64, 64) → vectors (n, width, 4, 4)."""
    last = WIDTHS[-1]
    layers: list[nn.Module] = []
    for before, after in pairwise([1, *WIDTHS]):
        layers += [nn.Conv2d(before, after, 4, stride=2, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, _Residual(last), _Residual(last), nn.Conv2d(last, code_width, 1))


class MaskCodec:
    """Codes → masks and masks → codes, on the CPU."""

    def __init__(self, codes: Tensor, decoder: nn.Sequential, encoder: nn.Sequential) -> None:
        self.codes = codes
        self.decoder = decoder.eval()
        self.encoder = encoder.eval()

    @classmethod
    def load(cls, path: Path) -> MaskCodec:
        """Read the authors' weight file.

        Raises:
            UserError: no such file, or its arrays are not these networks' (missing and misshapen ones are listed).
        """
        with _read_errors(path), zipfile.ZipFile(path) as archive:
            shape = _shape(archive, _CODES)
            if shape is None or len(shape) != 2 or shape[0] != SEG_CODES or not 0 < shape[1] <= _MAX_WIDTH:
                raise UserError(
                    f"{path}: {_CODES}: needed is ({SEG_CODES}, width), found {_format_shape(shape)}", _REMEDY
                )
            parts = {"decoder": _decoder(shape[1]), "encoder": _encoder(shape[1])}
            _require_shapes(path, archive, parts)
            codes = _array(archive, _CODES)
            states = {
                name: {key: _array(archive, f"{name}.{key}") for key in part.state_dict()}
                for name, part in parts.items()
            }
        for name, part in parts.items():
            part.load_state_dict(states[name])
        return cls(codes, parts["decoder"], parts["encoder"])

    @torch.inference_mode()
    def decode(self, codes: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """Masks of codes; positive inside.

        Args:
            codes: shape (n, 16), each 0…127, row by row of the 4 × 4 grid.

        Returns:
            Shape (n, 64, 64).
        """
        if not codes:
            return np.zeros((0, SIDE, SIDE), dtype=np.float32)
        vectors = self.codes[torch.tensor(codes).reshape(-1, GRID, GRID)].permute(0, 3, 1, 2)
        masks: NDArray[np.float32] = self.decoder(vectors)[:, 0].numpy()
        return masks

    @torch.inference_mode()
    def encode(self, pixels: Pixels, box: Box) -> tuple[int, ...]:
        """The sixteen codes of the part of a mask that lies in a box, each the nearest to what the encoder says.

        Args:
            pixels: of the whole image, shape (height, width).
            box: x_min, y_min, x_max, y_max as fractions of width and height.

        Raises:
            ValueError: no pixel lies in the box.
        """
        height, width = pixels.shape
        left, top, right, bottom = (round(edge * size) for edge, size in zip(box, (width, height) * 2, strict=True))
        part = np.asarray(pixels[max(top, 0) : bottom, max(left, 0) : right], dtype=np.float32)
        if not part.size:
            raise ValueError(f"box {box}: no pixel of the {width} × {height} image lies in it")
        scaled = _resize(part, SIDE, SIDE) * 2 - 1
        vectors = self.encoder(torch.from_numpy(scaled)[None, None])[0].flatten(1).T
        nearest = torch.cdist(vectors[None], self.codes[None])[0].argmin(dim=-1)
        return tuple(nearest.tolist())

    def locate(self, mask: Mask, label: str = "") -> LocatedObject:
        """A mask as an object that can be written as tokens: its tight box, its codes.

        Raises:
            ValueError: the mask is empty.
        """
        runs = run_lengths(mask.counts)
        pixels = np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(mask.width, mask.height).T
        rows, columns = np.nonzero(pixels)
        if not len(rows):
            raise ValueError("an empty mask has no box")
        corners = (float(columns.min()), float(rows.min()), columns.max() + 1.0, rows.max() + 1.0)
        box = to_fractions(corners, mask.width, mask.height)
        return LocatedObject(box, label, self.encode(pixels, box))

    def masks(self, objects: Sequence[LocatedObject], width: int, height: int) -> list[Pixels | None]:
        """The objects' masks in the image.

        Args:
            width, height: of the image in pixels.

        Returns:
            For each object shape (height, width); None for one without codes, or whose box holds no whole pixel.
        """
        decoded = iter(self.decode([one.mask for one in objects if one.mask]))
        return [_paste(next(decoded), one.box, width, height) if one.mask else None for one in objects]


def _paste(mask: NDArray[np.float32], box: Box, width: int, height: int) -> Pixels | None:
    """A 64 × 64 mask stretched into its box; edges are rounded down, as the authors' evaluation does."""
    left, top, right, bottom = (int(edge * size) for edge, size in zip(box, (width, height) * 2, strict=True))
    if left >= right or top >= bottom:
        return None
    pixels = np.zeros((height, width), dtype=np.bool_)
    pixels[top:bottom, left:right] = _resize(mask, right - left, bottom - top) > 0
    return pixels


def _resize(values: NDArray[np.float32], width: int, height: int) -> NDArray[np.float32]:
    """Bilinear; where it shrinks, averaging over the pixels that become one."""
    resized = Image.fromarray(values).resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(resized, dtype=np.float32)


@contextlib.contextmanager
def _read_errors(path: Path) -> Iterator[None]:
    """Turn whatever reading an archive raises into plain words."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; masks are decoded with its weights", _REMEDY) from None
    except (OSError, ValueError, TypeError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: not an npz file of arrays: {reason}", _REMEDY) from None


def _require_shapes(path: Path, archive: zipfile.ZipFile, parts: dict[str, nn.Sequential]) -> None:
    faults = []
    for name, part in parts.items():
        for key, tensor in part.state_dict().items():
            shape = _shape(archive, f"{name}.{key}")
            if shape != tuple(tensor.shape):
                faults.append(f"{name}.{key}: needed is {tuple(tensor.shape)}, found {_format_shape(shape)}")
    if faults:
        raise UserError(f"{path}: {len(faults)} arrays do not fit:\n" + "\n".join(faults), _REMEDY)


def _shape(archive: zipfile.ZipFile, name: str) -> tuple[int, ...] | None:
    """An array's shape, from its header; None if there is no such array.

    Nothing else of it is decompressed, since a small file may hold gigabytes of zeros.

    Raises:
        ValueError: not an array of numbers.
    """
    if f"{name}.npy" not in archive.NameToInfo:
        return None
    with archive.open(f"{name}.npy") as file:
        if npy.read_magic(file) != (1, 0):  # later versions may have a header of gigabytes
            raise ValueError(f"{name}: not in version 1.0 of the npy format")
        shape, _, kind = npy.read_array_header_1_0(file)
    if kind.kind not in "fiu":
        raise ValueError(f"{name}: holds {kind}, not numbers")
    return shape


def _array(archive: zipfile.ZipFile, name: str) -> Tensor:
    """An array whose shape is known to fit; what may follow it in its file is not read."""
    with archive.open(f"{name}.npy") as file:
        return torch.from_numpy(np.asarray(npy.read_array(file, allow_pickle=False), dtype=np.float32))


def _format_shape(shape: tuple[int, ...] | None) -> str:
    return "none" if shape is None else str(shape)
