"""Images of more than 8 bits are scaled by their kind's range or refused; nothing becomes black silently."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from ftlib.data.images import frame_of, inspect_image, open_image
from ftlib.errors import UserError

RAMP = np.linspace(0, 1, 256).reshape(16, 16)
EIGHT = np.arange(256).reshape(16, 16)


def tiff(path: Path, values: NDArray[Any], zero_is_white: bool = False) -> None:
    """One channel, uncompressed, as Pillow itself would not write it."""
    kind = {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    order = ">" if values.dtype.byteorder == ">" else "<"
    height, width = values.shape
    tags = [(256, width), (257, height), (258, 8 * values.itemsize), (259, 1), (262, int(not zero_is_white)), (273, 0)]
    tags += [(277, 1), (278, height), (279, values.nbytes), (339, kind)]
    start = 8 + 2 + 12 * len(tags) + 4
    content = (b"II" if order == "<" else b"MM") + struct.pack(order + "HIH", 42, 8, len(tags))
    for tag, value in tags:
        content += struct.pack(order + "HHII", tag, 4, 1, start if tag == 273 else value)
    path.write_bytes(content + struct.pack(order + "I", 0) + values.tobytes())


def png(path: Path, values: NDArray[Any], color: int) -> None:
    """16 bits a channel; `color` is PNG's number: 2 is RGB, 4 grey and alpha, 6 RGBA."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    height, width = values.shape[:2]
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in values)
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, color, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b""))


def grey(path: Path) -> NDArray[Any]:
    red, green, blue = np.moveaxis(np.asarray(open_image(path)).astype(int), -1, 0)
    assert (red == green).all() and (red == blue).all()
    return red


@pytest.mark.parametrize(
    "values",
    [
        RAMP.astype("<f4"),
        RAMP.astype(">f4"),
        (EIGHT * 256).astype("<u2"),
        (EIGHT * 257).astype(">u2"),
        EIGHT.astype("<u1"),
    ],
    ids=["float", "float big-endian", "16 bits", "16 bits big-endian", "8 bits"],
)
@pytest.mark.parametrize("zero_is_white", [False, True])
def test_values_are_scaled_by_the_range_of_their_kind(
    tmp_path: Path, values: NDArray[Any], zero_is_white: bool
) -> None:
    tiff(tmp_path / "x.tif", values, zero_is_white)
    if zero_is_white and values.dtype == np.dtype(">u2"):
        with pytest.raises(UserError, match="not an image that can be read"):  # Pillow knows it not
            open_image(tmp_path / "x.tif")
        return
    assert (grey(tmp_path / "x.tif") == (255 - EIGHT if zero_is_white else EIGHT)).all()


def test_a_portable_float_map_and_graymaps(tmp_path: Path) -> None:
    (tmp_path / "x.pfm").write_bytes(b"Pf\n16 16\n-1.0\n" + RAMP[::-1].astype("<f4").tobytes())
    assert (grey(tmp_path / "x.pfm") == EIGHT).all()
    (tmp_path / "12.pgm").write_bytes(b"P5\n16 16\n4095\n" + (EIGHT * 16 + 8).astype(">u2").tobytes())
    assert np.abs(grey(tmp_path / "12.pgm") - EIGHT).max() <= 1, "the file says that 4,095 is white"


@pytest.mark.parametrize(
    ("values", "fault"),
    [
        ((RAMP * 255).astype("<f4"), "floating-point values from 0 to 255"),
        ((RAMP - 0.5).astype("<f4"), "floating-point values from -0.5 to 0.5"),
        (np.where(RAMP > 0.5, np.nan, RAMP).astype("<f4"), "no numbers"),
        (np.where(RAMP > 0.5, np.inf, RAMP).astype("<f4"), "no numbers"),
        (EIGHT.astype("<i4"), "integers of 32 bits, or with a sign"),
        ((RAMP * (2**31 - 1)).astype("<i4"), "integers of 32 bits, or with a sign"),
        ((RAMP * (2**32 - 1)).astype("<u4"), "integers of 32 bits, or with a sign"),
        ((EIGHT * 128).astype("<i2"), "integers of 32 bits, or with a sign"),
        ((EIGHT * 16).astype("<u2"), "16-bit image of at most 12 bits"),
        ((EIGHT * 16).astype(">u2"), "16-bit image of at most 12 bits"),
        (EIGHT.astype("<u2"), "16-bit image of at most 12 bits"),
    ],
)
def test_what_has_no_known_range_is_refused(tmp_path: Path, values: NDArray[Any], fault: str) -> None:
    tiff(tmp_path / "x.tif", values)
    with pytest.raises(UserError, match=fault) as raised:
        open_image(tmp_path / "x.tif")
    assert str(tmp_path / "x.tif") in str(raised.value)


