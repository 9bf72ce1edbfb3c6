"""JSONL logs; incomplete lines of killed writers are ignored."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ftlib.core.files import json_text, storage_errors, write_text
from ftlib.core.redaction import redact


def append_jsonl(path: Path, record: dict[str, Any]) -> None:
    """Append one line to a JSONL log; an incomplete last line is ended first.

    Raises:
        UserError: no space, or not writable.
    """
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b") as file:
            torn = False
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                torn = file.read() != b"\n"
            file.write(b"\n" * torn + redact(json_text(record)).encode() + b"\n")


def read_jsonl_log(path: Path) -> list[dict[str, Any]]:
    """The records of a JSONL log that ftlib wrote; incomplete lines (killed writer, full storage) are dropped."""
    return parse_jsonl_log(path.read_bytes()) if path.exists() else []


def parse_jsonl_log(text: bytes) -> list[dict[str, Any]]:
    """The records of all complete lines of a JSONL log."""
    records = []
    for line in text.split(b"\n")[:-1]:
        with contextlib.suppress(ValueError):
            records.append(json.loads(line))
    return records


def filter_jsonl_log(path: Path, keep: Callable[[dict[str, Any]], bool] = lambda record: True) -> None:
    """Remove incomplete lines and the records for which `keep` is false; the file is rewritten only if it changes."""
    if not path.exists():
        return
    before = path.read_bytes()
    records = filter(keep, parse_jsonl_log(before))
    text = "".join(json_text(record) + "\n" for record in records)
    if text.encode() != before:
        write_text(path, text)
