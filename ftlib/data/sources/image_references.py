"""References of images in rows: paths, and `data:` URIs, whose bytes are written below the dataset's folder."""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import posixpath
import tempfile
from pathlib import Path
from urllib.parse import unquote_to_bytes

from ftlib.config.schema import Data
from ftlib.core import files

EMBEDDED = ".images/embedded"
"""Folder below `data.root` for images of `data:` URIs; a file is named by its SHA-256."""


class ImageLocator:
    """Turns the references of a dataset's images into paths relative to its root."""

    def __init__(self, data: Data) -> None:
        self._root = Path(data.root)

    def __call__(self, reference: str) -> str:
        """Return the path of an image.

        Raises:
            ValueError: the reference cannot be used.
            UserError: a `data:` URI, and the dataset's folder cannot be written.
        """
        scheme = reference.partition(":")[0].lower() if ":" in reference[:9] else ""
        if scheme == "data":
            return self._embedded(_content_of_uri(reference))
        if scheme in ("http", "https"):
            raise ValueError("an image is a URL; download the images and write their paths")
        if scheme == "file":
            return posixpath.normpath(unquote_to_bytes(reference.partition("//")[2]).decode(errors="replace"))
        return posixpath.normpath(reference)

    def _embedded(self, content: bytes) -> str:
        """Write an image unless it is there already; several processes may read the same rows."""
        name = f"{EMBEDDED}/{hashlib.sha256(content).hexdigest()}"
        target = self._root / name
        if not target.is_file() or target.stat().st_size != len(content):
            with files.storage_errors(target):
                target.parent.mkdir(parents=True, exist_ok=True)
                number, temporary = tempfile.mkstemp(dir=target.parent, prefix=files.TEMPORARY_PREFIX)
                with os.fdopen(number, "wb") as file:
                    file.write(content)
                    os.fchmod(file.fileno(), target.parent.stat().st_mode & 0o666)
                Path(temporary).replace(target)
        return name


def is_extracted(name: str) -> bool:
    """Whether an image's path is below the folder that ftlib writes."""
    return name.startswith(".images/")


def _content_of_uri(uri: str) -> bytes:
    """Return the bytes of a `data:` URI (RFC 2397).

    Raises:
        ValueError: it is no image, or is malformed.
    """
    header, comma, body = uri.partition(",")
    kind, *options = header[len("data:") :].lower().split(";")
    if not comma or not kind.startswith("image/"):
        raise ValueError(f"a data: URI must hold an image, got {header[:40]!r}")
    if "base64" not in options:
        return unquote_to_bytes(body)
    try:
        return base64.b64decode("".join(body.split()), validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("the base64 of a data: URI is malformed") from None
