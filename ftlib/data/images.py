"""Open images safely: inside the data folder, with a limited size, rotated upright, converted to RGB, downscaled."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import math
import os
import posixpath
import struct
import warnings
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftlib.config.schema import Data
from ftlib.core import files
from ftlib.core.out_of_memory import is_out_of_memory
from ftlib.core.text import normalize
from ftlib.data.example import Example
from ftlib.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

    from ftlib.data.near_duplicates import PerceptualHash

MAX_PIXELS = 100_000_000
MAX_BYTES = 200_000_000
MAX_PIXELS_SHRUNK = 1_000_000_000
MAX_BYTES_SHRUNK = 4_000_000_000
"""Limit for images that are downscaled: 3 GB decoded."""

_SHRINK = "Set data.max_pixels: 4000000 (for example) to downscale larger images when they are opened."
_MAX_NAMES = 200_000
_ORIENTATION = 274
_TURNED = (5, 6, 7, 8)
"""EXIF's orientation tag, and its values that swap width and height."""
_UPRIGHT = 1

_PHOTOMETRIC = 262
"""TIFF's photometric tag: whether 0 is white."""

_SUBFILE = 254
_PAGE = (0, 2)
"""TIFF's tag for the type of a page, and its values for regular pages; others are thumbnails and masks."""

FORMATS = ("AVIF", "BMP", "FLI", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "PSD", "TIFF", "WEBP")
"""Formats that are opened, by Pillow's names; JPEG includes MPO. Pillow supports more, but would run Ghostscript on EPS
files with any file name."""

_UNREAD = {
    "EPS or PostScript": (0, b"%!PS"),
    "EPS": (0, b"\xc5\xd0\xd3\xc6"),
    "PDF": (0, b"%PDF"),
    "WMF": (0, b"\xd7\xcd\xc6\x9a"),
    "EMF": (40, b" EMF"),
    "HEIC or HEIF": (4, b"ftyphei"),
    "HEIF": (4, b"ftypmif1"),
    "SVG": (0, b"<svg"),
    "an icon (ICO)": (0, b"\0\0\1\0"),
}
"""Signatures of unsupported formats: (offset, bytes)."""

_ANIMATED = ("AVIF", "FLI", "GIF", "PNG", "WEBP")
"""Formats with animation frames. A phone's MPO holds a depth map or a preview, PSD its layers. TIFF pages count as
frames, too."""


def image_path(root: Path, name: str) -> Path:
    """Return the path of an image of a dataset.

    Raises:
        UserError: the path is outside the data folder.
    """
    normal = posixpath.normpath(name)
    if posixpath.isabs(normal) or normal == ".." or normal.startswith("../"):
        raise UserError(f"image {name!r} is outside the data folder {root}", "Use paths below data.root.")
    return root / normal


@dataclass(frozen=True)
class ImageInfo:
    """Properties of a decoded image file.

    Attributes:
        digest: SHA-256 of its bytes.
        frames: 1 for a still image, see `count_frames`.
        size: (width, height) in pixels, upright.
        kind: format and mode, such as `JPEG RGB`.
        one_color: whether all decoded pixels are equal.
        perceptual_hash: see `near_duplicates`.
    """

    digest: str
    frames: int
    size: tuple[int, int]
    kind: str
    one_color: bool
    perceptual_hash: PerceptualHash


def inspect_image(path: Path, max_pixels: int | None = None) -> ImageInfo:
    """Decode an image file once.

    Args:
        max_pixels: see `open_image`; the returned size is the file's.

    Raises:
        UserError: as `open_image`.
    """
    from ftlib.data.near_duplicates import perceptual_hash  # needs numpy, which reports do not

    upright, size = _decode(path, 0, "", max_pixels)
    one_color = all(low == high for low, high in upright.getextrema())  # type: ignore[misc]
    with _opened(path, max_pixels) as image:
        frames, kind = count_frames(image), f"{image.format} {image.mode}"
    return ImageInfo(files.file_sha256(path), frames, size, kind, one_color, perceptual_hash(upright))


