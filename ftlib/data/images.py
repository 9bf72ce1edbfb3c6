"""Open images safely: inside the data folder, decodable, of sane size, upright, in RGB."""

from __future__ import annotations

import posixpath
import struct
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftlib import files
from ftlib.errors import UserError
from ftlib.out_of_memory import is_out_of_memory

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_PIXELS = 100_000_000
MAX_BYTES = 200_000_000
_PHOTOMETRIC = 262
"""TIFF's tag that says whether 0 is white."""


def image_path(root: Path, name: str) -> Path:
    """Where an image of a dataset lies.

    Raises:
        UserError: the name leads out of the data folder.
    """
    normal = posixpath.normpath(name)
    if posixpath.isabs(normal) or normal == ".." or normal.startswith("../"):
        raise UserError(f"image {name!r} leads out of the data folder {root}", "Use paths below data.root.")
    return root / normal


@dataclass(frozen=True)
class ImageFacts:
    """What is known of an image file once it has been decoded.

    Attributes:
        digest: SHA-256 of its bytes.
        frames: 1 for a still picture.
        size: (width, height) in pixels, upright.
        kind: its format and mode, such as `JPEG RGB`.
        one_color: whether all pixels are alike once it is decoded.
    """

    digest: str
    frames: int
    size: tuple[int, int]
    kind: str
    one_color: bool


def inspect_image(path: Path) -> ImageFacts:
    """Decode an image file once.

    Raises:
        UserError: as `open_image`.
    """
    from PIL import Image

    upright = open_image(path)
    one_color = all(low == high for low, high in upright.getextrema())  # type: ignore[misc]
    with Image.open(path) as image:
        frames, kind = getattr(image, "n_frames", 1), f"{image.format} {image.mode}"
    return ImageFacts(files.sha256(path), frames, upright.size, kind, one_color)


def choose_frames(frames: int, rule: str) -> list[int]:
    """Which frames of an animated picture become rows; a still picture has its one.

    Args:
        rule: first, middle, last, all, or exclude.
    """
    if frames == 1:
        return [0]
    return {"first": [0], "middle": [frames // 2], "last": [frames - 1], "all": list(range(frames))}.get(rule, [])


def frame_of(path: Path, rule: str) -> int:
    """Which frame a question shows that names only the file: the first of those that rows would be made of."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            frames = getattr(image, "n_frames", 1)
    except (OSError, SyntaxError, ValueError, struct.error, zlib.error, Image.DecompressionBombError):
        return 0  # what is wrong is told when it is decoded
    return next(iter(choose_frames(frames, rule)), 0)


def open_image(path: Path, frame: int = 0) -> Image:
    """Decode an image as upright RGB; transparent parts become white.

    Raises:
        UserError: missing, too large, not an image, truncated, no such frame, or numbers whose range is not known.
    """
    from PIL import Image

    try:
        if path.stat().st_size > MAX_BYTES:
            raise UserError(f"{path}: {path.stat().st_size:,} bytes; at most {MAX_BYTES:,} are read")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise UserError(f"{path}: {image.width} × {image.height} pixels; at most {MAX_PIXELS:,} are read")
                if frame:
                    image.seek(frame)
                return _rgb(path, image)
    except EOFError:
        raise UserError(f"{path}: no frame {frame} in it") from None
    except FileNotFoundError:
        raise UserError(f"{path}: no such image") from None
    except Image.DecompressionBombError:
        raise UserError(f"{path}: too many pixels (a decompression bomb?); at most {MAX_PIXELS:,} are read") from None
    except Image.UnidentifiedImageError:
        raise UserError(f"{path}: not an image that can be read") from None
    except (OSError, SyntaxError, ValueError, struct.error, zlib.error) as error:
        if is_out_of_memory(error):
            raise
        raise UserError(f"{path}: truncated or damaged image: {error}") from None


def _rgb(path: Path, image: Image) -> Image:
    """Grey of more than 8 bits is scaled, not clipped; what shines through is put on white, as a browser shows it."""
    from PIL import Image as images
    from PIL import ImageOps

    opened: Any = image  # by a plugin; what it knows of the file goes with the first change
    wide_colors = any(";16" in str(tile[3]) for tile in opened.tile)
    white = 65535 if image.mode.startswith("I;16") or image.format in ("PNG", "PPM") else None
    negative = image.format == "TIFF" and opened.tag_v2.get(_PHOTOMETRIC) == 0
    image = ImageOps.exif_transpose(image)
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
    return image.convert("RGB")


def _grey(path: Path, image: Image, white: float | None, negative: bool) -> Image:
    """Integers of more than 8 bits and floating-point numbers as 8 bits; the range is the kind's, not the picture's.

    Args:
        white: the highest value of its kind; None if there is none by which pictures are made.
        negative: whether 0 is white.

    Raises:
        UserError: a kind without a range, values out of it or that are no numbers, or almost all of the range unused.
    """
    import numpy as np
    from PIL import Image as images

    values = np.asarray(image)
    if white is None:
        problem = f"{path}: integers of 32 bits, or with a sign, have no value that is known to be white"
        raise UserError(problem, "Convert the image to 8 or 16 bits without a sign.")
    if not np.isfinite(values).all():
        raise UserError(f"{path}: some of its pixels are no numbers (NaN or infinite)")
    low, high = values.min(), values.max()
    if low < 0 or high > white:
        problem = f"{path}: floating-point values from {low:g} to {high:g}; only 0 (black) to 1 (white) are read"
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
    """Refuse 12 bits (or fewer) in a file of 16: they would be nearly black.

    Raises:
        UserError: all values lie in the lowest sixteenth of the range, and are not all the same.
    """
    if low < high and (high + 1) * 16 <= white + 1:
        problem = f"{path}: a 16-bit image of at most 12 bits: all its values lie in the darkest sixteenth of the range"
        raise UserError(problem, "Convert the image to 8 bits, or scale its values to 16.")
