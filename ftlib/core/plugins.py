"""Plugins: Python files, or modules of installed packages, that register tasks, data sources and model families.

`declared` reads what a file registers without running it. `import_plugin` runs it: only commands that train, evaluate
or prepare data come here, only with the content whose hash the config has, and never with a file that another user may
have written unless its hash is named (`--trust-code HASH`, or FTLIB_TRUST_CODE).
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import os
import re
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

from ftlib.core import trust
from ftlib.errors import UserError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

GROUP = "ftlib.plugins"
"""The entry-point group; an entry point is called KIND:NAME, such as task:word_error."""
_IMPORTED: set[str] = set()
"""Identities of plugins of packages that this process has imported."""
_MAX_BYTES = 1 << 20
_MIN_DIGITS = 32
"""128 bits: nobody can make another file whose hash begins alike."""
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9._+-]*")
_FACTS: dict[str, dict[str, type]] = {
    "task": {"title": str, "metrics": dict, "closed_labels": bool},
    "source": {"title": str, "split_files": str, "split_names": bool, "encodings": bool},
    "model": {"title": str, "model_class": str, "pipeline_tag": str, "parts": list, "images": bool, "chat": bool,
              "packing": bool, "auto_processor": bool},
}  # fmt: skip
_NEEDED = {"task": ("metrics",), "source": (), "model": ("model_class", "pipeline_tag")}
_PARTS = {"vision", "projector", "embeddings", "language"}


class Plugin(Protocol):
    """What a config knows of a plugin (`config.schema.Plugin`)."""

    @property
    def file(self) -> str: ...

    @property
    def package(self) -> str: ...

    @property
    def module(self) -> str: ...

    @property
    def sha256(self) -> str: ...

    @property
    def identity(self) -> str: ...

    @property
    def registers(self) -> dict[str, dict[str, dict[str, Any]]]: ...


def read(path: Path) -> bytes:
    """A plugin's content.

    Raises:
        UserError: no such file, not a .py file, or it cannot be read.
    """
    if path.suffix != ".py":
        raise UserError(f"{path}: a plugin is a .py file")
    try:
        with path.open("rb") as file:
            source = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise UserError(f"{path}: the plugin cannot be read: {error.strerror}") from None
    if len(source) > _MAX_BYTES:
        raise UserError(f"{path}: larger than {_MAX_BYTES:,} bytes, which is no plugin")
    try:
        source.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8: {error.reason}") from None
    return source


def sha256(source: bytes) -> str:
    return hashlib.sha256(source).hexdigest()


def declared(source: bytes, path: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """What a plugin registers: kind → name → facts, from the literal arguments of its decorators. Nothing is run.

    Raises:
        UserError: no Python, no decorator at the top level of the file, or arguments that are no literals.
    """
    try:
        tree = ast.parse(source, str(path))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        line = f":{error.lineno}" if isinstance(error, SyntaxError) and error.lineno else ""
        raise UserError(f"{path}{line}: not valid Python: {getattr(error, 'msg', error)}") from None
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for function in (node for node in tree.body if isinstance(node, ast.FunctionDef)):
        for call in (node for node in function.decorator_list if isinstance(node, ast.Call)):
            called = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
            kind = called.removeprefix("register_")
            if not called.startswith("register_") or kind not in _FACTS:
                continue
            where = f"{path}:{call.lineno}: {called}"
            name, facts = _facts(kind, call, where)
            if kind == "source" and function.name != "examples":
                raise UserError(f"{where}: the function of a source is called examples, not {function.name}")
            if name in found.get(kind, {}):
                raise UserError(f"{where}: {name} is registered twice")
            found.setdefault(kind, {})[name] = facts
    if not found:
        remedy = "A plugin has functions with @register_task(name=…), @register_source or @register_model."
        raise UserError(f"{path}: registers nothing at the top level of the file", remedy)
    return found


def _facts(kind: str, call: ast.Call, where: str) -> tuple[str, dict[str, Any]]:
    known = ("name", *_FACTS[kind])
    if call.args or any(word.arg not in known for word in call.keywords):
        raise UserError(f"{where}: takes only {', '.join(f'{name}=' for name in known)}")
    facts = {}
    for word in call.keywords:
        try:
            facts[str(word.arg)] = ast.literal_eval(word.value)
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            problem = f"{where}: {word.arg}= is not a literal"
            raise UserError(problem, "These facts are read without running the file: write them out.") from None
    name = facts.pop("name", None)
    if isinstance(facts.get("parts"), tuple):
        facts["parts"] = list(facts["parts"])
    if fault := facts_error(kind, name, facts):
        raise UserError(f"{where}: {fault}")
    return str(name), facts


def facts_error(kind: str, name: object, facts: dict[str, Any]) -> str:
    """What is wrong with a declaration; "" if nothing is."""
    if kind not in _FACTS:
        return f"must be one of {', '.join(_FACTS)}"
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        return f"name= must be letters, digits, '.', '_', '+' and '-', got {name!r:.100}"
    for fact, value in facts.items():
        if type(value) is not (needed := _FACTS[kind].get(fact)):
            return f"{fact}= must be a {needed.__name__}, got {value!r:.100}" if needed else f"{fact}= is unknown"
    if lacking := [fact for fact in _NEEDED[kind] if not facts.get(fact)]:
        return f"{lacking[0]}= is missing"
    for metric, told in facts.get("metrics", {}).items():
        direction = told.get("higher_is_better") if isinstance(told, dict) and len(told) == 1 else None
        if not isinstance(metric, str) or type(direction) is not bool:
            return f'metrics= must be like {{"accuracy": {{"higher_is_better": True}}}}, got {metric!r}: {told!r:.100}'
        if ":" in metric or metric.lower() == "loss":
            return f"metrics=: {metric!r} cannot be a metric's name"
    if facts.get("split_files", "") not in ("", "one", "several"):
        return f'split_files= must be "", "one" or "several", got {facts["split_files"]!r:.100}'
    if wrong := [part for part in facts.get("parts", ()) if part not in _PARTS]:
        return f"parts= must be of {', '.join(sorted(_PARTS))}, got {wrong[0]!r:.100}"
    return ""


def import_plugin(plugin: Plugin) -> str:
    """Run a plugin, once in a process; the name of its module.

    Raises:
        UserError: its content is not what the config was read with, another user may have written it, or it fails.
    """
    if plugin.package:
        return _import_package(plugin)
    name = f"ftlib_plugin_{plugin.sha256[:16]}"
    if name in sys.modules:
        return name
    path = Path(plugin.file)
    source = require_same(plugin)
    require_trusted(plugin)
    module = ModuleType(name)
    module.__file__ = str(path)
    sys.modules[name] = module
    try:
        exec(compile(source, str(path), "exec"), module.__dict__)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise UserError(_failure(error, str(path))) from error
    return name


def _failure(error: BaseException, file: str) -> str:
    """What a plugin raised, with the line of its file.

    Args:
        file: the end of its path.
    """
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.endswith(file)]
    place = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else file
    return f"{place}: the plugin fails: {type(error).__name__}: {error}"


def require_same(plugin: Plugin) -> bytes:
    """The content of a plugin's file.

    Raises:
        UserError: it has changed since the config was read, or is gone.
    """
    source = read(Path(plugin.file))
    if sha256(source) != plugin.sha256:
        problem = f"{plugin.file}: the plugin has changed: {sha256(source)[:12]} instead of {plugin.sha256[:12]}"
        raise UserError(problem, "Put the old file back, or start a new run with the new one.")
    return source


def require_trusted(plugin: Plugin) -> None:
    """Refuse a plugin's file that another user may have written, unless the user named its hash.

    Raises:
        UserError: with the file to read and the hash to name.
    """
    named = os.environ.get(trust.TRUSTED, "").split(",")
    if any(len(each) >= _MIN_DIGITS and plugin.sha256.startswith(each.lower()) for each in named):
        return
    path = Path(plugin.file)
    fault = trust.find_untrusted(path, trust.trusted_uids(), path.absolute().parent)
    if fault:
        remedy = f"Read {path}. If you trust it, add --trust-code {plugin.sha256[:_MIN_DIGITS]}"
        raise UserError(f"the plugin {path} is not run: {fault[0]}", remedy)


# Plugins of installed packages. Their entry points tell the names; the module is found without importing its package.


def installed(kind: str) -> list[str]:
    """The names that installed packages register. Nothing is imported."""
    return sorted({point.name.partition(":")[2] for point in _entry_points(f"{kind}:")})


def installed_plugin(kind: str, name: str) -> dict[str, Any] | None:
    """The installed plugin that registers a name, as a config stores it; None without one.

    Raises:
        UserError: several packages register it, or its module cannot be found, or does not register it.
    """
    points = [point for point in _entry_points(f"{kind}:{name}") if point.name == f"{kind}:{name}"]
    if not points:
        return None
    packages = sorted({f"{point.dist.name}=={point.dist.version}" for point in points if point.dist})
    if len({point.value for point in points}) > 1 or len(packages) != 1:
        raise UserError(f"{kind} {name} is registered by several packages: {', '.join(packages)}")
    path = _module_file(points[0])
    source = read(path)
    registers = declared(source, path)
    if name not in registers.get(kind, {}):
        raise UserError(f"{path}: its package says that it registers {kind} {name}, but it does not")
    return {"package": packages[0], "module": points[0].module, "sha256": sha256(source), "registers": registers}


def _entry_points(start: str) -> list[EntryPoint]:
    """Those of the group whose names start so."""
    from importlib.metadata import entry_points  # takes a while, and few commands need it

    return [point for point in entry_points(group=GROUP) if point.name.startswith(start)]


def _module_file(point: EntryPoint) -> Path:
    parts = point.module.split(".")
    ends = ["/".join(parts) + ".py", "/".join(parts) + "/__init__.py"]
    listed = [Path(str(file.locate())) for file in (point.dist.files or ()) if str(file) in ends] if point.dist else []
    on_path = [Path(place, end) for place in sys.path for end in ends]
    for path in [*listed, *on_path]:
        if path.is_file():
            return path
    raise UserError(f"{point.module}, a plugin of {point.dist.name if point.dist else point.value}, is not found")


def _import_package(plugin: Plugin) -> str:
    if plugin.module in sys.modules and plugin.identity in _IMPORTED:
        return plugin.module
    registered = [(kind, name) for kind, entries in plugin.registers.items() for name in entries]
    here = next((known for kind, name in registered if (known := installed_plugin(kind, name))), None)
    if here is None or here["module"] != plugin.module:
        told = " and ".join(f"{kind} {name}" for kind, name in registered)
        raise UserError(f"{plugin.package}, which registers {told}, is not installed here")
    if (here["package"], here["sha256"]) != (plugin.package, plugin.sha256):
        problem = f"{plugin.module} is not the plugin that this run was made with"
        told = f"{plugin.package} ({plugin.sha256[:12]}), here {here['package']} ({here['sha256'][:12]})"
        raise UserError(f"{problem}: {told}", f"Install {plugin.package}, or start a new run.")
    try:
        importlib.import_module(plugin.module)
    except (Exception, SystemExit) as error:
        raise UserError(_failure(error, f"{plugin.module.replace('.', '/')}.py")) from error
    _IMPORTED.add(plugin.identity)
    return plugin.module
