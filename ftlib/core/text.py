"""Text in one line without control characters and in Unicode's normal forms; sizes in words."""

from __future__ import annotations

import itertools
import re
import unicodedata
from typing import Literal

from ftlib.errors import UserError

# Unicode's normal forms, without quadratic time: sorting the marks of one letter takes the square of their number.

_SHORT = 4096
"""Up to this many characters every text is fast."""
_MAX_MARKS = 256
"""Per letter. Unicode's stream-safe form (Annex 15) has at most 30."""


def normalize(form: Literal["NFC", "NFKC"], text: str) -> str:
    """Like `unicodedata.normalize`, but a long text with more marks per letter than any language has is unchanged."""
    if len(text) > _SHORT and _max_marks(text) > _MAX_MARKS:
        return text
    return unicodedata.normalize(form, text)


def _max_marks(text: str) -> int:
    runs = itertools.groupby(text, lambda character: unicodedata.combining(character) > 0)
    return max((sum(1 for _ in run) for marks, run in runs if marks), default=0)


# Text that becomes part of a batch script or a command line must be one line without control characters.
#
# A line break ends an `#SBATCH --comment=…` line even inside quotes, and the rest would be executed.

_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
"""Control characters (C0, DEL, C1), Unicode's line and paragraph separators, and lone surrogates."""


def one_line_error(text: str) -> str | None:
    """What is wrong with a text for a script; None if nothing is."""
    found = _CONTROL.search(text)
    if not found:
        return None
    return f"must be one line without control characters, got {found[0]!a} in it"


def option_error(text: str) -> str | None:
    """What is wrong with the value of an `#SBATCH` option; None if nothing is.

    Unlike bash, sbatch treats a backslash as an escape in single quotes too: after `\\' ` a value could continue with
    further options, such as --export=BASH_ENV=….
    """
    return one_line_error(text) or ("must be without backslashes" if "\\" in text else None)


def raise_error(name: str, error: str | None) -> None:
    """Raise a UserError if there is an error.

    Args:
        name: of the text, for the message.

    Raises:
        UserError: `error` is not None.
    """
    if error:
        raise UserError(f"{name}: {error}")


def format_size(size: int) -> str:
    """Bytes on a disk or on the network: 3.0 MB, 1.2 GB (powers of 1000)."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def format_gib(size: int, digits: int = 2) -> str:
    """Bytes of memory: 1.25 GiB (powers of 1024)."""
    return f"{size / 2**30:.{digits}f} GiB"
