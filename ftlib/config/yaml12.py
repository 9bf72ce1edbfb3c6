"""YAML 1.2 core schema, with the line of every key.

PyYAML reads YAML 1.1, where `yes` is a boolean and `2e-4` a string. `load` reads the 1.2 core schema
(yaml.org/spec/1.2.2, section 10.3.2), where `yes` is a string and `2e-4` a number, and rejects duplicate keys.

Bounds on size and depth protect against aliases that expand to more values than fit into memory.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator
from typing import Any

import yaml

from ftlib.errors import UserError

KeyPath = tuple[str | int, ...]
"""Path of a value in a document: keys and list indices from the top."""

MAX_CHARACTERS = 1 << 19
MAX_VALUES = 100_000
"""Maximum number of values in a document; aliased values count at every use."""
MAX_DEPTH = 50
MAX_DIGITS = 100
"""Maximum number of digits of an integer. Python limits them, too."""

_CORE_SCHEMA = {
    "tag:yaml.org,2002:null": (r"~|null|Null|NULL|", "~nN\0"),
    "tag:yaml.org,2002:bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "tag:yaml.org,2002:int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    "tag:yaml.org,2002:float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
}


_TAGS = {*_CORE_SCHEMA, *(f"tag:yaml.org,2002:{kind}" for kind in ("str", "seq", "map"))}
_UNWRITABLE = re.compile("[\0\ud800-\udfff]")
"""Characters that file names or UTF-8 cannot contain."""


class _CoreLoader(yaml.SafeLoader):
    """SafeLoader with the scalar rules of the 1.2 core schema instead of YAML 1.1's."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 - PyYAML's own protocol


def _construct_int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    text = loader.construct_scalar(node)
    if text.startswith(("0o", "0x")):
        return int(text, 0)
    return int(text)


def _construct_float(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> float:
    return float(loader.construct_scalar(node).lower().replace(".inf", "inf").replace(".nan", "nan"))


for _tag, (_pattern, _first) in _CORE_SCHEMA.items():
    _letters = ["" if letter == "\0" else letter for letter in _first]
    _CoreLoader.add_implicit_resolver(_tag, re.compile(f"^(?:{_pattern})$"), _letters)
_CoreLoader.add_constructor("tag:yaml.org,2002:int", _construct_int)
_CoreLoader.add_constructor("tag:yaml.org,2002:float", _construct_float)


def load(text: str, source: str) -> tuple[Any, dict[KeyPath, int]]:
    """Read one YAML document.

    Args:
        text: the document.
        source: the file's name, for messages.

    Returns:
        The value, and for the path of every key and list item its line, counted from 1.

    Raises:
        UserError: syntax error, duplicate key, a tag outside the core schema, or a bound is exceeded.
    """
    if len(text) > MAX_CHARACTERS:
        raise UserError(f"{source}: more than {MAX_CHARACTERS:,} characters, too many for a config")
    try:
        loader = _CoreLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None, {}
        lines: dict[KeyPath, int] = {}
        _record_lines(node, (), lines, source, (), itertools.count(1))
        return loader.construct_document(node), lines
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{source}:{mark.line + 1}" if mark else source
        raise UserError(f"{place}: not valid YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{source}: not valid YAML: {error}") from None
    except OverflowError as error:  # from an escaped character beyond Unicode
        raise UserError(f"{source}: not valid YAML: {error}") from None
    except RecursionError:
        raise UserError(f"{source}: not valid YAML: nested too deeply") from None


def load_value(text: str, source: str) -> Any:
    """Read the VALUE of `KEY=VALUE` from a command line.

    Text that starts with a bracket, a brace or a quote is parsed as YAML; anything else is one plain scalar, so that
    `data.prompt=Question: what?` stays text. So does a prompt that starts with a field, `{question} en`.

    Raises:
        UserError: a value that starts like YAML but is invalid, or that is not allowed in configs.
    """
    if text[:1] in ("[", "{", '"', "'") and not re.match(r"\{\w+\}", text):
        return load(text, source)[0]
    loader = _CoreLoader("")
    try:
        node = yaml.ScalarNode(loader.resolve(yaml.ScalarNode, text, (True, False)), text)
        if fault := _scalar_error(node):
            raise UserError(f"{source}: {fault}")
        return loader.construct_document(node)
    finally:
        loader.dispose()


def dump(value: Any) -> str:
    """Return a document that `load` reads back; uses libyaml if available, which is ten times as fast."""
    dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
    text: str = yaml.dump(value, Dumper=dumper, sort_keys=False, allow_unicode=True, width=120)
    return text


def _scalar_error(node: yaml.ScalarNode) -> str:
    pattern, _ = _CORE_SCHEMA.get(node.tag, ("", ""))
    kind = node.tag.rpartition(":")[2]
    if pattern and not re.fullmatch(pattern, node.value):
        return f"{node.value[:60]!r} is not a valid {kind}"
    if kind == "int" and len(node.value) > MAX_DIGITS:
        return f"a number of {len(node.value):,} digits; the maximum is {MAX_DIGITS}"
    if kind == "float" and node.value[-1].isdecimal() and math.isinf(float(node.value)):
        return f"the number {node.value[:40]} is too large"
    return _text_error(node.value)


def _text_error(text: str) -> str:
    found = _UNWRITABLE.search(text)
    return f"the character {found[0]!r} cannot be written to a file" if found else ""


def _record_lines(
    node: yaml.Node,
    path: KeyPath,
    lines: dict[KeyPath, int],
    source: str,
    above: tuple[yaml.Node, ...],
    number: Iterator[int],
) -> None:
    """Record the lines of all values of a node.

    Args:
        above: the enclosing nodes.
        number: counter of the document's values.

    Raises:
        UserError: a duplicate key, a key that is not text, a tag outside the core schema, or too many values or levels.
    """
    place = f"{source}:{node.start_mark.line + 1}"
    if any(node is one for one in above):
        raise UserError(f"{place}: an alias that contains itself")
    if len(above) > MAX_DEPTH:
        raise UserError(f"{place}: {'.'.join(map(str, path[:5]))}.…: nested more than {MAX_DEPTH} deep")
    if next(number) > MAX_VALUES:
        problem = f"{place}: {'.'.join(map(str, path))[:200]}: more than {MAX_VALUES:,} values in one file"
        raise UserError(problem, "An alias (*name) counts as all values that it refers to.")
    if node.tag not in _TAGS:
        raise UserError(f"{place}: not valid YAML: the tag {node.tag[:60]!r} is not in the core schema")
    if isinstance(node, yaml.ScalarNode) and (fault := _scalar_error(node)):
        raise UserError(f"{place}: {'.'.join(map(str, path))[:200] or 'config'}: {fault}")
    above = (*above, node)
    if isinstance(node, yaml.MappingNode):
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if key_node.tag != yaml.resolver.BaseResolver.DEFAULT_SCALAR_TAG:
                shown = str(key_node.value)[:50] if isinstance(key_node, yaml.ScalarNode) else "a list or mapping"
                raise UserError(f"{source}:{line}: a key must be text, got {shown}", "Text in quotes is always text.")
            if fault := _text_error(key_node.value):
                raise UserError(f"{source}:{line}: {fault}")
            below = (*path, key_node.value)
            if below in lines:
                name = ".".join(map(str, below))
                raise UserError(f"{source}:{line}: {name}: duplicate key, first in line {lines[below]}")
            lines[below] = line
            _record_lines(value_node, below, lines, source, above, number)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            below = (*path, index)
            lines[below] = item.start_mark.line + 1
            _record_lines(item, below, lines, source, above, number)
