"""The tokens of captions as their official scores count them: the Stanford PTB tokenizer 3.4.1, without Java.

In goes one caption a line, out come its tokens in lower case without the punctuation marks that the COCO caption
evaluation drops (Chen et al. 2015, "Microsoft COCO Captions: Data Collection and Evaluation Server").

The program reads a file as one text. A token can therefore depend on the next line ("Inc." ends a sentence if a
capital follows) and an SGML tag can even go on in it, and this is kept. Line breaks inside of a caption are spaces
here; all but the common one upset the official program, which then counts later captions for the wrong image.

Most captions consist of plain words, so what stands between two spaces is read once and remembered wherever its
tokens cannot depend on its neighbours; other captions are read character by character.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import chain

from ftlib.metrics.ptb_grammar import next_token

DROPPED = frozenset(
    {"''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", ".", "?", "!", ",", ":", "-", "--", "...", ";"}
)
"""The official list. Tokens are in lower case when they are compared with it, so brackets stay: `-lrb-`."""

_LINE_BREAKS = str.maketrans(dict.fromkeys("\n\r\v\f\x85\u2028\u2029", " "))
_ALONE = re.compile("(?![0-9])[!-;=-~]*")
"""What stands between two spaces and does not go on before or after them, as numbers, tags and dots (". .") can."""
_FOLLOWERS = (" a b", " The b", " 1", " ltd", "\nThe b")
"""What can follow a dot and change what it ends."""


def tokenize(captions: Sequence[str]) -> list[list[str]]:
    """The counted tokens of every caption.

    Args:
        captions: the captions of one file, in its order.

    Returns:
        Tokens, which can contain a no-break space ("5 1/2" is one token), in the captions' order.
    """
    lines, text = _joined(captions)
    chunks = _Chunks()
    found: list[list[str]] = []
    start = 0
    while len(found) < len(lines):
        line = lines[len(found)]
        parts = [chunks[chunk] for chunk in line.split(" ")]
        if None in parts or ". ." in line or len(found) + 1 == len(lines):
            read = _read(text, start)
            found += map(_counted, read)
            start += sum(len(each) for each in lines[len(found) - len(read) : len(found)]) + len(read)
        else:
            found.append(list(chain.from_iterable(parts)))  # type: ignore[arg-type]
            start += len(line) + 1
    return found


def split(captions: Sequence[str]) -> list[list[str]]:
    """All tokens of every caption, punctuation marks included."""
    lines, text = _joined(captions)
    found: list[list[str]] = []
    start = 0
    while len(found) < len(lines):
        read = _read(text, start)
        start += sum(len(each) for each in lines[len(found) : len(found) + len(read)]) + len(read)
        found += read
    return found


def _joined(captions: Sequence[str]) -> tuple[list[str], str]:
    """The captions as lines, and as one text."""
    lines = [caption.translate(_LINE_BREAKS) for caption in captions]
    return lines, "\n".join(lines)


def _counted(tokens: list[str]) -> list[str]:
    """Without punctuation marks, and without the white space that the official program cuts from a line's end."""
    line = " ".join(tokens).rstrip()
    return [token for token in line.split(" ") if token and token not in DROPPED]


class _Chunks(dict[str, "list[str] | None"]):
    """What stands between two spaces → its counted tokens; None if they depend on what follows."""

    def __missing__(self, chunk: str) -> list[str] | None:
        followers = _FOLLOWERS if "." in chunk else _FOLLOWERS[:1]
        found = [_before(chunk, after) for after in followers] if _ALONE.fullmatch(chunk) else [None]
        self[chunk] = found[0] if all(other == found[0] for other in found) else None
        return self[chunk]


def _before(chunk: str, after: str) -> list[str] | None:
    """The counted tokens of a chunk before some text; None if one of them goes beyond the chunk."""
    text, place = chunk + after, 0
    found: list[str] = []
    while place < len(chunk):
        token, place = next_token(text, place)
        found += [] if token is None else [token.lower()]
    return _counted(found) if place == len(chunk) else None


def _read(text: str, start: int) -> list[list[str]]:
    """The tokens of the line that begins here; of several lines if a token goes over their ends."""
    found: list[list[str]] = [[]]
    place = start
    while place < len(text):
        token, place = next_token(text, place)
        if token == "\n":
            break
        if token is not None:
            here, *more = token.lower().split("\n")
            found[-1].append(here)
            found += [[piece] if piece else [] for piece in more]
    return found
