"""Reads token → ID of a model's tokenizer from any of its file formats."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ftlib.core import files
from ftlib.core.protobuf import read_fields
from ftlib.errors import UserError


@dataclass(frozen=True)
class Vocabulary:
    """A vocabulary.

    Attributes:
        kind: "words", or "bytes" (tiktoken's, in base64).
        words: token → ID, added tokens included.
    """

    kind: str
    words: dict[str, int]


def read_vocabulary(folder: Path) -> Vocabulary | None:
    """Read tokenizer.json, vocab.json, vocab.txt, a sentencepiece model or a tiktoken file; None if there is none.

    Raises:
        UserError: a file is damaged.
    """
    words = _tokenizer_json(folder / "tokenizer.json")
    kind = "words"
    if not words and (folder / "vocab.json").is_file():
        words = dict(files.read_json(folder / "vocab.json"))
    if not words and (folder / "vocab.txt").is_file():
        lines = (folder / "vocab.txt").read_text(encoding="utf-8").splitlines()
        words = {word: number for number, word in enumerate(lines)}
    for path in [] if words else sorted([*folder.glob("*.model"), *folder.glob("*.tiktoken")]):
        content = path.read_bytes()
        if content[:1] == b"\n":
            words = {word: number for number, word in enumerate(_sentencepieces(path, content))}
        else:
            words, kind = _tiktoken(path, content), "bytes"
        break
    return Vocabulary(kind, {**words, **_added_tokens(folder)}) if words else None


def _tokenizer_json(path: Path) -> dict[str, int]:
    if not path.is_file():
        return {}
    tokenizer = files.read_json(path)
    words = tokenizer["model"].get("vocab", {})
    if isinstance(words, list):  # Unigram: [token, score] by ID
        words = {word[0]: number for number, word in enumerate(words)}
    return {**words, **{token["content"]: token["id"] for token in tokenizer.get("added_tokens", ())}}


def _added_tokens(folder: Path) -> dict[str, int]:
    """Return the added tokens of slow tokenizers, which are in separate files."""
    found: dict[str, int] = {}
    if (folder / "added_tokens.json").is_file():
        found |= files.read_json(folder / "added_tokens.json")
    if (folder / "tokenizer_config.json").is_file():
        decoder = files.read_json(folder / "tokenizer_config.json").get("added_tokens_decoder") or {}
        found |= {token["content"]: int(number) for number, token in decoder.items()}
    return found


def _sentencepieces(path: Path, content: bytes) -> Iterator[str]:
    """Yield the pieces of a sentencepiece model: field 1 of the protobuf message, each with its text as field 1."""
    try:
        for number, piece in read_fields(content):
            if number == 1:
                yield dict(read_fields(piece))[1].decode()
    except (IndexError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path}: a damaged sentencepiece model") from None


def _tiktoken(path: Path, content: bytes) -> dict[str, int]:
    try:
        pairs = (line.split() for line in content.decode("ascii").splitlines() if line)
        found = {word: int(number) for word, number in pairs}
        base64.b64decode(next(iter(found), ""), validate=True)
    except ValueError:
        raise UserError(f"{path}: neither a sentencepiece model nor a tiktoken file") from None
    return found
