"""Paths in configs, and how they are stored.

Paths are relative to the config's folder, those of KEY=VALUE to the current folder. A path in the store is stored as
`${store}/…`, so that the store can be moved, or mounted elsewhere on other machines; other paths are stored as absolute
paths. Published files (model cards, pushes) contain no paths, see `public_name`.
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
"""Files that show that a folder given by its bare name is a run, a model or an adapter."""
_CACHED = re.compile(r"(?:models|datasets)--(.+?)--(.+)")
"""Pattern of repository folders in the cache of huggingface_hub."""

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")


def public_name(text: str) -> str:
    """Return a model or folder's public name: its hub name (also for a path in a hub cache) or base name."""
    if not text.startswith(_EXPLICIT) and text.count("/") < 2:
        return text
    parts = Path(text).parts
    cached = next((match for part in reversed(parts) if (match := _CACHED.fullmatch(part))), None)
    return f"{cached[1]}/{cached[2]}" if cached else parts[-1] if parts else text


def hub_name(text: str) -> str | None:
    """Return the hub name of a model given by hub name or by a path in a hub cache; None for any other.

    The hub rejects model cards with any other `base_model`.
    """
    named = text if text.startswith(_EXPLICIT) else f"models--{text.replace('/', '--', 1)}"
    cached = next((match for part in reversed(Path(named).parts) if (match := _CACHED.fullmatch(part))), None)
    name = f"{cached[1]}/{cached[2]}" if cached and not text.startswith("ftlib/") else ""
    return name if _REPOSITORY.fullmatch(name) else None


def stored_text(text: str, kind: PathKind, folder: Path, store: Path) -> str:
    """Return a field of a config in stored form; names on the hub and of runs are unchanged.

    Args:
        folder: the folder to which paths are relative.
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
    """Return a section with every path replaced.

    Args:
        change: (parts of the dotted key, path, kind) → new path.
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
