"""Gemma's SentencePiece file (`paligemma_tokenizer.model`) → the tokenizer of transformers, without SentencePiece.

The file is a protocol buffer (github.com/google/sentencepiece, src/sentencepiece_model.proto). A few of its fields are
read: the pieces with their scores and types, and what says that it is the kind of tokenizer that Gemma has (BPE that
falls back to bytes, text that is not normalized).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AddedToken, GemmaTokenizer

from ftlib.core.protobuf import read_fields
from ftlib.errors import UserError

_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_PIECE, _SCORE, _TYPE = 1, 2, 3
_NORMAL, _CONTROL, _USER_DEFINED, _BYTE = 1, 3, 4, 6
_BPE = 2
_SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>")


@dataclass(frozen=True)
class Piece:
    """A token.

    Attributes:
        kind: normal, unknown, control, user-defined, unused or byte, as the format numbers them.
    """

    text: str
    score: float
    kind: int


def read_gemma_tokenizer(path: Path) -> GemmaTokenizer:
    """The tokenizer of a `.model` file, with the same ids.

    Raises:
        UserError: not a SentencePiece file, or not one of Gemma.
    """
    try:
        pieces, fault = _read_model(path.read_bytes())
    except (ValueError, IndexError, KeyError, TypeError, struct.error) as error:
        raise UserError(f"{path}: not a SentencePiece model: {error}") from None
    fault = fault or next((f"{word} is missing" for word in _SPECIAL if word not in {p.text for p in pieces}), "")
    if fault:
        raise UserError(f"{path}: not the tokenizer of a Gemma: {fault}", "PaliGemma's is paligemma_tokenizer.model.")
    tokenizer = GemmaTokenizer(
        vocab={piece.text: number for number, piece in enumerate(pieces)}, merges=_merges(pieces), mask_token=None
    )
    # Blanks in them are "▁" already when they are looked for; before anything is merged, as SentencePiece does.
    tokenizer.add_tokens([AddedToken(piece.text, normalized=True) for piece in pieces if piece.kind == _USER_DEFINED])
    return tokenizer


def _read_model(data: bytes) -> tuple[list[Piece], str]:
    """The pieces, and what is not as in Gemma's."""
    pieces, settings = [], {_TRAINER: dict[int, Any](), _NORMALIZER: dict[int, Any]()}
    for number, value in read_fields(data):
        if number == _PIECES:
            fields = dict(read_fields(value))
            (score,) = struct.unpack("<f", fields.get(_SCORE, bytes(4)))
            pieces.append(Piece(fields[_PIECE].decode(), score, fields.get(_TYPE, _NORMAL)))
        elif number in settings:
            settings[number] |= dict(read_fields(value))
    if not pieces:
        raise ValueError("it has no pieces")
    trainer, normalizer = settings[_TRAINER], settings[_NORMALIZER]
    faults = {
        "it is not BPE": trainer.get(3, 1) != _BPE,
        "it does not fall back to bytes": not trainer.get(35, 0),
        "it puts blanks behind words": trainer.get(24, 0),
        "it normalizes text": normalizer.get(2, b""),
        "it puts a blank before a text": normalizer.get(3, 1),
        "it removes blanks": normalizer.get(4, 1),
        "it does not escape blanks": not normalizer.get(5, 1),
        "a piece is there twice": len({piece.text for piece in pieces}) < len(pieces),
    }
    return pieces, next((fault for fault, holds in faults.items() if holds), "")


def _merges(pieces: Sequence[Piece]) -> list[tuple[str, str]]:
    """Pairs that make a piece, the best pieces first."""
    scores = {piece.text: piece.score for piece in pieces if piece.kind == _NORMAL}
    pairs = [
        (piece[:cut], piece[cut:])
        for piece in scores
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    ]
    return sorted(pairs, key=lambda pair: -scores[pair[0] + pair[1]])
