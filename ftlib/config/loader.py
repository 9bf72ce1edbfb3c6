"""Load a config: a YAML file or a mapping, and overrides → validated `Experiment`.

All errors are reported at once, each with file and line (or "command line", "overrides"), the dotted key and, for an
unknown key, the closest known one.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from ftlib.config import hf_fields, yaml12
from ftlib.config.identity import canonical_fields, identity, recipes_of
from ftlib.config.npz_checkpoints import NpzCheckpoint, find_npz_checkpoint
from ftlib.config.paths import map_paths, stored_text
from ftlib.config.schema import (
    DEPENDENCY,
    DURATION,
    GRES,
    LORA_INIT,
    MEMORY,
    MIXTURE,
    NAME_PATTERN,
    REFUSED_SBATCH_OPTIONS,
    SHA256,
    WORD,
    Config,
    Data,
    PathKind,
    Section,
)
from ftlib.core import files, plugins, registry
from ftlib.core.paths import STORE, Site, stored_path
from ftlib.core.redaction import holds_secret, names_secret
from ftlib.core.text import option_error
from ftlib.errors import UserError

S = TypeVar("S", bound=Section)
ConfigSource = Path | Mapping[str, Any]
"""A YAML file, or its content."""
Overrides = Sequence[str] | Mapping[str, Any]
"""`KEY=VALUE` texts, whose values are read as YAML, or dotted keys → values."""
_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
_COMMAND_LINE, _OVERRIDES = "command line", "overrides"
_MAPPING = Path("config")
"""What messages call a config that is no file."""
RUN_CONFIG = "config.yaml"
"""Name of the config file in a run folder."""
DATA_PATHS = "data_paths.json"
"""File in a run folder with later locations of the run's data (`Experiment.data_locations`), newest last."""
PLUGINS = "plugins"
"""Folder in a run folder with copies of plugin files."""
_PATTERNS = {
    LORA_INIT: "default, pissa or pissa_niter_N",
    NAME_PATTERN: "of letters, digits, '.', '_' and '-', a letter or digit first",
    WORD: "one word",
    SHA256: "64 hexadecimal digits",
    MEMORY: "a size such as 48G",
    DURATION: "a time such as 08:00:00 or 2-00:00:00, or a number of minutes",
    DEPENDENCY: "as for sbatch, such as afterok:123 or afterany:123:124,singleton",
    GRES: "as for sbatch, such as lscratch:200",
}


@dataclass(frozen=True)
class RunName:
    """A possible run ID of a config.

    Attributes:
        identity: 12 hexadecimal digits; hash of the fields that determine the trained weights.
        recipe: the recipe of this ID, see `identity.RECIPES`.
        raw: the config as plain data: defaults filled in, `${store}` unexpanded.
    """

    identity: str
    recipe: int
    raw: dict[str, Any]


@dataclass(frozen=True)
class Experiment:
    """A validated config.

    Attributes:
        config: ready to use, variables expanded.
        names: possible run IDs, the newest recipe's first; for a config in a run folder, the folder's ID comes first.
        data_locations: key of `data` → stored path of the run's data, if the data were moved.
    """

    config: Config
    names: tuple[RunName, ...]
    data_locations: dict[str, str] = field(default_factory=dict)
    npz: NpzCheckpoint | None = None

    @property
    def identity(self) -> str:
        """The run ID: the run folder's, or the newest recipe's."""
        return self.names[0].identity

    def run_name(self, identity: str) -> RunName:
        """Return the name with this run ID, or else the first name."""
        return next((name for name in self.names if name.identity == identity), self.names[0])

    def with_data_at(self, locations: Mapping[str, str]) -> Experiment:
        """Return the experiment with the run IDs that it would have with its data at other paths.

        Args:
            locations: see `Data.locations`, as stored.
        """
        names: dict[str, RunName] = {}
        for name in self.names:
            form = Config.model_validate(name.raw)
            form = form.model_copy(update={"data": form.data.with_locations(locations)})
            raw = canonical_fields(form, {"Config": ("sweep",)})
            names.setdefault(found := identity(form, name.recipe), RunName(found, name.recipe, raw))
        changed = {key: text for key, text in self.stored_data.locations.items() if locations.get(key) != text}
        return replace(self, names=tuple(names.values()), data_locations=changed)

    @property
    def stored_data(self) -> Data:
        """Return the data section of the first name."""
        return Data.model_validate(self.names[0].raw["data"])

    def to_yaml(self, identity: str = "") -> str:
        """Return the resolved config as it is saved in the run folder."""
        return yaml12.dump(self.run_name(identity).raw)


