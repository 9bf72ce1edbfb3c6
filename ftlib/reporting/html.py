"""Build HTML and inline SVG from elements: text goes in, markup in which all of it is escaped comes out.

A child or an attribute that is a string is always escaped; only what `tag` and its siblings built passes as it is. So
no label, prompt or answer can become markup, whoever wrote it.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_VOID = frozenset({"img", "meta"})


@dataclass(frozen=True)
class Node:
    """Finished markup; made by the functions of this module only."""

    markup: str


Child = Node | str


def tag(name: str, *children: Child, **attributes: str | float) -> Node:
    """An element.

    Args:
        name: of the element, as written in the code, never from data.
        children: strings are escaped.
        attributes: `class_` stands for class, and every other underscore for a hyphen; values are escaped.
    """
    opening = "".join([name, *(f' {_name(key)}="{_escape(str(value))}"' for key, value in attributes.items())])
    if name in _VOID:
        return Node(f"<{opening}>")
    return Node(f"<{opening}>{group(*children).markup}</{name}>")


def group(*children: Child) -> Node:
    """Several children in a row, without an element around them."""
    return Node("".join(child.markup if isinstance(child, Node) else _escape(child) for child in children))


def _name(key: str) -> str:
    return key.rstrip("_").replace("_", "-")


def _escape(text: str) -> str:
    """Half a surrogate pair, which a model can answer through JSON, cannot be written as UTF-8."""
    return html.escape(text.encode("utf-8", "replace").decode("utf-8"))


def style(css: str) -> Node:
    """A style sheet of ftlib's own.

    Raises:
        ValueError: it would end the element or load something.
    """
    if "</" in css or "@import" in css or "url(" in css:
        raise ValueError("a style sheet inside a page must not close its element or load anything")
    return Node(f"<style>{css}</style>")


def document(title: str, css: str, body: Node) -> str:
    """A whole page; its policy forbids scripts and every request, should any markup ever ask for one."""
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name_="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name_="color-scheme", content="light dark"),
        tag("title", title),
        style(css),
    )
    return f"<!DOCTYPE html>\n{tag('html', head, tag('body', body), lang='en').markup}\n"


def section(title: str, *children: Child) -> Node:
    """A part of the page under its heading."""
    return tag("section", tag("h2", title), *children)


def note(*children: Child) -> Node:
    """A remark in quieter type."""
    return tag("p", *children, class_="note")


def folded(summary: Child, *children: Child, unfolded: bool = False) -> Node:
    """Content that opens on a click (and, where the browser can, in print)."""
    attributes = {"open": ""} if unfolded else {}
    return tag("details", tag("summary", summary), *children, **attributes)


def scrolling(label: str, child: Node) -> Node:
    """A box that scrolls sideways by itself, with the keyboard too, so that the page never does."""
    return tag("div", child, class_="scroll", tabindex=0, role="region", aria_label=label)


def table(label: str, align: str, headers: Iterable[Child], rows: Iterable[Sequence[Child]]) -> Node:
    """A table whose first column names the rows.

    Args:
        label: what it shows, for those who hear the page.
        align: a letter per column: `l` for text, `w` for text of several lines, `r` for numbers.
    """
    head = tag("tr", *[tag("th", text, scope="col", class_=align[index]) for index, text in enumerate(headers)])
    body = [_table_row(row, align) for row in rows]
    return scrolling(label, tag("table", tag("thead", head), tag("tbody", *body)))


def _table_row(row: Sequence[Child], align: str) -> Node:
    first = tag("th", row[0], scope="row", class_=align[0])
    return tag("tr", first, *[tag("td", cell, class_=align[index]) for index, cell in enumerate(row[1:], 1)])
