"""Open images safely: inside the data folder, decodable, of sane size, upright, in RGB."""

from __future__ import annotations

import posixpath
import struct
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ftlib import files
from ftlib.errors import UserError
from ftlib.out_of_memory import is_out_of_memory

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_PIXELS = 100_000_000
MAX_BYTES = 200_000_000


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
    """

    digest: str
    frames: int
    size: tuple[int, int]
    kind: str


def inspect_image(path: Path) -> ImageFacts:
    """Decode an image file once.

    Raises:
        UserError: as `open_image`.
    """
    from PIL import Image

    upright = open_image(path)
    with Image.open(path) as image:
        return ImageFacts(
            files.sha256(path), getattr(image, "n_frames", 1), upright.size, f"{image.format} {image.mode}"
        )


def choose_frames(frames: int, rule: str) -> list[int]:
    """Which frames of an animated picture become rows; a still picture has its one.

    Args:
        rule: first, middle, last, all, or exclude.
    """
    if frames == 1:
        return [0]
    return {"first": [0], "middle": [frames // 2], "last": [frames - 1], "all": list(range(frames))}.get(rule, [])


def open_image(path: Path, frame: int = 0) -> Image:
    """Decode an image as upright RGB; transparent parts become white.

    Raises:
        UserError: missing, too large, not an image, truncated, or no such frame.
    """
    from PIL import Image, ImageOps

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
                return _rgb(ImageOps.exif_transpose(image))
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


def _rgb(image: Image) -> Image:
    """16-bit grey is scaled, not clipped; what shines through is put on white, as a browser shows it."""
    from PIL import Image as images

    if image.mode.startswith("I"):  # 16 bits, though Pillow may open them as 32
        image = image.convert("I").point(lambda value: value / 256).convert("L")
    if image.has_transparency_data:
        opaque = images.new("RGBA", image.size, "white")
        opaque.alpha_composite(image.convert("RGBA"))
        image = opaque
    return image.convert("RGB")
