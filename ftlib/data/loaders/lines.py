"""Text files line by line: one line that is not UTF-8, or no JSON, spoils no other."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ftlib.data.official.large import Faulty
from ftlib.data.official.streaming import parse_json
from ftlib.errors import UserError

MAX_LINE = 1 << 26
"""Bytes; no line of a dataset is longer."""


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a file with their numbers, line ends and all, without a byte order mark.

    Raises:
        UserError: missing, unreadable, or a line of more than `MAX_LINE` bytes.
    """
    number = 0
    try:
        with path.open("rb") as file:
            while line := file.readline(MAX_LINE):
                number += 1
                if len(line) == MAX_LINE:
                    raise UserError(f"{path}:{number}: more than {MAX_LINE >> 20} MiB in one line")
                yield number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
    except FileNotFoundError:
        raise UserError(f"{path}: no such file", "Check data.root and data.file.") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def read_json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """The values of a JSONL file, or `Faulty`, with their lines' numbers; blank lines are passed.

    Raises:
        UserError: missing, unreadable, or a line of more than `MAX_LINE` bytes.
    """
    for number, line in read_lines(path):
        if line.strip():
            try:
                yield number, parse_json(line.decode())
            except UnicodeDecodeError as error:
                yield number, Faulty(f"not UTF-8: {error}")
            except ValueError as error:
                yield number, Faulty(str(error))