def image_size(path: Path, max_pixels: int | None = None) -> tuple[int, int]:
    """(width, height) of the image that `open_image` returns, from the file's header.

    Raises:
        UserError: it cannot be read.
    """
    with _opened(path, max_pixels) as image:
        width, height = image.size
        if image.getexif().get(_ORIENTATION, 1) in _TURNED:
            width, height = height, width
    return _reduced_size((width, height), max_pixels) or (width, height)


def count_frames(image: Image) -> int:
    """Return the number of animation frames; 1 for a still image.

    For a TIFF, the number of pages before the first thumbnail or mask.
    """
    opened: Any = image
    if image.format in _ANIMATED:
        return int(getattr(opened, "n_frames", 1))
    if image.format != "TIFF":
        return 1
    here, pages = image.tell(), 1
    while pages < opened.n_frames:
        image.seek(pages)
        if opened.tag_v2.get(_SUBFILE, 0) not in _PAGE:
            break
        pages += 1
    image.seek(here)
    return pages


def choose_frames(frames: int, rule: str) -> list[int]:
    """Return the frames of an animated image that become rows; [0] for a still image.

    Args:
        rule: first, middle, last, all, or exclude.
    """
    if frames == 1:
        return [0]
    return {"first": [0], "middle": [frames // 2], "last": [frames - 1], "all": list(range(frames))}.get(rule, [])


def default_frame(path: Path, data: Data) -> int:
    """Return the frame for a query that gives only the file: the first frame that would become a row."""
    try:
        with _opened(path, data.max_pixels) as image:
            frames = count_frames(image)
    except UserError:
        return 0  # decoding will report the error
    return next(iter(choose_frames(frames, data.frames)), 0)


ReadFile = Callable[[Path], bytes]


def open_row_images(
    root: Path, row: Example, max_pixels: int | None, read: ReadFile = Path.read_bytes
) -> Image | list[Image] | None:
    """Open the images of a row: one, a list of several, or None.

    Args:
        read: returns the content of a file.

    Raises:
        UserError: as `open_image`.
    """
    found = [
        open_image(image_path(root, name), frame, digest, max_pixels, read) for name, frame, digest in row.image_files
    ]
    return found if len(found) > 1 else next(iter(found), None)


def open_query_image(path: Path, data: Data) -> Image:
    """Open the image of a query that gives only the file, as a row of the dataset would.

    Raises:
        UserError: as `open_image`.
    """
    return open_image(path, default_frame(path, data), max_pixels=data.max_pixels)


_ROWS_AHEAD = 8
_MAX_BYTES_AHEAD = 1 << 25


@contextlib.contextmanager
def read_ahead(root: Path, rows: Sequence[Example]) -> Iterator[ReadFile]:
    """Context with a function that reads the files of rows in their order; threads read the files of the next rows.

    So the rows of a batch wait for a network file system at the same time instead of one after the other.
    """
    verified = [file for row in rows for file in row.image_files if file[2]]
    paths = list(dict.fromkeys(image_path(root, name) for name, *_ in verified))
    pending = deque(paths)
    ahead: dict[Path, Future[bytes | None]] = {}

    def start_next() -> None:
        path = pending.popleft()
        ahead[path] = pool.submit(_read_small, path)

    def read(path: Path) -> bytes:
        content = ahead.pop(path).result() if path in ahead else None
        if pending:
            start_next()
        return path.read_bytes() if content is None else content

    if len(paths) < 2:
        yield Path.read_bytes
        return
    with ThreadPoolExecutor(_ROWS_AHEAD) as pool:
        for _ in range(min(_ROWS_AHEAD, len(paths))):
            start_next()
        yield read


def _read_small(path: Path) -> bytes | None:
    return path.read_bytes() if path.stat().st_size <= _MAX_BYTES_AHEAD else None


def open_image(
    path: Path, frame: int = 0, digest: str = "", max_pixels: int | None = None, read: ReadFile = Path.read_bytes
) -> Image:
    """Decode an image as upright RGB; transparent parts become white.

    Args:
        digest: the expected SHA-256 of the file; "" accepts any.
        max_pixels: larger images are downscaled to at most this many pixels.
        read: returns the content of the file, if there is a digest.

    Raises:
        UserError: the file is missing, too large, not an image or truncated, has no such frame, has pixel values of
            unknown range, or has another digest.
    """
    return _decode(path, frame, digest, max_pixels, read)[0]


def _decode(
    path: Path, frame: int, digest: str, max_pixels: int | None, read: ReadFile = Path.read_bytes
) -> tuple[Image, tuple[int, int]]:
    """Return the image as `open_image` does, and its full size, upright."""
    from PIL.Image import Resampling

    with _opened(path, max_pixels, digest, read) as image:
        if frame:
            try:
                image.seek(frame)
            except EOFError:
                raise UserError(f"{path}: has no frame {frame}") from None
        full = image.size
        if small := _reduced_size(full, max_pixels):
            image.draft(None, (2 * small[0], 2 * small[1]))  # JPEG: decoded at ½, ¼ or ⅛
        upright = _rgb(path, image)
        if image.getexif().get(_ORIENTATION, 1) in _TURNED:
            full = full[1], full[0]
        small = _reduced_size(full, max_pixels)
        return upright.resize(small, Resampling.LANCZOS) if small else upright, full


def _reduced_size(size: tuple[int, int], max_pixels: int | None) -> tuple[int, int] | None:
    """Return width and height scaled down to `max_pixels`; None if the image is small enough."""
    pixels = size[0] * size[1]
    if max_pixels is None or pixels <= max_pixels:
        return None
    width, height = (max(1, int(edge * math.sqrt(max_pixels / pixels))) for edge in size)
    return min(width, max_pixels), min(height, max_pixels)


@contextlib.contextmanager
def _opened(
    path: Path, max_pixels: int | None = None, digest: str = "", read: ReadFile = Path.read_bytes
) -> Iterator[Image]:
    """Open an image without decoding its pixels.

    Raises:
        UserError: as `open_image`, also for errors of the body.
    """
    from PIL import Image

    pixels, size = (MAX_PIXELS_SHRUNK, MAX_BYTES_SHRUNK) if max_pixels else (MAX_PIXELS, MAX_BYTES)
    if max_pixels:
        Image.MAX_IMAGE_PIXELS = MAX_PIXELS_SHRUNK // 2  # Pillow's limit is twice this value
    try:
        if path.stat().st_size > size:
            raise UserError(f"{path}: {path.stat().st_size:,} bytes; the limit is {size:,}")
        file: Path | BytesIO = path
        if digest:
            content = read(path)
            if hashlib.sha256(content).hexdigest() != digest:
                problem = f"{path}: the file has changed since the dataset was prepared"
                remedy = "Restore the old file; or run `ftlib prepare CONFIG --again`, and train under another name."
                raise UserError(problem, remedy)
            file = BytesIO(content)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            Image.init()
            with Image.open(file, formats=[name for name in FORMATS if name in Image.OPEN]) as image:
                if image.width * image.height > pixels:
                    problem = f"{path}: {image.width} × {image.height} pixels; the limit is {pixels:,}"
                    raise UserError(problem, "" if max_pixels else _SHRINK)
                yield image
    except FileNotFoundError:
        raise UserError(f"{path}: no such image{_similar_name(path)}") from None
    except Image.DecompressionBombError:
        problem = f"{path}: too many pixels (a decompression bomb?); the limit is {pixels:,}"
        raise UserError(problem, "" if max_pixels else _SHRINK) from None
    except Image.UnidentifiedImageError:
        raise UserError(f"{path}: {_unread_format(path)}") from None
    except (EOFError, OSError, SyntaxError, ValueError, struct.error, zlib.error) as error:
        if is_out_of_memory(error):
            raise
        raise UserError(f"{path}: truncated or damaged image: {error}") from None


def _unread_format(path: Path) -> str:
    """Return why a file cannot be opened, with its format if the signature is known."""
    with path.open("rb") as file:
        start = file.read(64)
    for name, (place, mark) in _UNREAD.items():
        if start[place:].startswith(mark):
            return f"{name} is not supported; convert it to PNG or JPEG"
    return f"not an image of a supported format: {', '.join(FORMATS)}"


def _similar_name(path: Path) -> str:
    """Return a hint if there is a file whose name differs only in case or Unicode form, else ""."""
    if "\\" in str(path):
        return "; use / between folders, not \\"
    for folder, name in zip(path.parents, (path.name, *(parent.name for parent in path.parents)), strict=False):
        try:
            changed = folder.stat().st_mtime_ns
        except OSError:
            continue
        found = _names_by_plain_form(folder, changed).get(_plain(name))
        if found is None or found == name:
            return ""
        same_case = normalize("NFC", found) == normalize("NFC", name)
        differs = "in its Unicode form (composed or decomposed accents)" if same_case else "in upper and lower case"
        return f"; {folder} contains {found!r}, which differs {differs}"
    return ""


@functools.lru_cache(maxsize=4)
def _names_by_plain_form(folder: Path, changed: int) -> dict[str, str]:
    """Return normalized name → name of the files of a folder (of the first ones if there are very many).

    Args:
        changed: modification time of the folder; part of the cache key.
    """
    try:
        with os.scandir(folder) as entries:
            return {_plain(entry.name): entry.name for entry in itertools.islice(entries, _MAX_NAMES)}
    except OSError:
        return {}


def _plain(name: str) -> str:
    return normalize("NFC", normalize("NFC", name).casefold())


def _rgb(path: Path, image: Image) -> Image:
    """Convert to RGB: grey of more than 8 bits is scaled, not clipped; transparent images get a white background."""
    from PIL import Image as images
    from PIL import ImageOps

    opened: Any = image  # a plugin's class; its attributes are lost with the first conversion
    wide_colors = any(";16" in str(tile[3]) for tile in opened.tile)
    white = 65535 if image.mode.startswith("I;16") or image.format in ("PNG", "PPM") else None
    negative = image.format == "TIFF" and opened.tag_v2.get(_PHOTOMETRIC) == 0
    image.load()  # of some formats, the orientation is behind the pixels
    if image.getexif().get(_ORIENTATION, _UPRIGHT) != _UPRIGHT:
        image = ImageOps.exif_transpose(image)  # would copy an upright image
    if image.mode == "F":
        image = _grey(path, image, 1.0, negative)
    elif image.mode.startswith("I"):
        image = _grey(path, image, white, negative)
    elif wide_colors:
        import numpy as np

        colors = np.asarray(image)[..., : len(image.getbands()) - ("A" in image.getbands())]
        _require_bright(path, int(colors.min()), int(colors.max()), 255)
    if image.has_transparency_data:
        opaque = images.new("RGBA", image.size, "white")
        opaque.alpha_composite(image.convert("RGBA"))
        image = opaque
    plain = image.convert("RGB")
    plain.info = {}  # saved copies must not contain the comments and color profile
    return plain


def _grey(path: Path, image: Image, white: float | None, negative: bool) -> Image:
    """Scale integers of more than 8 bits and floats to 8 bits, by the range of the data type, not of the image.

    Args:
        white: the highest value of the data type; None if its range is not defined.
        negative: whether 0 is white.

    Raises:
        UserError: the range is not defined, values are out of range or NaN, or almost all of the range is unused.
    """
    import numpy as np
    from PIL import Image as images

    values = np.asarray(image)
    if white is None:
        problem = f"{path}: 32-bit or signed integers have no defined white value"
        raise UserError(problem, "Convert the image to unsigned 8 or 16 bits.")
    if not np.isfinite(values).all():
        raise UserError(f"{path}: some pixels are NaN or infinite")
    low, high = values.min(), values.max()
    if low < 0 or high > white:
        problem = f"{path}: floating-point values from {low:g} to {high:g}; the range must be 0 (black) to 1 (white)"
        raise UserError(problem, "Convert the image to 8 bits.")
    if white == 1.0:
        levels = (values * 255 + 0.5).astype(np.uint8)
    else:
        _require_bright(path, int(low), int(high), int(white))
        levels = (values // 256).astype(np.uint8)
    if negative:
        levels = 255 - levels
    if "transparency" in image.info:
        levels[values == image.info["transparency"]] = 255
    return images.fromarray(levels)


def _require_bright(path: Path, low: int, high: int, white: int) -> None:
    """Reject data of 12 bits or fewer in a 16-bit file: the image would be nearly black.

    Raises:
        UserError: all values are in the lowest sixteenth of the range and not all equal.
    """
    if low < high and (high + 1) * 16 <= white + 1:
        problem = f"{path}: a 16-bit image with at most 12 bits: all values are in the darkest sixteenth of the range"
        raise UserError(problem, "Convert the image to 8 bits, or scale its values to 16.")
