"""docs/api.md, from the signatures and docstrings of `ftlib.api`: `python3 -m ftlib.api_reference` prints it."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

from ftlib import api
from ftlib.config.loader import Experiment
from ftlib.data.dataset import PreparedDataset
from ftlib.memory.search import MemoryPlan
from ftlib.slurm.status import RunStatus
from ftlib.slurm.submit import SubmittedRuns
from ftlib.staging import StagedFiles

_HEAD = """# Python API

This page lists the functions that `import ftlib` offers. It is generated from their docstrings: `make api-docs`.
A complete program is [examples/train_from_python.py](../examples/train_from_python.py).
"""
_TYPES = """## Types

`ConfigLike` is a path, a mapping or an `Experiment`; `RunLike` is a `Run`, a run folder or a run's name. `Overrides` is
a mapping of dotted keys to values, or a list of texts `KEY=VALUE` as on the command line.
"""
_RESULTS = (Experiment, StagedFiles, PreparedDataset, MemoryPlan, SubmittedRuns, RunStatus)
_SECTION = re.compile(r"^(Args|Attributes|Returns|Raises|Yields):$", re.MULTILINE)


def markdown() -> str:
    """The page."""
    functions = [value for name, value in vars(api).items() if name in api.__all__ and inspect.isfunction(value)]
    own = [function for function in functions if function.__module__ == api.__name__]
    others = [function for function in functions if function not in own]
    parts = [_HEAD, inspect.cleandoc(api.__doc__ or "").partition("\n\n")[2], "## Functions"]
    parts += [text for function in own for text in _function(function)]
    parts += ["## Plugins", "See [extending.md](extending.md)."]
    parts += [text for function in others for text in _function(function)]
    parts += [_TYPES, *[text for kind in (api.Run, *_RESULTS) for text in _class(kind)]]
    parts += ["## Exceptions", *[text for kind in (api.UserError, api.TrainingDiverged) for text in _class(kind)]]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def _function(function: Callable[..., Any]) -> Iterator[str]:
    yield f"### {function.__name__}"
    yield f"```python\n{_signature(function)}\n```"
    yield from _docstring(function)


def _class(kind: type) -> Iterator[str]:
    yield f"### {kind.__name__}"
    yield from _docstring(kind)
    properties = [(name, value) for name, value in vars(kind).items() if isinstance(value, property)]
    told = [(name, inspect.cleandoc(value.__doc__).split("\n\n")[0]) for name, value in properties if value.__doc__]
    if told:
        yield "Properties:\n\n" + "\n".join(f"- `{name}`: {_one_line(text)}" for name, text in told)


def _signature(function: Callable[..., Any]) -> str:
    """As it is written in the source, a parameter a line; `inspect` alone puts annotations into quotes."""
    signature, lines, keyword = inspect.signature(function), [], False
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not keyword:
            lines.append("    *,")
            keyword = True
        default = "" if parameter.default is parameter.empty else f" = {parameter.default!r}"
        lines.append(f"    {parameter.name}: {parameter.annotation}{default},")
    return "\n".join([f"{function.__name__}(", *lines, f") -> {signature.return_annotation}"])


def _docstring(documented: Callable[..., Any]) -> Iterator[str]:
    """Paragraphs; Args and the like as lists."""
    text, *sections = _SECTION.split(inspect.cleandoc(documented.__doc__ or ""))
    yield text
    for title, body in zip(sections[::2], sections[1::2], strict=True):
        body, _, after = inspect.cleandoc(body).partition("\n\n")
        yield f"{title}:" + (f" {_one_line(body)}" if title in ("Returns", "Yields") else f"\n\n{_items(body)}")
        if after:
            yield after


def _items(body: str) -> str:
    """`name: text` entries, whose other lines are indented, as a list."""
    entries = re.split(r"\n(?=\S)", body)
    return "\n".join(f"- `{name}`: {_one_line(text)}" for name, _, text in (entry.partition(":") for entry in entries))


def _one_line(text: str) -> str:
    return " ".join(text.split())


if __name__ == "__main__":
    print(markdown(), end="")