@pytest.mark.parametrize(("color", "channels"), [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_twelve_bits_in_a_16_bit_png_are_refused_whatever_its_channels(
    tmp_path: Path, color: int, channels: int
) -> None:
    def write(levels: NDArray[Any]) -> Path:
        values = np.stack([levels] * channels, axis=-1)
        if color > 2:
            values[..., -1] = 65535
        png(tmp_path / "x.png", values, color)
        return tmp_path / "x.png"

    assert (grey(write(EIGHT * 257)) == EIGHT).all()
    assert (grey(write(np.where(EIGHT == 255, 4096, EIGHT))) >= 0).all(), "one value beyond 12 bits"
    with pytest.raises(UserError, match="at most 12 bits"):
        open_image(write(EIGHT * 16))
    assert (grey(write(EIGHT * 0)) == 0).all(), "black is black"


def test_a_transparent_value_of_16_bits_is_put_on_white(tmp_path: Path) -> None:
    Image.fromarray((EIGHT * 257).astype("u2")).save(tmp_path / "x.png", transparency=1285)
    assert (grey(tmp_path / "x.png") == np.where(EIGHT == 5, 255, EIGHT)).all()


def test_wide_images_are_turned_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray((EIGHT * 257).astype("u2")).save(tmp_path / "x.png", exif=exif)
    assert (grey(tmp_path / "x.png") == np.rot90(EIGHT, -1)).all()


def test_an_image_whose_pixels_are_all_alike_is_known(tmp_path: Path) -> None:
    noise = Image.effect_noise((4, 4), 50)
    hidden = Image.merge("RGBA", [noise, noise, noise, Image.new("L", (4, 4))])
    for name, image in {"plain": Image.new("RGB", (4, 4), "red"), "hidden": hidden, "drawn": noise}.items():
        image.save(tmp_path / f"{name}.png")
    alike = {path.stem for path in tmp_path.glob("*.png") if inspect_image(path).one_color}
    assert alike == {"plain", "hidden"}


def test_images_of_one_color_are_reported(
    tmp_path: Path, write_config: Callable[..., Path], ftlib: Callable[..., tuple[int, str, str]], store: Path
) -> None:
    root = tmp_path / "pictures"
    root.mkdir()
    lines = []
    for number in range(30):
        picture = Image.effect_noise((8, 8), 50) if number % 5 else Image.new("L", (8, 8), number)
        picture.save(root / f"{number:02}.png")
        lines.append(f'{{"image": "{number:02}.png", "prefix": "what", "suffix": "{number}"}}\n')
    (root / "data.jsonl").write_text("".join(lines))
    overrides = ["data.source=jsonl", f"data.root={root}", "data.file=data.jsonl"]
    config = write_config()
    for _ in range(2):  # made, and found again
        code, _, error = ftlib("prepare", config, *overrides)
        assert code == 0, error
        assert "images of one color: 6 (all pixels are alike once decoded): 00.png, 05.png, 10.png, 15.png, 2" in error
    code, output, _ = ftlib("prepare", config, *overrides, "--check")
    assert code == 0 and "6: 00.png, 05.png" in output


def test_a_question_shows_the_frame_that_rows_would(tmp_path: Path) -> None:
    frames = [Image.new("P", (4, 4), number) for number in range(3)]
    for number, frame in enumerate(frames):
        frame.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
        frame.putpixel((0, 0), (number + 1) % 3)
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    found = {rule: frame_of(tmp_path / "x.gif", rule) for rule in ("first", "middle", "last", "all", "exclude")}
    assert found == {"first": 0, "middle": 1, "last": 2, "all": 0, "exclude": 0}
    assert frame_of(tmp_path / "none.gif", "last") == 0
