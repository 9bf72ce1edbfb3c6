"""Pickles that hold plain data, read without running any code of theirs.

Only lists, dictionaries, tuples, texts, bytes, numbers and numpy's scalars, which become plain numbers, are let
through. Texts of Python 2 that are no UTF-8 come with lone surrogates.
"""

from __future__ import annotations

import pickle
import struct
from pathlib import Path
from typing import Any

from ftlib.errors import UserError

_KINDS = {"b1": "?", "i1": "b", "i2": "h", "i4": "i", "i8": "q", "u1": "B", "u2": "H", "u4": "I", "u8": "Q"}
_KINDS |= {"f2": "e", "f4": "f", "f8": "d"}


def read_plain_pickle(path: Path) -> Any:
    """Read a pickle of plain data.

    Raises:
        UserError: missing, damaged, or with anything in it that is not plain data.
    """
    try:
        with path.open("rb") as file:
            return _Unpickler(file, encoding="utf-8", errors="surrogateescape").load()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except _NotPlain as error:
        raise UserError(
            f"{path}: {error}", "Such a file could run code when it is read; nothing of it was run."
        ) from None
    except Exception as error:  # damaged pickles raise whatever their bytes happen to ask for
        raise UserError(f"{path}: no pickle, or a damaged one: {error}"[:300]) from None


class _NotPlain(Exception):
    """The pickle wants something that is not plain data."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        for modules, known, stand_in in _STAND_INS:
            if module in modules and name == known:
                return stand_in
        raise _NotPlain(f"holds {module}.{name}, which is no plain data"[:200])


class _Type:
    """Stands for numpy's dtype."""

    def __init__(self, name: Any, *_: Any) -> None:
        self._kind = _KINDS.get(str(name)[:10])
        self._order = "<"

    def __setstate__(self, state: Any) -> None:
        self._order = {">": ">"}.get(state[1], "<")

    def number(self, content: bytes) -> Any:
        """The number in a scalar's bytes."""
        if self._kind is None:
            raise _NotPlain("holds a numpy scalar that is no number")
        return struct.unpack(self._order + self._kind, content)[0]


def _scalar(kind: _Type, content: bytes | str) -> Any:
    """Stands for what makes numpy's scalars; Python 2 has their bytes as text."""
    return kind.number(content.encode(errors="surrogateescape") if isinstance(content, str) else content)


def _bytes(text: str, encoding: str = "latin1") -> bytes:
    """Stands for `codecs.encode`, with which Python 3 writes bytes where pickles have only text."""
    if encoding != "latin1":
        raise _NotPlain("holds an encoded text")
    return text.encode("latin1")


_STAND_INS: tuple[tuple[tuple[str, ...], str, Any], ...] = (
    (("numpy",), "dtype", _Type),
    (("numpy.core.multiarray", "numpy._core.multiarray"), "scalar", _scalar),
    (("_codecs",), "encode", _bytes),
)
"""Modules and name of what numbers and bytes are pickled with, and what is called instead."""
