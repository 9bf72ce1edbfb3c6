"""Tokenizes captions like the official COCO caption evaluation: the Stanford PTB tokenizer 3.4.1, without Java.

Captions are tokenized, one per line, into lower-case tokens without the punctuation marks that the COCO caption
evaluation drops (Chen et al. 2015, "Microsoft COCO Captions: Data Collection and Evaluation Server").

The official program reads a file as one text. So a token can depend on the next line ("Inc." ends a sentence if a
capital follows), and an SGML tag can even continue there; this is reproduced. Line breaks inside a caption become
spaces here; all but the common one make the official program count later captions for the wrong image.

Most captions consist of plain words, so the tokens of text between two spaces are cached where they cannot depend on
its neighbours; other captions are read character by character.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import chain

from ftlib.metrics.ptb.grammar import next_token
from ftlib.metrics.ptb.lexer import Barren

DROPPED = frozenset(
    {"''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", ".", "?", "!", ",", ":", "-", "--", "...", ";"}
)
"""The official list. It is compared with lower-case tokens, so brackets are kept: `-lrb-`."""

_LINE_BREAKS = str.maketrans(dict.fromkeys("\n\r\v\f\x85\u2028\u2029", " "))
_ALONE = re.compile("(?![0-9])[!-;=-~]*")
"""Text between two spaces whose tokens cannot continue beyond them, as those of numbers, tags and dots (". .") can."""
_FOLLOWERS = (" a b", " The b", " 1", " ltd", "\nThe b")
"""Texts after a dot that can change whether it belongs to the token."""


def tokenize(captions: Sequence[str]) -> list[list[str]]:
    """The counted tokens of every caption.

    Args:
        captions: the captions of one file, in its order.

    Returns:
        Tokens, which can contain a no-break space ("5 1/2" is one token), in the captions' order.
    """
    lines, text = _joined(captions)
    chunks = _Chunks()
    barren: Barren = set()
    found: list[list[str]] = []
    start = 0
    while len(found) < len(lines):
        line = lines[len(found)]
        parts = [chunks[chunk] for chunk in line.split(" ")]
        if None in parts or ". ." in line or len(found) + 1 == len(lines):
            read = _read(text, start, barren)
            found += map(_counted, read)
            start += sum(len(each) for each in lines[len(found) - len(read) : len(found)]) + len(read)
        else:
            found.append(list(chain.from_iterable(parts)))  # type: ignore[arg-type]
            start += len(line) + 1
    return found


def split(captions: Sequence[str]) -> list[list[str]]:
    """All tokens of every caption, punctuation marks included."""
    lines, text = _joined(captions)
    barren: Barren = set()
    found: list[list[str]] = []
    start = 0
    while len(found) < len(lines):
        read = _read(text, start, barren)
        start += sum(len(each) for each in lines[len(found) : len(found) + len(read)]) + len(read)
        found += read
    return found


def _joined(captions: Sequence[str]) -> tuple[list[str], str]:
    """The captions as lines, and as one text."""
    lines = [caption.translate(_LINE_BREAKS) for caption in captions]
    return lines, "\n".join(lines)


def _counted(tokens: list[str]) -> list[str]:
    """Tokens without punctuation marks, and without the white space that the official program strips from lines."""
    line = " ".join(tokens).rstrip()
    return [token for token in line.split(" ") if token and token not in DROPPED]


class _Chunks(dict[str, "list[str] | None"]):
    """Text between two spaces → its counted tokens; None if they depend on the following text."""

    def __missing__(self, chunk: str) -> list[str] | None:
        followers = _FOLLOWERS if "." in chunk else _FOLLOWERS[:1]
        found = [_before(chunk, after) for after in followers] if _ALONE.fullmatch(chunk) else [None]
        self[chunk] = found[0] if all(other == found[0] for other in found) else None
        return self[chunk]


def _before(chunk: str, after: str) -> list[str] | None:
    """The counted tokens of a chunk that is followed by `after`; None if one extends beyond the chunk."""
    text, place = chunk + after, 0
    barren: Barren = set()
    found: list[str] = []
    while place < len(chunk):
        token, place = next_token(text, place, barren)
        found += [] if token is None else [token.lower()]
    return _counted(found) if place == len(chunk) else None


def _read(text: str, start: int, barren: Barren) -> list[list[str]]:
    """The tokens of the line at `start`, or of several lines if a token spans them.

    Args:
        barren: see `next_token`; the same set for all lines.
    """
    found: list[list[str]] = [[]]
    place = start
    while place < len(text):
        token, place = next_token(text, place, barren)
        if token == "\n":
            break
        if token is not None:
            here, *more = token.lower().split("\n")
            found[-1].append(here)
            found += [[piece] if piece else [] for piece in more]
    return found
