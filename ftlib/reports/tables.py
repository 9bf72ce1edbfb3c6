"""A table of plain texts, for HTML and Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

NO_VALUE = "–"


@dataclass(frozen=True)
class Table:
    """Rows of text under headers; the first column contains the row names.

    Attributes:
        title: title of the table.
        align: a letter per column: `l` for text, `w` for text of several lines, `r` for numbers.
        remarks: notes below the table.
    """

    title: str
    align: str
    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    remarks: Sequence[str] = ()

    def markdown(self) -> str:
        """Return a GitHub-flavoured Markdown table under a heading (github.github.com/gfm, section 4.10)."""
        rules = ["---:" if letter == "r" else "---" for letter in self.align]
        lines = [_line(self.headers), _line(rules, plain=True), *[_line(row) for row in self.rows]]
        return "\n\n".join([f"## {self.title}", "\n".join(lines), *[_escape(remark) for remark in self.remarks]])


def _line(cells: Sequence[str], plain: bool = False) -> str:
    return f"| {' | '.join(cells if plain else map(_escape, cells))} |"


def _escape(text: str) -> str:
    """Escape text, so that labels and prompts contain no markup and end no cell."""
    joined = " ".join(text.split())
    return "".join(f"\\{letter}" if letter in "\\|`*_<>[]#~" else letter for letter in joined)
