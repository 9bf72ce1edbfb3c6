"""A table of plain texts, for a page and for Markdown alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

NO_VALUE = "–"


@dataclass(frozen=True)
class Table:
    """Rows of text under headers; the first column names the rows.

    Attributes:
        title: what it shows.
        align: a letter per column: `l` for text, `w` for text of several lines, `r` for numbers.
        remarks: what must be said below it.
    """

    title: str
    align: str
    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    remarks: Sequence[str] = ()

    def markdown(self) -> str:
        """As a GitHub-flavoured Markdown table under a heading (github.github.com/gfm, section 4.10)."""
        rules = ["---:" if letter == "r" else "---" for letter in self.align]
        lines = [_line(self.headers), _line(rules, plain=True), *[_line(row) for row in self.rows]]
        return "\n\n".join([f"## {self.title}", "\n".join(lines), *[_escape(remark) for remark in self.remarks]])


def _line(cells: Sequence[str], plain: bool = False) -> str:
    return f"| {' | '.join(cells if plain else map(_escape, cells))} |"


def _escape(text: str) -> str:
    """Text stays text: no cell ends, and no markup begins, in a label or a prompt."""
    joined = " ".join(text.split())
    return "".join(f"\\{letter}" if letter in "\\|`*_<>[]#~" else letter for letter in joined)
