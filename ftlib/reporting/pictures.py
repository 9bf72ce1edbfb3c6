"""Image files as elements that carry their own bytes: a small file as it is, a large one shrunk by Pillow, and a
placeholder that says why where there is no picture to show."""

from __future__ import annotations

import base64
import io
from pathlib import Path

from ftlib.data.images import image_path, open_image
from ftlib.errors import UserError
from ftlib.reporting.html import Node, tag

EMBED_BYTES = 32 * 1024
SHRUNK_PIXELS = 320
_SIGNATURES = {
    b"\x89PNG\r\n\x1a\n": "image/png",
    b"\xff\xd8\xff": "image/jpeg",
    b"GIF8": "image/gif",
    b"BM": "image/bmp",
}


def picture(root: Path, name: str, over: Node | None = None) -> Node:
    """The image `name` of the dataset in `root`, with a drawing laid over it, or a placeholder."""
    try:
        mime, content = _load(image_path(root, name))
    except FileNotFoundError:
        return _placeholder(f"{name}: this image file is missing")
    except (UserError, OSError) as error:
        return _placeholder(f"left out: {error}")
    except ImportError:
        reason = f"{name}: left out, since the file is large and Pillow, which would shrink it, is not installed"
        return _placeholder(reason)
    source = f"data:{mime};base64,{base64.b64encode(content).decode()}"
    image = tag("img", src=source, alt=name)
    return tag("div", tag("div", image, over, class_="laid") if over else image, class_="picture")


def _load(path: Path) -> tuple[str, bytes]:
    """MIME type and bytes of what to show.

    Raises:
        FileNotFoundError, OSError: as the file system says.
        ImportError: Pillow would be needed.
        UserError: no image that can be read.
    """
    if path.stat().st_size <= EMBED_BYTES:
        content = path.read_bytes()
        mime = _mime(content)
        if mime:
            return mime, content
    return "image/jpeg", _shrink(path)


def _mime(content: bytes) -> str | None:
    """What browsers call these bytes; the file's name may be wrong. None for formats that they do not all show."""
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return "image/webp"
    return next((mime for signature, mime in _SIGNATURES.items() if content.startswith(signature)), None)


def _shrink(path: Path) -> bytes:
    image = open_image(path)
    image.thumbnail((SHRUNK_PIXELS, SHRUNK_PIXELS))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=82)
    return buffer.getvalue()


def _placeholder(reason: str) -> Node:
    return tag("div", tag("span", reason), class_="picture missing")