@dataclass(frozen=True)
class RawConfig:
    """A config with its overrides, not checked yet.

    Attributes:
        path: the file; `config` for one that is no file.
        data: its content.
        locations: key path → location of each key and list item for messages.
    """

    path: Path
    data: dict[str, Any]
    locations: dict[yaml12.KeyPath, str]

    @property
    def folder(self) -> Path:
        """The folder that relative paths of the file count from. jobs/run.sh notes it beside a job's copy."""
        noted = self.path.with_name("config.folder")
        if self.path.name == RUN_CONFIG and noted.is_file():
            return Path(noted.read_text().removesuffix("\n"))
        return self.path.absolute().parent

    def location(self, key: yaml12.KeyPath) -> str:
        """Return the location of a key, or of the closest enclosing section."""
        known = (self.locations[key[:length]] for length in range(len(key), 0, -1) if key[:length] in self.locations)
        return next(known, str(self.path))


def load_experiment(
    config: ConfigSource, overrides: Overrides, site: Site, environment: Mapping[str, str] = os.environ
) -> Experiment:
    """Read and check a config.

    Args:
        site: for `${store}`.
        environment: for every other `${NAME}`.

        Raises:
            UserError: all errors, one per line; or the file defines a sweep.
    """
    source = read_raw_config(config, overrides)
    if source.data.get("sweep") is not None:
        problem = f"{source.location(('sweep',))}: sweep: this config defines several runs"
        remedy = f"Submit all of them: ftlib submit {source.path}\nOr run one: add sweep=null and its KEY=VALUE."
        raise UserError(problem, remedy)
    return validate_experiment(source, site, environment)


def read_raw_config(config: ConfigSource, overrides: Overrides) -> RawConfig:
    """Read a config and set the overrides in it.

    Raises:
        UserError: no such file, invalid YAML, or an invalid override.
    """
    locations: dict[yaml12.KeyPath, str] = {}
    if isinstance(config, Mapping):
        path, data = _MAPPING, {key: _plain(value, f"{_MAPPING}: {key}") for key, value in config.items()}
    else:
        path = config
        data, lines = _read(path)
        locations = {key: f"{path}:{line}" for key, line in lines.items()}
    if isinstance(overrides, Mapping):
        for key, value in overrides.items():
            if not isinstance(key, str) or not all(key.split(".")):
                raise UserError(f"{_OVERRIDES}: {key!r} is not a dotted key", "For example: training.learning_rate")
            set_field(data, locations, key, _plain(value, f"{_OVERRIDES}: {key}"), _OVERRIDES)
        return RawConfig(path, data, locations)
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not all(key.split(".")):
            raise UserError(f"{_COMMAND_LINE}: {text!r} is not KEY=VALUE", "For example: training.learning_rate=1e-4")
        set_field(data, locations, key, yaml12.load_value(value, f"{_COMMAND_LINE}: {key:.200}"), _COMMAND_LINE)
    return RawConfig(path, data, locations)


def _plain(value: Any, where: str) -> Any:
    """A copy of a value from Python, as YAML would give it.

    Raises:
        UserError: a value that YAML does not know.
    """
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, (int, float)):  # such as numpy.float64
        return float(value) if isinstance(value, float) else int(value)
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{where}.{index}") for index, item in enumerate(value)]
    problem = f"{where}: must be a number, text, true or false, a list or a mapping, got {value!r:.200}"
    raise UserError(problem, f"Convert the {type(value).__name__} first.")


