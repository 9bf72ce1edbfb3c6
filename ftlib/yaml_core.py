"""YAML 1.2 core schema, with the line of every key.

PyYAML reads YAML 1.1, where `yes` is a boolean and `2e-4` a string. `load` reads the 1.2 core schema
(yaml.org/spec/1.2.2, section 10.3.2), where `yes` is a word and `2e-4` a number, and refuses a key given twice.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from ftlib.errors import UserError

Path = tuple[str | int, ...]
"""Where a value stands in a document: keys and list indices from the top."""

_CORE_SCHEMA = {
    "tag:yaml.org,2002:null": (r"~|null|Null|NULL|", "~nN\0"),
    "tag:yaml.org,2002:bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "tag:yaml.org,2002:int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    "tag:yaml.org,2002:float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
}


class _CoreLoader(yaml.SafeLoader):
    """SafeLoader with the scalar rules of the 1.2 core schema; nothing inherited from YAML 1.1's table."""

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


def load(text: str, source: str) -> tuple[Any, dict[Path, int]]:
    """Read one YAML document.

    Args:
        text: the document.
        source: the file's name, for messages.

    Returns:
        The value, and for the path of every key and list item its line, counted from 1.

    Raises:
        UserError: syntax error, a key given twice, or a tag outside the core schema.
    """
    try:
        loader = _CoreLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None, {}
        lines: dict[Path, int] = {}
        _record_lines(node, (), lines, source, set())
        return loader.construct_document(node), lines
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{source}:{mark.line + 1}" if mark else source
        raise UserError(f"{place}: not valid YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{source}: not valid YAML: {error}") from None
    except RecursionError:
        raise UserError(f"{source}: not valid YAML: nested too deeply") from None


def load_value(text: str, source: str) -> Any:
    """Read the VALUE of `KEY=VALUE` from a command line.

    Text that begins with a bracket, a brace or a quote is read as YAML; anything else is one plain scalar, so that
    `data.prompt=Question: what?` stays text.

    Raises:
        UserError: a value that begins like YAML and is not.
    """
    if text[:1] in ("[", "{", '"', "'"):
        return load(text, source)[0]
    loader = _CoreLoader("")
    try:
        tag = loader.resolve(yaml.ScalarNode, text, (True, False))
        return loader.construct_document(yaml.ScalarNode(tag, text))
    finally:
        loader.dispose()


def dump(value: Any) -> str:
    """Write a document that `load` reads back; by libyaml where PyYAML has it, ten times as fast."""
    dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
    text: str = yaml.dump(value, Dumper=dumper, sort_keys=False, allow_unicode=True, width=120)
    return text


def _record_lines(node: yaml.Node, path: Path, lines: dict[Path, int], source: str, open_nodes: set[int]) -> None:
    if id(node) in open_nodes:
        raise UserError(f"{source}:{node.start_mark.line + 1}: an alias that contains itself")
    open_nodes = open_nodes | {id(node)}
    if isinstance(node, yaml.MappingNode):
        for key_node, value_node in node.value:
            place, line = (*path, key_node.value), key_node.start_mark.line + 1
            if place in lines:
                name = ".".join(map(str, place))
                raise UserError(f"{source}:{line}: {name} is given twice, first in line {lines[place]}")
            lines[place] = line
            _record_lines(value_node, place, lines, source, open_nodes)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            place = (*path, index)
            lines[place] = item.start_mark.line + 1
            _record_lines(item, place, lines, source, open_nodes)
