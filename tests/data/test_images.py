"""Images of more than 8 bits are scaled by their kind's range or refused; nothing becomes black silently."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from PIL.TiffImagePlugin import AppendingTiffWriter

from ftlib.data import images
from ftlib.data.images import default_frame, inspect_image, open_image, open_query_image
from ftlib.errors import UserError
from tests.conftest import REPOSITORY
from tests.data.sources.releases import data

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
        with pytest.raises(UserError, match="not an image of a supported format"):  # Pillow knows it not
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
        (np.where(RAMP > 0.5, np.nan, RAMP).astype("<f4"), "NaN or infinite"),
        (np.where(RAMP > 0.5, np.inf, RAMP).astype("<f4"), "NaN or infinite"),
        (EIGHT.astype("<i4"), "32-bit or signed integers"),
        ((RAMP * (2**31 - 1)).astype("<i4"), "32-bit or signed integers"),
        ((RAMP * (2**32 - 1)).astype("<u4"), "32-bit or signed integers"),
        ((EIGHT * 128).astype("<i2"), "32-bit or signed integers"),
        ((EIGHT * 16).astype("<u2"), "16-bit image with at most 12 bits"),
        ((EIGHT * 16).astype(">u2"), "16-bit image with at most 12 bits"),
        (EIGHT.astype("<u2"), "16-bit image with at most 12 bits"),
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
        assert "images of one color: 6 (all pixels are equal): 00.png, 05.png, 10.png, 15.png, 2" in error
    code, output, _ = ftlib("prepare", config, *overrides, "--check")
    assert code == 0 and "6: 00.png, 05.png" in output


def test_a_question_shows_the_frame_that_rows_would(tmp_path: Path) -> None:
    frames = [Image.new("P", (4, 4), number) for number in range(3)]
    for number, frame in enumerate(frames):
        frame.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
        frame.putpixel((0, 0), (number + 1) % 3)
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    rules = [data(tmp_path, frames=rule) for rule in ("first", "middle", "last", "all", "exclude")]
    found = {section.frames: default_frame(tmp_path / "x.gif", section) for section in rules}
    assert found == {"first": 0, "middle": 1, "last": 2, "all": 0, "exclude": 0}
    assert default_frame(tmp_path / "none.gif", rules[2]) == 0
    assert open_query_image(tmp_path / "x.gif", rules[2]).getpixel((0, 0)) == (0, 0, 0)


def test_only_what_moves_has_frames(tmp_path: Path) -> None:
    """A phone's photograph holds a depth map or a preview, a scanner's TIFF pages, a map's TIFF smaller copies."""
    photo, other = Image.effect_noise((32, 24), 50).convert("RGB"), Image.new("RGB", (16, 12), "grey")
    photo.copy().save(tmp_path / "photo.mpo", save_all=True, append_images=[other.copy()])
    (tmp_path / "photo.mpo").rename(tmp_path / "photo.jpg")
    photo.save(tmp_path / "pages.tif", save_all=True, append_images=[other, other])
    with AppendingTiffWriter(str(tmp_path / "map.tif"), True) as file:
        for image, kind in ((photo, 0), (other, 2), (other, 1), (other, 2)):
            image.save(file, format="TIFF", tiffinfo={254: kind})
            file.newFrame()
    for name in ("moving.gif", "moving.png", "moving.webp"):
        photo.save(tmp_path / name, save_all=True, append_images=[other.resize((32, 24))])
    (tmp_path / "layers.psd").write_bytes(flat_psd())
    found = {path.name: inspect_image(path).frames for path in tmp_path.iterdir()}
    moving = {"moving.gif": 2, "moving.png": 2, "moving.webp": 2}
    assert found == {"photo.jpg": 1, "pages.tif": 3, "map.tif": 2, "layers.psd": 1, **moving}
    with Image.open(tmp_path / "photo.jpg") as image:
        assert (image.format, getattr(image, "n_frames", 1)) == ("MPO", 2), "Pillow counts what is no frame"
    assert default_frame(tmp_path / "photo.jpg", data(tmp_path, frames="middle")) == 0
    assert open_query_image(tmp_path / "photo.jpg", data(tmp_path, frames="last")).size == (32, 24)
    assert inspect_image(tmp_path / "photo.jpg").kind == "MPO RGB"


def flat_psd() -> bytes:
    """A PSD of one grey pixel without layers."""
    header = b"8BPS" + struct.pack(">H6xHIIHH", 1, 1, 1, 1, 8, 1)
    return header + struct.pack(">III", 0, 0, 0) + b"\0\0" + b"\x80"


def test_a_damaged_second_page_is_told(tmp_path: Path) -> None:
    pages = [Image.effect_noise((32, 24), 50) for _ in range(2)]
    pages[0].save(tmp_path / "x.tif", save_all=True, append_images=pages[1:])
    content = (tmp_path / "x.tif").read_bytes()
    for cut in range(len(content) - 40, len(content), 3):
        (tmp_path / "x.tif").write_bytes(content[:cut])
        try:
            assert inspect_image(tmp_path / "x.tif").size == (32, 24)
        except UserError as error:
            assert "x.tif: " in error.problem


