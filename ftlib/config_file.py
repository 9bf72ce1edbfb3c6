"""Read a config: a YAML file and `KEY=VALUE` overrides in, a checked `Experiment` out.

All faults are collected and reported at once, each with file and line (or "command line"), the dotted field and,
for an unknown key, the nearest known one.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from ftlib import files, training_fields, yaml_core
from ftlib.config import Config, Section
from ftlib.config_base import NAME, PathKind
from ftlib.config_data import Data
from ftlib.errors import UserError
from ftlib.identity import identity, lasting, recipes_of
from ftlib.job_options import DURATION, MEMORY, WORD, SbatchOption
from ftlib.local_paths import STORE, stored_text, with_paths
from ftlib.site import Site

S = TypeVar("S", bound=Section)
_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
_SECRET = re.compile(r"TOKEN|SECRET|PASSW|API_?KEY", re.IGNORECASE)
_COMMAND_LINE = "command line"
RUN_CONFIG = "config.yaml"
"""What a run's config is called in its folder."""
DATA_PATHS = "data_paths.json"
"""What says, beside it, where a run's data have been found since: `Experiment.elsewhere`, the newest last."""
_PATTERNS = {
    NAME: "of letters, digits, '.', '_' and '-', a letter or digit first",
    WORD: "one word",
    MEMORY: "a size such as 48G",
    DURATION: "a time such as 08:00:00 or 2-00:00:00",
}


@dataclass(frozen=True)
class RunName:
    """A name that a run of a config may have.

    Attributes:
        identity: 12 hexadecimal digits; the hash of the fields that decide the trained weights.
        recipe: that the identity stands for, see `identity.RECIPES`.
        raw: the config as plain data: defaults filled in, `${store}` as written.
    """

    identity: str
    recipe: int
    raw: dict[str, Any]


@dataclass(frozen=True)
class Experiment:
    """A checked config.

    Attributes:
        config: ready to use, variables expanded.
        names: those that a run of it may have, the newest recipe's first; before them, of a config in a run folder,
            the folder's.
        elsewhere: key of `data` → where the run's data lie, as it is stored, if that is not what its name stands for.
    """

    config: Config
    names: tuple[RunName, ...]
    elsewhere: dict[str, str] = field(default_factory=dict)

    @property
    def identity(self) -> str:
        """What names the run: its folder's name, or the newest recipe's."""
        return self.names[0].identity

    def named(self, identity: str) -> RunName:
        """The name with an identity; the first without one of that."""
        return next((name for name in self.names if name.identity == identity), self.names[0])

    def named_by(self, places: Mapping[str, str]) -> Experiment:
        """The same experiment under the names that it would have with its data at other places.

        Args:
            places: see `Data.places`, as stored.
        """
        names: dict[str, RunName] = {}
        for name in self.names:
            form = Config.model_validate(name.raw)
            form = form.model_copy(update={"data": form.data.at(places)})
            raw = lasting(form, {"Config": ("sweep",)})
            names.setdefault(found := identity(form, name.recipe), RunName(found, name.recipe, raw))
        changed = {key: text for key, text in self.stored_data.places.items() if places.get(key) != text}
        return replace(self, names=tuple(names.values()), elsewhere=changed)

    @property
    def stored_data(self) -> Data:
        """The data section of the first name."""
        return Data.model_validate(self.names[0].raw["data"])

    def to_yaml(self, identity: str = "") -> str:
        """The resolved config, as it is saved with a run of that identity."""
        return yaml_core.dump(self.named(identity).raw)


@dataclass(frozen=True)
class Source:
    """A config file with its overrides, not checked yet.

    Attributes:
        path: the file.
        data: its content.
        places: where each key and list item stands, as messages name it.
    """

    path: Path
    data: dict[str, Any]
    places: dict[yaml_core.Path, str]

    def place(self, key: yaml_core.Path) -> str:
        """Where a key stands, or else what it would stand in."""
        known = (self.places[key[:length]] for length in range(len(key), 0, -1) if key[:length] in self.places)
        return next(known, str(self.path))


def load_experiment(
    path: Path, overrides: Sequence[str], site: Site, environment: Mapping[str, str] = os.environ
) -> Experiment:
    """Read and check a config file.

    Args:
        path: the YAML file.
        overrides: `KEY=VALUE` with a dotted key; the value is read as YAML would read it.
        site: gives `${store}`.
        environment: gives every other `${NAME}`.

    Raises:
        UserError: every fault found, one a line; or the file stands for several runs.
    """
    source = read_source(path, overrides)
    if source.data.get("sweep") is not None:
        problem = f"{source.place(('sweep',))}: sweep: this config stands for several runs"
        remedy = (
            f"Send them all: ftlib submit {path}\nOr take one by hand: add sweep=null and the KEY=VALUE that make it."
        )
        raise UserError(problem, remedy)
    return check(source, site, environment)


