"""How commands import large libraries: without garbage collection, without packages that they do not need, and without
reading what an earlier command has read."""

from __future__ import annotations

import atexit
import contextlib
import gc
import hashlib
import importlib.metadata
import json
import sys
from collections.abc import Callable, Iterator
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

from ftlib.core import files
from ftlib.errors import UserError

_unneeded: tuple[str, ...] = ()


@contextlib.contextmanager
def quick_imports() -> Iterator[None]:
    """Context for importing large libraries: without garbage collection and packages of `hide_while_importing`.

    Modules, classes and functions live until the process ends; the collector would walk through them again and again,
    which is a fifth of the CPU time.
    """
    enabled = gc.isenabled()
    hidden = [name for name in _unneeded if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]
    gc.disable()
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]
        if enabled:
            if not gc.get_freeze_count():
                gc.freeze()  # both together: from the young generation to the oldest, which is seldom collected
                gc.unfreeze()
            gc.enable()


def hide_while_importing(*names: str) -> None:
    """Let libraries that are imported in `quick_imports` do without these packages, which can be imported later.

    What such a library finds out then it may remember: only for a process that is ftlib's own.
    """
    global _unneeded
    _unneeded = names


def exempt_from_collection() -> None:
    """Leave what has been imported out of all further collections.

    Each one that looks through torch's and transformers' objects takes half a second, and libraries ask for several.
    Later calls change nothing: in a process that trains several times, garbage of the first training must be freed.
    """
    if not gc.get_freeze_count():
        gc.freeze()


def skip_collection_at_exit() -> None:
    """Leave out Python's last collection: through torch's and transformers' objects it takes a second.

    What has to happen at the end of a process is not left to it: files and folders are closed in `with`, or by atexit.
    """
    atexit.register(gc.freeze)


def hide_package(name: str) -> None:
    """Make a package look as if it were not installed, for the rest of the process, unless it is imported already.

    Libraries that would use the package where it is installed then do without it: both `import` and `find_spec` heed
    `None` in `sys.modules`.
    """
    sys.modules.setdefault(name, None)  # type: ignore[arg-type]


def store_import_structure(folder: Callable[[], Path | None]) -> None:
    """Let transformers find in a file which of its modules defines which class, from the second process on.

    To find out, it reads the source of all its models, 2,200 files, twice: a quarter of the time that its import takes
    in a container, and far more where each file is a request to a server.

    Args:
        folder: returns the folder of the file, which must belong to this user; None: nothing is stored. It is called
            when transformers is imported. The file is named by the hashes of transformers' files as they were installed
            (its RECORD).
    """
    if "transformers" not in sys.modules and not any(isinstance(one, _ImportUtilsFinder) for one in sys.meta_path):
        sys.meta_path.insert(0, _ImportUtilsFinder(folder))


class _ImportUtilsFinder(MetaPathFinder):
    def __init__(self, folder: Callable[[], Path | None]) -> None:
        self._folder = folder

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != "transformers.utils.import_utils":
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(name, path, target)
        if spec and type(spec.loader) is SourceFileLoader and (installed := _record_of_transformers(spec.loader.path)):
            spec.loader = _ImportUtilsLoader(name, spec.loader.path)
            spec.loader.installed, spec.loader.folder = installed, self._folder
        return spec


class _ImportUtilsLoader(SourceFileLoader):
    """Loads transformers.utils.import_utils, and replaces its `define_import_structure` for the folder of all models.

    That function returns (required packages → module → names), without regard to which packages there are.
    """

    installed: str
    folder: Callable[[], Path | None]

    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        if not hasattr(module, "define_import_structure"):
            return
        original = module.define_import_structure
        models = Path(self.path).parents[1] / "models"
        known: list[tuple[list[str], dict[str, list[str]]]] = []

        def define_import_structure(module_path: str | Path, prefix: str | None = None) -> Any:
            if Path(module_path) not in (models, models / "__init__.py"):
                return original(module_path, prefix)
            if not known:
                known.extend(self._read_or_store(lambda: original(str(models / "__init__.py"))))
            before = f"{prefix}." if prefix else ""
            return {
                frozenset(packages): {before + name: set(names) for name, names in modules.items()}
                for packages, modules in known
            }

        module.define_import_structure = define_import_structure  # type: ignore[attr-defined]

    def _read_or_store(self, compute: Callable[[], Any]) -> Any:
        file = None
        with contextlib.suppress(UserError, OSError, ValueError, RecursionError):
            if folder := self.folder():
                file = folder / f"transformers-{self.installed[:12]}.json"
                stored = json.loads(file.read_bytes())
                if isinstance(stored, dict) and stored.get("sha256") == files.json_sha256(stored.get("structure")):
                    return stored["structure"]
        found = [
            (sorted(packages), {name: sorted(names) for name, names in modules.items()})
            for packages, modules in compute().items()
        ]
        if file:
            with contextlib.suppress(UserError, OSError):
                files.write_json(file, {"sha256": files.json_sha256(found), "structure": found})
                file.chmod(0o600)  # `stage` writes for the store's group
        return found


def _record_of_transformers(import_utils: str) -> str | None:
    """A hash of the hashes of transformers' files; None if a wheel has not installed them, so that they may change."""
    try:
        distribution = importlib.metadata.distribution("transformers")
    except importlib.metadata.PackageNotFoundError:
        return None
    record, name = distribution.read_text("RECORD"), "transformers/utils/import_utils.py"
    if not record or f"\n{name}," not in record or Path(str(distribution.locate_file(name))) != Path(import_utils):
        return None
    return hashlib.sha256(record.encode()).hexdigest()
