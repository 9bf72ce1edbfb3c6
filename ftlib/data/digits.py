"""scikit-learn's 1,797 real handwritten digits as image files and JSONL: a dataset that needs no download.

Source: E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI, 1998; 8 × 8 grey values 0…16.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ftlib.data.examples import write_records
from ftlib.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

PIXELS = 64
PREFIX = "which digit is this?"


def real_digits() -> list[tuple[NDArray[np.uint8], str]]:
    """Every digit as 8 × 8 grey values 0…255, white on black, and its label.

    Raises:
        UserError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError(
            "the digits dataset comes with scikit-learn, which is not installed", "pip install 'ftlib[demo]'"
        ) from None
    digits = load_digits()
    pictures = (digits.images * (255 / 16)).round().astype("uint8")
    return [(picture, str(label)) for picture, label in zip(pictures, digits.target, strict=True)]


def make_digits(folder: Path) -> None:
    """Write `images/NNNN.png` (64 × 64, white on black) and `data.jsonl` into a folder.

    Raises:
        UserError: scikit-learn is not installed.
    """
    digits = real_digits()
    from PIL import Image

    (folder / "images").mkdir()
    records = []
    for number, (pixels, label) in enumerate(digits):
        name = f"images/{number:04d}.png"
        picture = Image.fromarray(pixels)
        picture.resize((PIXELS, PIXELS), Image.Resampling.NEAREST).save(folder / name)
        records.append({"id": f"{number:04d}", "image": name, "prefix": PREFIX, "suffix": label})
    write_records(folder / "data.jsonl", records)
