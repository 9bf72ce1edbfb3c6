"""Open images safely: inside the data folder, decodable, of sane size, upright, in RGB."""

from __future__ import annotations

import posixpath
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from ftlib.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_PIXELS = 100_000_000


def image_path(root: Path, name: str) -> Path:
    """Where an image of a dataset lies.

    Raises:
        UserError: the name leads out of the data folder.
    """
    normal = posixpath.normpath(name)
    if posixpath.isabs(normal) or normal == ".." or normal.startswith("../"):
        raise UserError(f"image {name!r} leads out of the data folder {root}", "Use paths below data.root.")
    return root / normal


def open_image(path: Path) -> Image:
    """Decode an image as upright RGB.

    Raises:
        UserError: missing, not an image, truncated, or more than `MAX_PIXELS` pixels.
    """
    from PIL import Image, ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise UserError(f"{path}: {image.width} × {image.height} pixels; at most {MAX_PIXELS:,} are read")
                return ImageOps.exif_transpose(image).convert("RGB")
    except FileNotFoundError:
        raise UserError(f"{path}: no such image") from None
    except Image.DecompressionBombError:
        raise UserError(f"{path}: too many pixels (a decompression bomb?); at most {MAX_PIXELS:,} are read") from None
    except Image.UnidentifiedImageError:
        raise UserError(f"{path}: not an image that can be read") from None
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{path}: truncated or damaged image: {error}") from None
