"""Detect the encoding of text files that are not UTF-8, and binary files, for helpful messages."""

from __future__ import annotations

import codecs
import re
from pathlib import Path

from ftlib.errors import UserError

_BYTE_ORDER_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
"""Byte order marks, longer ones first, because one is a prefix of another."""

_UNPACK = "Unpack it, and set data.file to the unpacked file."
_BINARY_FORMATS = {
    b"\x1f\x8b": ("gzip", _UNPACK),
    b"BZh": ("bzip2", _UNPACK),
    b"\xfd7zXZ\0": ("xz", _UNPACK),
    b"\x28\xb5\x2f\xfd": ("zstd", _UNPACK),
    b"PK\3\4": ("a zip archive or a spreadsheet", "Unpack it; save a spreadsheet as CSV."),
    b"\xd0\xcf\x11\xe0": ("a spreadsheet", "Save it as CSV."),
    b"PAR1": ("Parquet", "Read it with source hub, whose data.file is the folder."),
}
"""Signature of a binary file → (what it is, what to do)."""

_JAPANESE = ("shift_jis", "cp932", "euc_jp")
_KANA = re.compile("[\u3041-\u3096\u30a1-\u30fa]")
_LATIN = "cp1252"
_DAMAGED = 0.5
"""If at least this share of non-ASCII bytes is valid UTF-8, the text is damaged UTF-8, not another encoding."""


def require_text(path: Path, head: bytes) -> None:
    """Check by the first bytes that a file is text.

    Raises:
        UserError: it is an archive, a spreadsheet or Parquet.
    """
    for mark, (what, remedy) in _BINARY_FORMATS.items():
        if head.startswith(mark):
            raise UserError(f"{path}: {what}, not text", remedy)


def foreign_encoding(head: bytes) -> str:
    """Return the encoding of a file that is certainly not UTF-8, by its first bytes; else ""."""
    for mark, name in _BYTE_ORDER_MARKS.items():
        if head.startswith(mark):
            return name
    if len(head) > 1 and (head[0] == 0) != (head[1] == 0):  # one ASCII character in two bytes
        return "utf-16-be" if head[0] == 0 else "utf-16-le"
    if _utf8_share(head) >= _DAMAGED:
        return ""
    whole = head[: head.rfind(b"\n")] if b"\n" in head else head
    return next((name for name in _JAPANESE if _is_japanese(whole, name)), "")


def encoding_hint(text: bytes) -> str:
    """Return what to do about bytes that are not UTF-8."""
    name = next((name for name in _JAPANESE if _is_japanese(text, name)), "")
    if name:
        return f"it looks like {name}: set data.encoding: {name}"
    if _can_decode(text, _LATIN):
        return f"if the whole file is Western European, set data.encoding: {_LATIN} (or latin-1)"
    return "set data.encoding to the file's encoding"


def _utf8_share(text: bytes) -> float:
    found, valid = _beyond_ascii(text), _beyond_ascii(text.decode(errors="ignore").encode())
    return valid / found if found else 1.0


def _beyond_ascii(text: bytes) -> int:
    return len(text.translate(None, bytes(range(128))))


def _is_japanese(text: bytes, name: str) -> bool:
    """Whether the text contains kana, as nearly every Japanese text does."""
    return _can_decode(text, name) and bool(_KANA.search(text.decode(name)))


def _can_decode(text: bytes, name: str) -> bool:
    try:
        text.decode(name)
    except UnicodeDecodeError:
        return False
    return True
