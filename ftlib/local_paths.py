"""Paths in configs: what they count from, and how they are stored.

Relative paths count from the config's folder, those of KEY=VALUE from the current folder. Below the store a path is
stored as `${store}/…`, so that the store can be moved, or mounted elsewhere on other machines; else it is absolute.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from ftlib.config_base import PathKind, Section

STORE = "${store}"
S = TypeVar("S", bound=Section)
_EXPLICIT = ("/", ".", "~")
_WEIGHTS = ("config.yaml", "config.json", "adapter_config.json", "*.safetensors", "*.bin")
"""What a folder holds that is meant by its bare name: a run, a model or an adapter."""


def stored_path(path: Path, store: Path) -> str:
    """A path as it is stored; one that leads into the store by a symbolic link or another mount point counts as in it.

    Args:
        path: absolute.
    """
    if path.is_relative_to(store):
        return _below(path.relative_to(store))
    for parent in (path, *path.parents):
        if parent.exists() and store.exists() and parent.samefile(store):
            return _below(path.relative_to(parent))
    return str(path)


def _below(rest: Path) -> str:
    return f"{STORE}/{rest}" if rest.parts else STORE


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
    return not text.startswith("ftlib/") and (text.count("/") != 1 or (folder / text).is_dir())


def with_paths(section: S, change: Callable[[tuple[int | str, ...], str, PathKind], str]) -> S:
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
