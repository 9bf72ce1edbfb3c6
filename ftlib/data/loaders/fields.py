"""A record with plain fields (`image`, `prefix`, `suffix`, …, under whatever names) → a row."""

from __future__ import annotations

import posixpath
from collections.abc import Mapping
from typing import Any

from ftlib.data.examples import Example
from ftlib.data.loaders.rows import Parse, needed

FIELDS = ("id", "image", "prefix", "suffix", "references")


def row_parser(columns: Mapping[Any, str]) -> Parse:
    """What turns records into rows.

    A row's id is its record's number unless it has an `id`; its suffix is the first of its references unless it has
    one. `part` may say which split a row belongs to. All fields that no column stands for become facts.

    Args:
        columns: field of `FIELDS` → the records' own name for it, where that differs.
    """
    names = {name: str(columns.get(name, name)) for name in FIELDS}
    own = set(names.values())

    def parse(record: dict[str, Any], number: int) -> list[Example]:
        references = references_of(record, names["references"])
        if references and names["suffix"] not in record:
            record = {**record, names["suffix"]: references[0]}
        image, prefix, suffix = (text_of(record, names[name]) for name in ("image", "prefix", "suffix"))
        if not image:
            raise ValueError(f"field {names['image']}: is empty")
        identity = identity_of(record, names["id"], number)
        facts = {name: value for name, value in record.items() if name not in own}
        part: Any = facts.pop("part") if facts.get("part") in ("train", "valid", "test") else ""
        answer = needed(suffix, names["suffix"])
        return [Example(identity, posixpath.normpath(image), prefix, answer, references, facts, part)]

    return parse


def identity_of(record: Mapping[str, Any], name: str, number: int) -> str:
    """A record's id, or its number if it has none.

    Raises:
        ValueError: the id is neither text nor a whole number.
    """
    identity = record.get(name, number)
    if isinstance(identity, bool) or not isinstance(identity, (str, int)):
        raise ValueError(f"field {name}: must be text or a number, got {identity!r}"[:200])
    return str(identity)


def references_of(record: Mapping[str, Any], name: str) -> list[str]:
    """A record's references; none if it has no such field.

    Raises:
        ValueError: it is no list of texts.
    """
    references = record.get(name, [])
    if not isinstance(references, list) or not all(isinstance(one, str) for one in references):
        raise ValueError(f"field {name}: must be a list of texts, got {references!r}"[:200])
    return references


def text_of(record: Mapping[str, Any], name: str) -> str:
    """A field that must be a text.

    Raises:
        ValueError: it is missing or something else.
    """
    if name not in record:
        raise ValueError(f"field {name}: is missing")
    value = record[name]
    if not isinstance(value, str):
        raise ValueError(f"field {name}: must be text, got {value!r}"[:200])
    return value