def test_names_that_differ_in_case_or_unicode_form_are_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def told(name: str) -> str:
        with pytest.raises(UserError) as raised:
            open_image(tmp_path / name)
        return raised.value.problem.partition("no such image")[2]

    folder = tmp_path / "Images"
    folder.mkdir()
    for name in ("Cat.JPG", "caf\u00e9.png"):
        (folder / name).write_bytes(b"")
    assert told("Images/cat.jpg") == f"; {folder} contains 'Cat.JPG', which differs in upper and lower case"
    assert told("images/Cat.JPG") == f"; {tmp_path} contains 'Images', which differs in upper and lower case"
    form = "in its Unicode form (composed or decomposed accents)"
    assert told("Images/cafe\u0301.png") == f"; {folder} contains 'caf\u00e9.png', which differs {form}"
    assert told("Images\\Cat.JPG") == "; use / between folders, not \\"
    assert told("Images/dog.jpg") == told("elsewhere/cat.jpg") == told("Images/Cat.JPG/x") == ""
    listed: list[Any] = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: (listed.append(path), scandir(path))[1])
    for number in range(1000):
        told(f"Images/{number}.jpg")
    assert len(listed) <= 1, "a folder is listed once, however many of its images are missing"
    (folder / "dog.JPG").write_bytes(b"")
    assert "'dog.JPG'" in told("Images/dog.jpg"), "unless it has changed"


def smooth(width: int, height: int) -> Image.Image:
    """Red grows to the right, green downwards."""
    red = Image.linear_gradient("L").rotate(90).resize((width, height))
    green = Image.linear_gradient("L").resize((width, height))
    return Image.merge("RGB", [red, green, Image.new("L", (width, height))])


@pytest.mark.parametrize("form", ["JPEG", "MPO", "PNG", "TIFF", "WEBP", "GIF"])
@pytest.mark.parametrize("turn", [1, 6])
def test_large_images_are_made_smaller_when_they_are_opened(tmp_path: Path, form: str, turn: int) -> None:
    exif = Image.Exif()
    exif[274] = turn
    path = tmp_path / "x"
    smooth(1600, 400).save(path, format=form, **({} if form == "GIF" else {"exif": exif}))
    shape = (1600, 400) if turn == 1 or form == "GIF" else (400, 1600)
    full, small = open_image(path), open_image(path, max_pixels=10_000)
    assert full.size == shape == inspect_image(path).size == inspect_image(path, 10_000).size, "the file's own size"
    assert small.size == (shape[0] // 8, shape[1] // 8) and small.width * small.height <= 10_000
    expected = full.resize(small.size, Image.Resampling.LANCZOS)
    assert np.abs(np.asarray(small).astype(int) - np.asarray(expected)).max() <= 6
    assert open_image(path, max_pixels=640_000).tobytes() == full.tobytes(), "it is no larger"
    assert open_image(path, max_pixels=10_000).tobytes() == small.tobytes()
    assert open_image(path, max_pixels=1).size == (1, 1)


def test_images_beyond_the_limit_are_read_if_they_are_made_smaller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pillow's own limit, too, which lies between."""
    monkeypatch.setattr(images, "MAX_PIXELS", 90_000)
    monkeypatch.setattr(images, "MAX_PIXELS_SHRUNK", 500_000)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100_000)
    for size, told in (((400, 300), "400 × 300 pixels; the limit is 90,000"), ((800, 500), "too many pixels")):
        Image.effect_noise(size, 50).save(tmp_path / "x.png")
        with pytest.raises(UserError, match=told) as raised:
            open_image(tmp_path / "x.png")
        assert "data.max_pixels" in raised.value.remedy
        assert inspect_image(tmp_path / "x.png", 5_000).size == size
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100_000)
    Image.effect_noise((800, 700), 50).save(tmp_path / "x.png")
    with pytest.raises(UserError, match="the limit is 500,000"):
        open_image(tmp_path / "x.png", max_pixels=5_000)