def set_field(data: dict[str, Any], locations: dict[yaml12.KeyPath, str], key: str, value: Any, location: str) -> None:
    """Set a field by its dotted key, and record the location of the value.

    Raises:
        UserError: an inner part of the key is not a section, or the key is too deep.
    """
    names = tuple(key.split("."))
    if len(names) > yaml12.MAX_DEPTH:
        raise UserError(f"{location}: {key[:50]}…: nested more than {yaml12.MAX_DEPTH} deep")
    section: Any = data
    for name in names[:-1]:
        section = section.setdefault(name, {}) if isinstance(section, dict) else None
    if not isinstance(section, dict):
        raise UserError(f"{location}: {key}: there is no such section")
    section[names[-1]] = value
    for known in [known for known in locations if known[: len(names)] == names]:
        del locations[known]  # keys of the replaced value
    for length in range(1, len(names) + 1):
        locations.setdefault(names[:length], location)
    locations[names] = location


def validate_experiment(source: RawConfig, site: Site, environment: Mapping[str, str] = os.environ) -> Experiment:
    """Validate one experiment.

    Raises:
        UserError: all errors, one per line.
    """
    errors: list[tuple[yaml12.KeyPath, str]] = []
    data = {**source.data, **_resolved_plugins(source, {**environment, "store": str(site.store)}, errors)}
    movable = _expand(data, (), {**environment, "store": "${store}"}, errors)
    expanded = _expand(movable, (), {"store": str(site.store)}, [])
    if isinstance(expanded.get("training"), dict):
        errors += [
            (("training", name), message) for name, message in hf_fields.find_training_errors(expanded["training"])
        ]
    errors += _option_errors(expanded.get("job"), ("job",))
    _validate(Config, expanded, errors, source)
    written = Config.model_validate(movable)
    own = source.path.absolute().parent.name if source.path.name == RUN_CONFIG else ""
    from_here = _with_stored_paths(written, source, site, Path.cwd())  # as version 0.1 took relative paths
    kept = any(identity(written, recipe) == own for recipe in recipes_of(written))
    config = from_here if kept else _with_stored_paths(written, source, site, source.folder)
    npz = find_npz_checkpoint(config.model, site)
    if npz:  # from here on, the base is the converted model
        base = stored_path(npz.folder, site.store)
        model = config.model.model_copy(update={"base": base, "tokenizer": None})
        written = from_here = config = config.model_copy(update={"model": model})
    absolute = map_paths(config, lambda key, text, kind: text.replace(STORE, str(site.store), 1))
    forms = [config, *([written] if from_here == config else []), absolute]  # the latter two named runs of version 0.1
    names: dict[str, RunName] = {}
    for recipe in recipes_of(config):
        for form in forms:
            name = RunName(identity(form, recipe), recipe, canonical_fields(form, {"Config": ("sweep",)}))
            names.setdefault(name.identity, name)
    ordered = sorted(names.values(), key=lambda name: name.identity != own)
    elsewhere = _last_data_locations(source.path, config.data, site) if ordered[0].identity == own else {}
    config = config.model_copy(update={"data": config.data.with_locations(elsewhere)})
    final = _expand(canonical_fields(config), (), {"store": str(site.store)}, [])
    for plugin in final.get("plugins", ()):
        if source.path.name == RUN_CONFIG and (copy := plugin_copy(source.path.absolute().parent, plugin)).is_file():
            plugin["file"] = str(copy)
    return Experiment(Config.model_validate(final), tuple(ordered), elsewhere, npz)


def plugin_copy(run: Path, plugin: Mapping[str, Any]) -> Path:
    """Return the path of a run's copy of a plugin file."""
    return run / PLUGINS / plugin["sha256"][:16] / (Path(plugin.get("file", "")).name or "-")


