"""The words of a model's tokenizer and their numbers, whatever file they are kept in, and whether two fit together."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ftlib.core import files, log
from ftlib.core.protobuf import read_fields
from ftlib.errors import UserError

_UNCOMPARABLE = "whether {} has the base's vocabulary cannot be told"


@dataclass(frozen=True)
class Vocabulary:
    """Words by number.

    Attributes:
        kind: in which spelling: "words", or "bytes" (tiktoken's, in base64).
        words: word → number, added tokens included.
    """

    kind: str
    words: dict[str, int]


def read_vocabulary(folder: Path) -> Vocabulary | None:
    """The vocabulary in tokenizer.json, vocab.json, vocab.txt, a sentencepiece model or a tiktoken file; None without.

    Raises:
        UserError: a file of it is damaged.
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
    if isinstance(words, list):  # Unigram: [word, score] by number
        words = {word[0]: number for number, word in enumerate(words)}
    return {**words, **{token["content"]: token["id"] for token in tokenizer.get("added_tokens", ())}}


def _added_tokens(folder: Path) -> dict[str, int]:
    """Tokens that slow tokenizers keep beside their vocabulary."""
    found: dict[str, int] = {}
    if (folder / "added_tokens.json").is_file():
        found |= files.read_json(folder / "added_tokens.json")
    if (folder / "tokenizer_config.json").is_file():
        decoder = files.read_json(folder / "tokenizer_config.json").get("added_tokens_decoder") or {}
        found |= {token["content"]: int(number) for number, token in decoder.items()}
    return found


def _sentencepieces(path: Path, content: bytes) -> Iterator[str]:
    """The pieces of a sentencepiece model: field 1 of the protobuf message, each with its text as field 1."""
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


def check_vocabulary(base: Path, model: Path, label: str, other: str = "the base") -> None:
    """Refuse a model in which a word has another number than in the base, or a number another word.

    Args:
        other: what `base` is called, if it is another model.

    Words that only one of them has are no obstacle: each has a row of its own, or the base's spare row.

    Raises:
        UserError: they disagree.
    """
    ours, theirs = read_vocabulary(base), read_vocabulary(model)
    if ours is None or theirs is None or (other != "the base" and ours.kind != theirs.kind):
        if other != "the base":
            return
        if theirs is not None or (ours is not None and (model / "tokenizer_config.json").is_file()):
            log.warning(f"{_UNCOMPARABLE.format(label)}: one of them has no vocabulary file that can be read")
        return
    if ours.kind != theirs.kind:
        log.warning(f"{_UNCOMPARABLE.format(label)}: one is a tiktoken file, the other is none")
        return
    numbers = {number: word for word, number in ours.words.items()}
    odd = [
        (number, word)
        for word, number in theirs.words.items()
        if (ours.words[word] != number if word in ours.words else number in numbers)
    ]
    if odd:
        number, word = min(odd)
        others = ours.words.get(word)
        said = f"which {other} calls {numbers.get(number)!r}" if others is None else f"number {others} in {other}"
        raise UserError(
            f"{label}: another vocabulary: {len(odd):,} of its {len(theirs.words):,} words differ from the "
            f"{len(ours.words):,} of {other}: {word!r} is number {number}, {said}",
            "Merge models with the base's own vocabulary.",
        )
    if other != "the base":
        return
    if added := sorted(theirs.words.keys() - ours.words.keys(), key=theirs.words.__getitem__):
        shown = ", ".join(f"{word!r} ({theirs.words[word]})" for word in added[:3]) + (" …" if len(added) > 3 else "")
        log.warning(f"{label}: {len(added)} words that the base's tokenizer does not have: {shown}")
