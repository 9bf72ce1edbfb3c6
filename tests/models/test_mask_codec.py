"""Masks from codes and codes from masks, against an implementation in plain numpy with the same random weights."""

from __future__ import annotations

import re
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from numpy.lib import format as npy
from pycocotools import mask as coco_mask

from ftlib.data.location_tokens import LocatedObject, format_objects, parse_objects
from ftlib.errors import UserError
from ftlib.metrics.segmentation import from_pixels, from_polygons
from ftlib.models.mask_codec import MaskCodec
from tests.models import literal_masks

CODE_WIDTH = 24


def random_arrays(seed: int = 0) -> dict[str, np.ndarray]:
    """Arrays of the names and shapes of vae-oid.npz, scaled so that masks are neither empty nor full."""
    draw = np.random.default_rng(seed)
    shapes = {"_vq_vae._embedding": (128, CODE_WIDTH)}

    def layer(name: str, *weight: int, bias: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = weight, (bias,)

    def block(name: str, width: int) -> None:
        for place, kernel in (("0", 3), ("2", 3), ("4", 1)):
            layer(f"{name}.net.{place}", width, width, kernel, kernel, bias=width)

    layer("decoder.0", 128, CODE_WIDTH, 1, 1, bias=128)
    block("decoder.2", 128)
    block("decoder.3", 128)
    for place, (before, after) in zip((4, 6, 8, 10), [(128, 128), (128, 64), (64, 32), (32, 16)], strict=True):
        layer(f"decoder.{place}", before, after, 4, 4, bias=after)
    layer("decoder.12", 1, 16, 1, 1, bias=1)
    for place, (before, after) in zip((0, 2, 4, 6), [(1, 16), (16, 32), (32, 64), (64, 128)], strict=True):
        layer(f"encoder.{place}", after, before, 4, 4, bias=after)
    block("encoder.8", 128)
    block("encoder.9", 128)
    layer("encoder.10", CODE_WIDTH, 128, 1, 1, bias=CODE_WIDTH)
    arrays = {}
    for name, shape in shapes.items():
        inputs = np.prod(shape[1:]) if len(shape) == 4 else 10
        arrays[name] = draw.normal(0, (2 / inputs) ** 0.5, shape).astype(np.float32)
    arrays["_vq_vae._embedding"] *= 4
    arrays["decoder.12.bias"][:] = 0
    arrays["_vq_vae._ema_w"] = np.zeros(3, dtype=np.float32)
    return arrays


@pytest.fixture(scope="module")
def arrays() -> dict[str, np.ndarray]:
    return random_arrays()


@pytest.fixture(scope="module")
def codec(arrays: dict[str, np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> MaskCodec:
    path = tmp_path_factory.mktemp("weights") / "vae-oid.npz"
    np.savez(path, **arrays)
    return MaskCodec.load(path)


def random_codes(count: int) -> list[list[int]]:
    return np.random.default_rng(1).integers(0, 128, (count, 16)).tolist()


def test_decoding(codec: MaskCodec, arrays: dict[str, np.ndarray]) -> None:
    codes = random_codes(3)
    found = codec.decode(codes)
    assert found.shape == (3, 64, 64)
    assert 0.02 < (found > 0).mean() < 0.98
    for mask, one in zip(found, codes, strict=True):
        expected = literal_masks.decode(arrays, one)
        np.testing.assert_allclose(mask, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    assert codec.decode([]).shape == (0, 64, 64)


def test_encoding(codec: MaskCodec, arrays: dict[str, np.ndarray]) -> None:
    y, x = np.mgrid[:100, :80]
    pixels = (x - 40) ** 2 / 900 + (y - 45) ** 2 / 1600 < 1
    box = (0.125, 0.05, 0.875, 0.85)  # columns 10…69, rows 5…84
    part = literal_masks.resize(pixels[5:85, 10:70].astype(float), 64, 64)
    found = codec.encode(pixels, box)
    assert list(found) == literal_masks.encode(arrays, part)
    assert len(set(found)) > 3
    with pytest.raises(ValueError, match="no pixel"):
        codec.encode(pixels, (0.5, 0.5, 0.5001, 0.9))


def test_polygons_become_tokens(codec: MaskCodec, arrays: dict[str, np.ndarray]) -> None:
    mask = from_polygons([[20, 10, 60, 10, 60, 90, 40, 60], [5, 40, 15, 40, 15, 50, 5, 50]], height=100, width=80)
    pixels = coco_mask.decode(mask.rle).astype(bool)
    rows, columns = np.nonzero(pixels)
    left, top, right, bottom = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
    found = codec.locate(mask, "cat")
    assert found.box == pytest.approx((left / 80, top / 100, right / 80, bottom / 100))
    part = literal_masks.resize(pixels[top:bottom, left:right].astype(float), 64, 64)
    assert list(found.mask) == literal_masks.encode(arrays, part)
    (read,) = parse_objects(format_objects([found])).objects
    assert (read.label, read.mask) == ("cat", found.mask)
    assert read.box == pytest.approx(found.box, abs=1 / 1023)
    with pytest.raises(ValueError, match="empty"):
        codec.locate(from_pixels(np.zeros((4, 4))))


@pytest.mark.parametrize(
    ("box", "place"),
    [
        ((0.1, 0.25, 0.9, 0.999), (20, 50, 180, 199)),  # larger than 64 × 64
        ((0.5, 0.5, 0.654, 0.599), (100, 100, 130, 119)),  # smaller
        ((0.0, 0.0, 1.0, 1.0), (0, 0, 200, 200)),
    ],
)
def test_a_mask_is_stretched_into_its_box(
    codec: MaskCodec, arrays: dict[str, np.ndarray], box: tuple[float, ...], place: tuple[int, ...]
) -> None:
    (codes,) = random_codes(1)
    (found,) = codec.masks([LocatedObject(box, "cat", tuple(codes))], width=200, height=200)
    left, top, right, bottom = place
    smooth = literal_masks.resize(literal_masks.decode(arrays, codes), right - left, bottom - top)
    clear = np.abs(smooth) > 1e-3 * np.abs(smooth).max()
    assert clear.mean() > 0.98
    assert found is not None and found.shape == (200, 200)
    assert ((found[top:bottom, left:right] == (smooth > 0)) | ~clear).all()
    outside = found.copy()
    outside[top:bottom, left:right] = False
    assert not outside.any()


def test_every_object_gets_its_own_mask(codec: MaskCodec) -> None:
    first, second = map(tuple, random_codes(2))
    boxes = [(0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)]
    objects = [
        LocatedObject(boxes[0], "a", first),
        LocatedObject(boxes[1], "a box alone"),
        LocatedObject(boxes[1], "b", second),
        LocatedObject((0.5, 0.5, 0.501, 0.9), "thinner than a pixel", first),
    ]
    found = codec.masks(objects, width=128, height=64)
    assert [mask is None for mask in found] == [False, True, False, True]
    decoded = codec.decode([first, second]) > 0
    assert (found[0][:, :64] == decoded[0]).all() and not found[0][:, 64:].any()
    assert (found[2][:, 64:] == decoded[1]).all() and not found[2][:, :64].any()


def test_files_that_are_no_weights(tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    path = tmp_path / "vae-oid.npz"
    with pytest.raises(UserError, match=re.escape(f"{path}: no such file")):
        MaskCodec.load(path)
    path.write_bytes(b"PK\x03\x04 torn")
    with pytest.raises(UserError, match=f"{path}: not an npz file") as refused:
        MaskCodec.load(path)
    assert "gs://big_vision/paligemma/vae-oid.npz" in str(refused.value)
    np.save(tmp_path / "one.npy", np.zeros(3))
    with pytest.raises(UserError, match=r"one\.npy: not an npz file"):
        MaskCodec.load(tmp_path / "one.npy")
    for strange in (np.array([{}]), np.array(["text"])):
        np.savez(path, **{**arrays, "decoder.0.bias": strange})
        with pytest.raises(UserError, match="not an npz file"):
            MaskCodec.load(path)


def test_missing_and_misshapen_arrays_are_listed(tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    path = tmp_path / "vae-oid.npz"
    wrong = {name: array for name, array in arrays.items() if name != "decoder.8.bias"}
    wrong["decoder.2.net.0.weight"] = np.zeros((128, 128, 1, 1), dtype=np.float32)
    wrong["encoder.2.weight"] = np.zeros((32, 16, 3, 3), dtype=np.float32)
    np.savez(path, **wrong)
    with pytest.raises(UserError) as refused:
        MaskCodec.load(path)
    lines = str(refused.value).splitlines()
    assert lines[0] == f"{path}: 3 arrays do not fit:"
    assert "decoder.2.net.0.weight: needed is (128, 128, 3, 3), found (128, 128, 1, 1)" in lines
    assert "decoder.8.bias: needed is (32,), found none" in lines
    assert "encoder.2.weight: needed is (32, 16, 4, 4), found (32, 16, 3, 3)" in lines
    np.savez(path, **{**arrays, "_vq_vae._embedding": np.zeros((64, 24))})
    with pytest.raises(UserError, match=re.escape("_vq_vae._embedding: needed is (128, width), found (64, 24)")):
        MaskCodec.load(path)
    np.savez(path, something=np.zeros(3))
    with pytest.raises(UserError, match=re.escape("_vq_vae._embedding: needed is (128, width), found none")):
        MaskCodec.load(path)


BOUNDED = """
import resource, sys
from pathlib import Path
from ftlib.errors import UserError
from ftlib.models.mask_codec import MaskCodec
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (250 << 20), -1))
try:
    MaskCodec.load(Path(sys.argv[1]))
except UserError as error:
    sys.exit(error.problem)
"""


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("decoder.0.weight", "decoder.0.weight: needed is"),
        ("_vq_vae._embedding", "needed is (128, width)"),
        ("header", "version 1.0"),
        ("unused", ""),
        ("rest", ""),
    ],
)
def test_small_files_that_hold_gigabytes(tmp_path: Path, arrays: dict[str, np.ndarray], name: str, told: str) -> None:
    """Zeros, compressed to some megabytes, were read into half a gigabyte."""
    path, size = tmp_path / "vae-oid.npz", 1 << 29
    changed = {"header": "decoder.0.bias", "rest": "decoder.0.bias"}.get(name, name)
    np.savez_compressed(path, **{each: array for each, array in arrays.items() if each != changed})
    with (
        zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open(f"{changed}.npy", "w") as file,
    ):
        if name == "header":
            file.write(b"\x93NUMPY\x02\x00" + struct.pack("<I", size))
        elif name == "rest":
            np.save(file, arrays[changed])
        else:
            shape = (128, size // 512) if name == "_vq_vae._embedding" else (size // 4,)
            npy.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
        for _ in range(size >> 24):
            file.write(bytes(1 << 24))
    assert path.stat().st_size < 12_000_000
    run = subprocess.run([sys.executable, "-c", BOUNDED, path], capture_output=True, text=True, check=False)
    assert (run.returncode, told in run.stderr) == (int(bool(told)), True), run.stderr
    assert "Traceback" not in run.stderr