def read_source(path: Path, overrides: Sequence[str]) -> Source:
    """Read a config file and set the overrides in it.

    Raises:
        UserError: no such file, no YAML, or an override that is none.
    """
    data, lines = _read(path)
    places: dict[yaml_core.Path, str] = {key: f"{path}:{line}" for key, line in lines.items()}
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not all(key.split(".")):
            raise UserError(f"{_COMMAND_LINE}: {text!r} is not KEY=VALUE", "For example: training.learning_rate=1e-4")
        set_field(data, places, key, yaml_core.load_value(value, _COMMAND_LINE), _COMMAND_LINE)
    return Source(path, data, places)


def set_field(data: dict[str, Any], places: dict[yaml_core.Path, str], key: str, value: Any, place: str) -> None:
    """Set a field by its dotted key, and note where the value comes from.

    Raises:
        UserError: the key leads into something that is no section.
    """
    names = tuple(key.split("."))
    section: Any = data
    for name in names[:-1]:
        section = section.setdefault(name, {}) if isinstance(section, dict) else None
    if not isinstance(section, dict):
        raise UserError(f"{place}: {key}: there is no section of that name to set a key in")
    section[names[-1]] = value
    for known in [known for known in places if known[: len(names)] == names]:
        del places[known]  # what stood below has been replaced
    for length in range(1, len(names) + 1):
        places.setdefault(names[:length], place)
    places[names] = place


def check(source: Source, site: Site, environment: Mapping[str, str] = os.environ) -> Experiment:
    """Check one experiment.

    Raises:
        UserError: every fault found, one a line.
    """
    faults: list[tuple[yaml_core.Path, str]] = []
    movable = _expand(source.data, (), {**environment, "store": "${store}"}, faults)
    expanded = _expand(movable, (), {"store": str(site.store)}, [])
    if isinstance(expanded.get("training"), dict):
        faults += [(("training", name), message) for name, message in training_fields.faults(expanded["training"])]
    _validate(Config, expanded, faults, source)
    written = Config.model_validate(movable)
    own = source.path.absolute().parent.name if source.path.name == RUN_CONFIG else ""
    from_here = _located(written, source, site, Path.cwd())  # as version 0.1 took relative paths
    kept = any(identity(written, recipe) == own for recipe in recipes_of(written))
    config = from_here if kept else _located(written, source, site, source.path.absolute().parent)
    absolute = with_paths(config, lambda key, text, kind: text.replace(STORE, str(site.store), 1))
    forms = [config, *([written] if from_here == config else []), absolute]  # the latter two named runs of version 0.1
    names: dict[str, RunName] = {}
    for recipe in recipes_of(config):
        for form in forms:
            name = RunName(identity(form, recipe), recipe, lasting(form, {"Config": ("sweep",)}))
            names.setdefault(name.identity, name)
    ordered = sorted(names.values(), key=lambda name: name.identity != own)
    elsewhere = _elsewhere(source.path, config.data, site) if ordered[0].identity == own else {}
    config = config.model_copy(update={"data": config.data.at(elsewhere)})
    final = _expand(lasting(config), (), {"store": str(site.store)}, [])
    return Experiment(Config.model_validate(final), tuple(ordered), elsewhere)


def _elsewhere(path: Path, data: Data, site: Site) -> dict[str, str]:
    """Where a run's data were found last of all places that are there: on other machines it may be another one."""
    note = path.with_name(DATA_PATHS)
    for places in reversed(files.read_json(note) if note.is_file() else []):
        absolute = (text.replace(STORE, str(site.store), 1) for text in data.at(places).places.values())
        if all(Path(text).exists() for text in absolute if text.startswith("/")):
            found: dict[str, str] = places
            return found
    return {}


def _located(section: S, source: Source, site: Site, folder: Path) -> S:
    """The section with its paths as they are stored.

    Args:
        folder: what relative paths of the file count from.
    """

    def stored(key: tuple[int | str, ...], text: str, kind: PathKind) -> str:
        here = Path.cwd() if source.place(key) == _COMMAND_LINE else folder
        return stored_text(text, kind, here, site.store)

    return with_paths(section, stored)


def load_section(
    schema: type[S], path: Path, overrides: Sequence[str], site: Site, environment: Mapping[str, str] = os.environ
) -> S:
    """Read and check a file that is no experiment but follows the same rules.

    Raises:
        UserError: every fault found, one a line.
    """
    source = read_source(path, overrides)
    faults: list[tuple[yaml_core.Path, str]] = []
    expanded = _expand(source.data, (), {**environment, "store": str(site.store)}, faults)
    return _with_absolute_paths(_validate(schema, expanded, faults, source), source, site)