def _resolved_plugins(source: RawConfig, variables: Mapping[str, str], errors: list[Any]) -> dict[str, Any]:
    """Return the `plugins` of a config in stored form: files are read, and installed plugins that it uses are found.

    No plugin is imported. Plugins that a run's config has stored are returned unchanged.
    """
    given = source.data.get("plugins", [])
    found, unread = [], not isinstance(given, list)
    for index, each in enumerate([] if unread else given):
        try:
            found.append(_read_plugin(each, ("plugins", index), source, variables) if isinstance(each, str) else each)
        except UserError as error:
            errors.append((("plugins", index), str(error)))
            unread = True
    known: list[Any] = [
        SimpleNamespace(registers=each.get("registers", {})) for each in found if isinstance(each, dict)
    ]
    own = [each.registers for each in known]
    if not all(isinstance(each, dict) and all(isinstance(kind, dict) for kind in each.values()) for each in own):
        return {}  # the schema reports the error
    errors += _registered_twice(known)
    for path, kind, also in _names(source.data):
        name = _value(source.data, path)
        if not isinstance(name, str) or registry.lookup(kind, name, known) or name in also or unread:
            continue
        try:
            if plugin := plugins.installed_plugin(kind, name):
                found.append(plugin)
                known.append(SimpleNamespace(registers=plugin["registers"]))
            else:
                errors.append((path, registry.unknown_name_message(kind, name, known, also)))
        except UserError as error:
            errors.append((path, str(error)))
    return {"plugins": found} if isinstance(given, list) and (found or given) else {}


def _read_plugin(text: str, key: yaml12.KeyPath, source: RawConfig, variables: Mapping[str, str]) -> dict[str, Any]:
    here = Path.cwd() if source.location(key) in (_COMMAND_LINE, _OVERRIDES) else source.folder
    path = here / Path(_expand(text, key, variables, [])).expanduser()
    content = plugins.read(path)
    registers = plugins.declared(content, path)
    return {"file": str(path), "sha256": plugins.sha256(content), "registers": registers}


def _names(data: Mapping[str, Any]) -> Iterator[tuple[yaml12.KeyPath, registry.Kind, tuple[str, ...]]]:
    """Yield the keys of a config that take a registered name: key, kind, and other allowed values."""
    yield ("task",), "task", ()
    yield ("model", "family"), "model", ()
    yield ("data", "source"), "source", (MIXTURE,)
    parts = _value(data, ("data", "parts"))
    for index in range(len(parts) if isinstance(parts, list) else 0):
        yield ("data", "parts", index, "source"), "source", ()


def _value(data: Any, path: yaml12.KeyPath) -> Any:
    for key in path:
        inside = isinstance(data, dict) or (isinstance(data, list) and isinstance(key, int))
        data = (data.get(key) if isinstance(data, dict) else data[key]) if inside else None
    return data


def _registered_twice(known: Sequence[Any]) -> Iterator[tuple[yaml12.KeyPath, str]]:
    seen: set[tuple[str, str]] = set()
    for kind, name in [(kind, name) for plugin in known for kind, own in plugin.registers.items() for name in own]:
        if (kind, name) in seen or (kind in ("task", "source", "model") and registry.lookup(kind, name)):
            yield ("plugins",), f"{kind} {name} is already registered; choose another name"
        seen.add((kind, name))


def _option_errors(value: Any, path: yaml12.KeyPath) -> list[tuple[yaml12.KeyPath, str]]:
    """Return errors of texts that are written to a batch script, as all of `job` is."""
    if isinstance(value, dict):
        return [fault for key, item in value.items() for fault in _option_errors(item, (*path, key))]
    if isinstance(value, list):
        return [fault for number, item in enumerate(value) for fault in _option_errors(item, (*path, number))]
    fault = option_error(value) if isinstance(value, str) else None
    return [(path, fault)] if fault else []


