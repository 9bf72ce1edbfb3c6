"""Paths in configs: what they count from, and how they are stored.

Relative paths count from the config's folder, those of KEY=VALUE from the current folder. Below the store a path is
stored as `${store}/…`, so that the store can be moved, or mounted elsewhere on other machines; else it is absolute.
What leaves this machine (cards, pushes) names no path: `public_name`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from ftlib.config.schema import MODEL_FILES, PathKind, Section
from ftlib.core.paths import STORE, stored_path

S = TypeVar("S", bound=Section)
_EXPLICIT = ("/", ".", "~")
_WEIGHTS = ("config.yaml", "config.json", "adapter_config.json", "*.safetensors", "*.bin")
"""What a folder holds that is meant by its bare name: a run, a model or an adapter."""
_CACHED = re.compile(r"(?:models|datasets)--(.+?)--(.+)")
"""What huggingface_hub calls a repository's folder in a cache."""

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")


def public_name(text: str) -> str:
    """What to call a model or folder outside of this machine: its hub name, also of a path in a cache of the hub.

    Any other path is called by its last name.
    """
    if not text.startswith(_EXPLICIT) and text.count("/") < 2:
        return text
    parts = Path(text).parts
    cached = next((match for part in reversed(parts) if (match := _CACHED.fullmatch(part))), None)
    return f"{cached[1]}/{cached[2]}" if cached else parts[-1] if parts else text


def hub_name(text: str) -> str | None:
    """The hub's name of a model that is named so, or that lies in a cache of the hub; None for any other.

    The hub refuses cards whose `base_model` is anything else.
    """
    named = text if text.startswith(_EXPLICIT) else f"models--{text.replace('/', '--', 1)}"
    cached = next((match for part in reversed(Path(named).parts) if (match := _CACHED.fullmatch(part))), None)
    name = f"{cached[1]}/{cached[2]}" if cached and not text.startswith("ftlib/") else ""
    return name if _REPOSITORY.fullmatch(name) else None


def stored_text(text: str, kind: PathKind, folder: Path, store: Path) -> str:
    """A field of a config as it is stored; names of the hub and of runs stay as they are.

    Args:
        folder: what relative paths count from.
    """
    name, colon, rest = text.partition(":") if kind == "dataset" else (text, "", "")
    if name.startswith(STORE) or not _is_path(name, kind, folder):
        return text
    path = folder / Path(name).expanduser()
    path = path.resolve() if ".." in path.parts else path.absolute()
    found = stored_path(path, store)
    return text if Path(name).is_absolute() and not found.startswith(STORE) else f"{found}{colon}{rest}"


def _is_path(text: str, kind: PathKind, folder: Path) -> bool:
    if kind == "path" or text.startswith(_EXPLICIT):
        return True
    if kind == "run":
        return any(any((folder / text).glob(pattern)) for pattern in _WEIGHTS)
    if kind == "model" and text.endswith(MODEL_FILES):
        return True
    return not text.startswith("ftlib/") and (text.count("/") != 1 or (folder / text).is_dir())


def map_paths(section: S, change: Callable[[tuple[int | str, ...], str, PathKind], str]) -> S:
    """A section with every path in it changed.

    Args:
        change: dotted key, in parts; the path; its kind → the new one.
    """
    return _changed(section, (), change)


def _changed(value: Any, key: tuple[int | str, ...], change: Callable[[Any, str, PathKind], str]) -> Any:
    if isinstance(value, list):
        return [_changed(item, (*key, number), change) for number, item in enumerate(value)]
    if not isinstance(value, Section):
        return value
    kinds, found = value.paths(), {}
    for name in type(value).model_fields:
        own = getattr(value, name)
        path = isinstance(own, str) and name in kinds
        found[name] = change((*key, name), own, kinds[name]) if path else _changed(own, (*key, name), change)
    return value.model_copy(update=found)
