"""Reads token → ID of a model's tokenizer from any of its file formats."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
        words = _checked(folder / "vocab.json", files.read_json_object(folder / "vocab.json"))
    if not words and (folder / "vocab.txt").is_file():
        lines = files.read_text(folder / "vocab.txt").removesuffix("\n").split("\n")
        words = {word: number for number, word in enumerate(lines)}  # a word may be a separator of str.splitlines
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
    tokenizer = files.read_json_object(path)
    try:
        words = tokenizer["model"].get("vocab", {})
        if isinstance(words, list):  # Unigram: [token, score] by ID
            words = {word[0]: number for number, word in enumerate(words)}
        added = {token["content"]: token["id"] for token in tokenizer.get("added_tokens") or ()}
        return _checked(path, {**words, **added})
    except (KeyError, TypeError, AttributeError, IndexError):
        raise UserError(f"{path}: not a tokenizer of the library tokenizers") from None


def _added_tokens(folder: Path) -> dict[str, int]:
    """Return the added tokens of slow tokenizers, which are in separate files."""
    found: dict[str, int] = {}
    if (path := folder / "added_tokens.json").is_file():
        found |= _checked(path, files.read_json_object(path))
    if (path := folder / "tokenizer_config.json").is_file():
        decoder = files.read_json_object(path).get("added_tokens_decoder") or {}
        try:
            found |= _checked(path, {token["content"]: int(number) for number, token in decoder.items()})
        except (KeyError, TypeError, AttributeError, ValueError):
            raise UserError(f"{path}: field added_tokens_decoder: must have an object for each token ID") from None
    return found


def _checked(path: Path, words: dict[Any, Any]) -> dict[str, int]:
    """Return token → ID.

    Raises:
        UserError: an ID is not a number.
    """
    if odd := next((word for word, number in words.items() if type(number) is not int), None):
        raise UserError(f"{path}: the ID of token {odd!r} must be a number, got {words[odd]!r:.60}")
    return words


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