def _last_data_locations(path: Path, data: Data, site: Site) -> dict[str, str]:
    """Return the newest recorded location of a run's data that exists on this machine."""
    note = path.with_name(DATA_PATHS)
    for locations in reversed(files.read_json(note) if note.is_file() else []):
        absolute = (
            text.replace(STORE, str(site.store), 1) for text in data.with_locations(locations).locations.values()
        )
        if all(Path(text).exists() for text in absolute if text.startswith("/")):
            found: dict[str, str] = locations
            return found
    return {}


def _with_stored_paths(section: S, source: RawConfig, site: Site, folder: Path) -> S:
    """Return the section with paths in stored form.

    Args:
        folder: the folder to which the file's paths are relative.

    Raises:
        UserError: an invalid path: too long, or with an unknown user (`~name`).
    """

    def stored(key: tuple[int | str, ...], text: str, kind: PathKind) -> str:
        here = Path.cwd() if source.location(key) in (_COMMAND_LINE, _OVERRIDES) else folder
        try:
            return stored_text(text, kind, here, site.store)
        except (OSError, RuntimeError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            location = f"{source.location(key)}: {'.'.join(map(str, key))}"
            raise UserError(f"{location}: {text[:200]!r} cannot be a path: {reason}") from None

    return map_paths(section, stored)


def load_section(
    schema: type[S], config: ConfigSource, overrides: Overrides, site: Site, environment: Mapping[str, str] = os.environ
) -> S:
    """Read and check a config that is no experiment but follows the same rules.

    Raises:
        UserError: all errors, one per line.
    """
    source = read_raw_config(config, overrides)
    errors: list[tuple[yaml12.KeyPath, str]] = []
    expanded = _expand(source.data, (), {**environment, "store": str(site.store)}, errors)
    return _with_absolute_paths(_validate(schema, expanded, errors, source), source, site)


def validate_section(schema: type[S], data: dict[str, Any], site: Site) -> S:
    """Validate fields from the command line.

    Raises:
        UserError: all errors, one per line.
    """
    source = RawConfig(Path(_COMMAND_LINE), data, {})
    return _with_absolute_paths(_validate(schema, data, [], source), source, site)


def _with_absolute_paths(section: S, source: RawConfig, site: Site) -> S:
    located = _with_stored_paths(section, source, site, source.folder)
    return map_paths(located, lambda key, text, kind: text.replace(STORE, str(site.store), 1))


def _read(path: Path) -> tuple[dict[str, Any], dict[yaml12.KeyPath, int]]:
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(yaml12.MAX_CHARACTERS + 1)
    except FileNotFoundError:
        raise UserError(f"{path}: no such config file", _similar_files(path)) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    data, lines = yaml12.load(text, str(path))
    if not isinstance(data, dict):
        raise UserError(f"{path}: not a mapping of keys to values", "See configs/digits.yaml.")
    return data, lines


def _similar_files(path: Path) -> str:
    names = [str(candidate) for candidate in sorted(path.parent.glob("*.yaml"))] if path.parent.is_dir() else []
    near = difflib.get_close_matches(str(path), names, n=1)
    return f"Did you mean {near[0]}?" if near else ""


def _expand(value: Any, path: yaml12.KeyPath, variables: Mapping[str, str], errors: list[Any]) -> Any:
    if isinstance(value, dict):
        return {key: _expand(item, (*path, key), variables, errors) for key, item in value.items()}
    if isinstance(value, list):
        return [_expand(item, (*path, index), variables, errors) for index, item in enumerate(value)]
    if not isinstance(value, str):
        return value
    if holds_secret(value, variables):
        errors.append((path, "holds a secret or a URL with a password, and a config is saved with every run"))
    for name in _VARIABLE.findall(value):
        if names_secret(name) or holds_secret(variables.get(name, ""), variables):
            errors.append((path, f"${{{name}}} looks like a secret, and a config is saved with every run"))
        elif name not in variables:
            errors.append((path, f"${{{name}}} is neither ${{store}} nor set in the environment"))
    return _VARIABLE.sub(lambda match: variables.get(match[1], match[0]), value)


def _validate(
    schema: type[S],
    data: dict[str, Any],
    errors: list[tuple[yaml12.KeyPath, str]],
    source: RawConfig,
) -> S:
    """Return the validated section; raises its errors together with earlier `errors`."""
    try:
        section = schema.model_validate(data)
        if not errors:
            return section
    except ValidationError as error:
        for item in error.errors():
            location = _key_in_file(item["loc"])
            errors.append((location, _plain_message(schema, item, location)))
    lines = [f"{source.location(key)}: {'.'.join(map(str, key)) or 'config'}: {message}" for key, message in errors]
    raise UserError("\n".join(lines))


def _key_in_file(location: tuple[int | str, ...]) -> yaml12.KeyPath:
    """Remove what pydantic adds to a location: the method after `adapter`, and [key] after an invalid key."""
    if len(location) > 1 and location[0] == "adapter":
        return (location[0], *location[2:])
    return location[:-1] if location[-1:] == ("[key]",) else location


def _plain_message(schema: type[Section], item: Any, location: yaml12.KeyPath) -> str:
    kind, context, value = item["type"], item.get("ctx", {}), item["input"]
    if kind == "extra_forbidden":
        return _unknown_key_message(location, _known_keys(schema, location))
    if location[:2] == ("job", "sbatch") and location[-1] in REFUSED_SBATCH_OPTIONS:
        return REFUSED_SBATCH_OPTIONS[str(location[-1])]
    if item["loc"][-1:] == ("[key]",):
        return _unknown_key_message(location, re.findall(r"'([^']+)'", str(context.get("expected"))))
    if kind == "string_pattern_mismatch":
        return f"must be {_PATTERNS[context['pattern']]}, got {value!r:.200}"
    if kind == "value_error":
        return str(context["error"]) + ("" if isinstance(value, dict) else f", got {value!r:.200}")
    if kind in ("missing", "union_tag_not_found"):
        return "is missing" + (": set method" if kind == "union_tag_not_found" else "")
    plain = {
        "string_type": "must be text",
        "string_too_long": f"must have at most {context.get('max_length')} characters",
        "int_type": "must be a whole number",
        "float_type": "must be a number",
        "bool_type": "must be true or false",
        "list_type": "must be a list",
        "dict_type": "must be a mapping",
        "model_type": "must be a mapping",
        "model_attributes_type": "must be a mapping",
        "literal_error": f"must be {context.get('expected')}",
        "union_tag_invalid": f"method must be one of {context.get('expected_tags')}",
        "finite_number": "must be a finite number",
        "greater_than": f"must be greater than {context.get('gt')}",
        "greater_than_equal": f"must be at least {context.get('ge')}",
        "less_than": f"must be below {context.get('lt')}",
        "less_than_equal": f"must be at most {context.get('le')}",
    }
    return f"{plain.get(kind, item['msg'])}, got {value!r:.200}"


def _unknown_key_message(location: yaml12.KeyPath, known: list[str]) -> str:
    near = difflib.get_close_matches(str(location[-1]), known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
    return f"unknown key; {hint}" if known else "unknown key"


def _known_keys(schema: type[Section], location: yaml12.KeyPath) -> list[str]:
    """Return the known keys of the section of an unknown key."""
    sections: list[type[BaseModel]] = [schema]
    for name in [name for name in location[:-1] if isinstance(name, str)]:
        inner = []
        for section in sections:
            if name in section.model_fields:
                annotation = section.model_fields[name].annotation
                candidates = get_args(annotation) or (annotation,)
                inner += [item for item in candidates if isinstance(item, type) and issubclass(item, BaseModel)]
        sections = inner
    return [field.alias or key for section in sections for key, field in section.model_fields.items()]