def check_section(schema: type[S], data: dict[str, Any], site: Site) -> S:
    """Check fields that come from the command line.

    Raises:
        UserError: every fault found, one a line.
    """
    source = Source(Path(_COMMAND_LINE), data, {})
    return _with_absolute_paths(_validate(schema, data, [], source), source, site)


def _with_absolute_paths(section: S, source: Source, site: Site) -> S:
    located = _located(section, source, site, source.path.absolute().parent)
    return with_paths(located, lambda key, text, kind: text.replace(STORE, str(site.store), 1))


def _read(path: Path) -> tuple[dict[str, Any], dict[yaml_core.Path, int]]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such config file", _near_files(path)) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    data, lines = yaml_core.load(text, str(path))
    if not isinstance(data, dict):
        raise UserError(f"{path}: a config is a mapping of keys to values, this is not", "See configs/digits.yaml.")
    return data, lines


def _near_files(path: Path) -> str:
    names = [str(candidate) for candidate in sorted(path.parent.glob("*.yaml"))] if path.parent.is_dir() else []
    near = difflib.get_close_matches(str(path), names, n=1)
    return f"Did you mean {near[0]}?" if near else ""


def _expand(value: Any, path: yaml_core.Path, variables: Mapping[str, str], faults: list[Any]) -> Any:
    if isinstance(value, dict):
        return {key: _expand(item, (*path, key), variables, faults) for key, item in value.items()}
    if isinstance(value, list):
        return [_expand(item, (*path, index), variables, faults) for index, item in enumerate(value)]
    if not isinstance(value, str):
        return value
    for name in _VARIABLE.findall(value):
        if _SECRET.search(name):
            faults.append((path, f"${{{name}}} looks like a secret, and a config is saved with every run"))
        elif name not in variables:
            faults.append((path, f"${{{name}}} is neither ${{store}} nor set in the environment"))
    return _VARIABLE.sub(lambda match: variables.get(match[1], match[0]), value)


def _validate(
    schema: type[S],
    data: dict[str, Any],
    faults: list[tuple[yaml_core.Path, str]],
    source: Source,
) -> S:
    """The checked section; `faults` found before are told together with its own."""
    try:
        section = schema.model_validate(data)
        if not faults:
            return section
    except ValidationError as error:
        for item in error.errors():
            location = _as_in_the_file(item["loc"])
            faults.append((location, _plain(schema, item, location)))
    lines = [f"{source.place(key)}: {'.'.join(map(str, key)) or 'config'}: {message}" for key, message in faults]
    raise UserError("\n".join(lines))


def _as_in_the_file(location: tuple[int | str, ...]) -> yaml_core.Path:
    """pydantic puts the chosen method's name behind `adapter`, and [key] behind a wrong key; the file has neither."""
    if len(location) > 1 and location[0] == "adapter":
        return (location[0], *location[2:])
    return location[:-1] if location[-1:] == ("[key]",) else location


def _plain(schema: type[Section], item: Any, location: yaml_core.Path) -> str:
    kind, context, value = item["type"], item.get("ctx", {}), item["input"]
    if kind == "extra_forbidden":
        return _unknown(location, _known_keys(schema, location))
    if item["loc"][-1:] == ("[key]",):
        return _unknown(location, list(get_args(SbatchOption)))
    if kind == "string_pattern_mismatch":
        return f"must be {_PATTERNS[context['pattern']]}, got {value!r}"
    if kind == "value_error":
        return str(context["error"]) + ("" if isinstance(value, dict) else f", got {value!r}")
    if kind in ("missing", "union_tag_not_found"):
        return "is missing" + (": say which method" if kind == "union_tag_not_found" else "")
    plain = {
        "string_type": "must be text",
        "int_type": "must be a whole number",
        "float_type": "must be a number",
        "bool_type": "must be true or false",
        "list_type": "must be a list",
        "dict_type": "must be a mapping",
        "model_type": "must be a mapping",
        "model_attributes_type": "must be a mapping",
        "literal_error": f"must be {context.get('expected')}",
        "union_tag_invalid": f"method must be one of {context.get('expected_tags')}",
        "greater_than": f"must be greater than {context.get('gt')}",
        "greater_than_equal": f"must be at least {context.get('ge')}",
        "less_than": f"must be below {context.get('lt')}",
        "less_than_equal": f"must be at most {context.get('le')}",
    }
    return f"{plain.get(kind, item['msg'])}, got {value!r}"


def _unknown(location: yaml_core.Path, known: list[str]) -> str:
    near = difflib.get_close_matches(str(location[-1]), known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
    return f"unknown key; {hint}" if known else "unknown key"


def _known_keys(schema: type[Section], location: yaml_core.Path) -> list[str]:
    """The keys of the section that an unknown key stands in."""
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