def test_every_use_of_a_dataset_shows_the_same_smaller_images(
    tmp_path: Path,
    write_config: Callable[..., Path],
    ftlib: Callable[..., tuple[int, str, str]],
    store: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """prepare, train with validation, evaluate, prompts, predict: nothing sees the file's own size."""
    root = tmp_path / "pictures"
    root.mkdir()
    lines = []
    for number in range(30):
        Image.effect_noise((64, 48), 50).save(root / f"{number}.png")
        lines.append(f'{{"image": "{number}.png", "prefix": "what", "suffix": "{number % 2}"}}\n')
    (root / "data.jsonl").write_text("".join(lines))
    shown: list[tuple[int, int]] = []
    decoded = images._decode

    def noted(*arguments: Any, **named: Any) -> Any:
        found = decoded(*arguments, **named)
        shown.append(found[0].size)
        return found

    monkeypatch.setattr(images, "_decode", noted)
    settings = ["data.source=jsonl", f"data.root={root}", "data.file=data.jsonl", "data.max_pixels=300"]
    settings += ["training.dataloader_num_workers=0", "evaluation.loss=true", "evaluation.splits=[valid]"]
    config = write_config()
    for command in (["prepare"], ["train"], ["evaluate"], ["prompts"]):
        shown.clear()
        more = ["--prompt", "{prefix}?"] if command == ["prompts"] else []
        code, _, error = ftlib(*command, config, *settings, *more)
        assert code == 0, error
        assert shown and set(shown) == {(20, 15)}, command
    (run,) = [path.parent for path in store.parent.rglob("DONE")]
    shown.clear()
    code, _, error = ftlib("predict", run, "--prompt", "what", "--image", root / "0.png", "--draw", tmp_path / "x.png")
    assert code == 0, error
    assert len(shown) == 2 and set(shown) == {(20, 15)}


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n0 0 8 8 rectfill\nshowpage\n%%EOF\n"


def test_no_program_is_started_for_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow gives EPS to Ghostscript."""
    program = tmp_path / "bin" / "gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch '{tmp_path}/started'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)  # looked for once in each process
    (tmp_path / "0.jpg").write_bytes(EPS)
    with pytest.raises(UserError, match=r"0\.jpg: EPS or PostScript is not supported.*; convert it to PNG or JPEG"):
        inspect_image(tmp_path / "0.jpg")
    assert default_frame(tmp_path / "0.jpg", data(tmp_path)) == 0
    assert not (tmp_path / "started").exists()
    with Image.open(tmp_path / "0.jpg") as image, contextlib.suppress(OSError):
        image.load()
    assert (tmp_path / "started").exists(), "the program would have been found"


@pytest.mark.parametrize(
    "start", [b"%PDF-1.7\n", b"\xd7\xcd\xc6\x9a" + bytes(60), b"\0\0\0\x18ftypheic", b"<svg></svg>"]
)
def test_other_formats_are_told(tmp_path: Path, start: bytes) -> None:
    (tmp_path / "x.png").write_bytes(start)
    with pytest.raises(UserError, match=r"x\.png: (PDF|WMF|HEIC or HEIF|SVG) is not supported"):
        open_image(tmp_path / "x.png")


@pytest.mark.parametrize("form", ["TGA", "ICO", "PCX", "QOI"])
def test_formats_that_pillow_alone_knows_are_refused(tmp_path: Path, form: str) -> None:
    Image.new("RGB", (16, 16)).save(tmp_path / "x.png", format=form)
    with pytest.raises(UserError, match=r"x\.png: (an icon|not an image of a supported format: .*PNG)"):
        open_image(tmp_path / "x.png")


@pytest.mark.parametrize("form", ["AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP"])
def test_formats_that_are_read(tmp_path: Path, form: str) -> None:
    Image.init()
    if form not in Image.SAVE:
        pytest.skip(f"this Pillow has no {form}")
    Image.new("RGB", (16, 8), "white").save(tmp_path / "x", format=form)
    assert open_image(tmp_path / "x").size == inspect_image(tmp_path / "x").size == (16, 8)


def test_there_is_one_place_that_opens_images() -> None:
    places = [
        f"{path.name}: {line.strip()}"
        for path in (REPOSITORY / "ftlib").rglob("*.py")
        for line in path.read_text().splitlines()
        if re.search(r"\b[Ii]mages?\.open\(|ImageFile\.Parser", line)
    ]
    assert len(places) == 1 and "formats=" in places[0], places


def test_an_image_with_two_labels_is_told(
    tmp_path: Path, write_config: Callable[..., Path], ftlib: Callable[..., tuple[int, str, str]], store: Path
) -> None:
    root = tmp_path / "pictures"
    root.mkdir()
    lines = []
    for number in range(20):
        Image.effect_noise((8, 8), 50).save(root / f"{number:02}.png")
        lines.append(f'{{"id": {number}, "image": "{number:02}.png", "prefix": "what", "suffix": "{number % 2}"}}\n')
    shutil.copy(root / "04.png", root / "copy.png")
    lines.append('{"id": 20, "image": "copy.png", "prefix": "what", "suffix": "1"}\n')
    lines.append('{"id": 21, "image": "05.png", "prefix": "what is to the left", "suffix": "0"}\n')
    (root / "data.jsonl").write_text("".join(lines))
    overrides = ["data.source=jsonl", f"data.root={root}", "data.file=data.jsonl"]
    code, _, error = ftlib("prepare", write_config(), *overrides)
    assert code == 0, error
    assert "labels: 1 image has several labels: 20 is '1', and '0' in another row" in error


def test_an_upright_image_is_copied_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exif = Image.Exif()
    exif[274], exif[0x010F] = 1, "a camera"
    smooth(64, 48).convert("RGB").save(tmp_path / "x.jpg", exif=exif, comment="by someone")
    with Image.open(tmp_path / "x.jpg") as image:
        expected = np.asarray(image)

    copies, copy = [], Image.Image.copy
    monkeypatch.setattr(Image.Image, "copy", lambda image: [copies.append(image), copy(image)][1])
    found = open_image(tmp_path / "x.jpg")
    assert len(copies) == 1, "without comments and color profile"
    assert np.array_equal(np.asarray(found), expected)
    assert type(found) is Image.Image and found.info == {} and not found.getexif()
