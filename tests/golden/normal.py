"""What in an output depends on time, place, machine, version or kind of CPU becomes a word; everything else is held."""

from __future__ import annotations

import math
import re
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.conftest import REPOSITORY

_LIBRARIES = re.compile(r"^(Failed to load CPU gemm|.*Warning: |  warnings\.warn).*\n", re.MULTILINE)
_PROGRESS = re.compile(r"^(\w[^:\n]*): \d+(/\d+)?(   .*)?\n", re.MULTILINE)
_DECIMAL = re.compile(r"[-+−]?\d+\.\d+(e[-+]?\d+)?|\b\d+%")


def places(text: str, known: Mapping[str, Path]) -> str:
    """A text with `<word>` for paths, for this machine's name and for its Python.

    Args:
        known: word → the path that it stands for; a longer one is replaced before a shorter one.
    """
    for word, path in sorted({**known, "repository": REPOSITORY}.items(), key=lambda item: -len(str(item[1]))):
        text = text.replace(str(path), f"<{word}>")
    text = text.replace(sys.executable, "<python>")
    return re.sub(rf"(?<![\w.-]){re.escape(socket.gethostname())}(?![\w-])", "<host>", text)


def said(text: str, known: Mapping[str, Path]) -> str:
    """What a command says: without lines of libraries, and of each progress one line, whatever it showed and when."""
    seen: set[str] = set()

    def first(match: re.Match[str]) -> str:
        new = match[1] not in seen
        seen.add(match[1])
        return f"{match[1]}: PROGRESS\n" if new else ""

    text = _PROGRESS.sub(first, _LIBRARIES.sub("", text))
    return squeezed(re.sub(r"\b\d+(\.\d+)? s\b", "# s", places(text, known)))


def squeezed(text: str) -> str:
    """With columns of tables two blanks apart, whatever the widest cell was."""
    return re.sub(r"(?<=-)-{2,}", "-", re.sub(r"(?<=\S) {2,}", "  ", text))


def blank_decimals(text: str) -> str:
    """`#.#` for every number with a decimal point: it depends on a model's answers, on the time or on the machine."""
    return _DECIMAL.sub("#.#", text)


def differences(found: Any, known: Any, tolerances: Mapping[str, tuple[float, float]], path: str = "") -> list[str]:
    """Where two JSON values differ, as lines.

    Args:
        tolerances: key → (relative, absolute), for all numbers below that key; others must be equal.
    """
    return _differences(found, known, tolerances, (0.0, 0.0), path)


def _differences(
    found: Any, known: Any, tolerances: Mapping[str, tuple[float, float]], allowed: tuple[float, float], path: str
) -> list[str]:
    if isinstance(found, dict) and isinstance(known, dict):
        told = [f"{path}.{key}: is new" for key in sorted(found.keys() - known.keys())]
        told += [f"{path}.{key}: is missing" for key in sorted(known.keys() - found.keys())]
        for key in sorted(known.keys() & found.keys()):
            below = tolerances.get(key, allowed)
            told += _differences(found[key], known[key], tolerances, below, f"{path}.{key}")
        return told
    if isinstance(found, list) and isinstance(known, list) and len(found) == len(known):
        pairs = enumerate(zip(found, known, strict=True))
        return [line for i, (a, b) in pairs for line in _differences(a, b, tolerances, allowed, f"{path}[{i}]")]
    numbers = [value for value in (found, known) if isinstance(value, (int, float)) and not isinstance(value, bool)]
    same = type(found) is type(known) and found == known
    if len(numbers) == 2 and allowed != (0.0, 0.0):
        same = math.isclose(*numbers, rel_tol=allowed[0], abs_tol=allowed[1])
    return [] if same else [f"{path}: {found!r}, was {known!r}"]
