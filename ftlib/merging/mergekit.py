"""Convert mergekit's YAML to a recipe of ftlib; unsupported methods and settings are errors.

github.com/arcee-ai/mergekit, "Merge Configuration". Defaults are mergekit's: density 1, and sums divided by the weights
with `ties` and `linear` only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ftlib.config.loader import ConfigSource, Overrides, load_section, read_raw_config, validate_section
from ftlib.core.paths import Site
from ftlib.errors import UserError
from ftlib.merging.recipe import Recipe, model_letter

_METHODS = ("linear", "task_arithmetic", "ties", "dare_linear", "dare_ties", "slerp")
_KEYS = {
    "merge_method",
    "base_model",
    "models",
    "parameters",
    "dtype",
    "out_dtype",
    "tokenizer_source",
    "chat_template",
}
_PARAMETERS = {
    "linear": {"weight", "normalize"},
    "slerp": {"t"},
    "task_arithmetic": {"weight", "normalize", "lambda"},
    **{key: {"weight", "density", "normalize", "lambda", "rescale"} for key in ("ties", "dare_linear", "dare_ties")},
}
_WITHOUT_EFFECT = {"int8_mask"}
"""Settings that do not change mergekit's result."""


def load_recipe(
    config: ConfigSource, overrides: Overrides, site: Site, options: Mapping[str, Any] | None = None
) -> Recipe:
    """The recipe in a config of ftlib, or in mergekit's.

    Args:
        options: fields of the command line; beside a config only `output`, and only with mergekit's.

    Raises:
        UserError: every fault found, one a line; or an option that has no effect beside a config.
    """
    options = dict(options or {})
    source = read_raw_config(config, overrides)
    if is_mergekit(source.data) and not options.keys() - {"output"}:
        fields = {key: value for key, value in source.data.items() if key != "output"}
        recipe = {"output": source.data.get("output"), **as_recipe(fields, str(source.path)), **options}
        return validate_section(Recipe, recipe, site)
    if options:
        problem = f"--{min(options)}: with a config file, set fields with KEY=VALUE"
        raise UserError(problem, f"For example: ftlib merge {source.path} density=0.2")
    return load_section(Recipe, config, overrides, site)


def is_mergekit(data: Mapping[str, Any]) -> bool:
    """Whether the content of a YAML file is a mergekit configuration."""
    return "merge_method" in data


def as_recipe(data: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the fields of a recipe, without its output.

    Args:
        where: the file, for messages.

    Raises:
        UserError: an unsupported method or setting.
    """
    method = data["merge_method"]
    if method not in _METHODS:
        raise _unsupported(where, f"merge_method: {method}", f"Supported methods: {', '.join(_METHODS)}.")
    if other := sorted(data.keys() - _KEYS):
        raise _unsupported(where, other[0])
    if data.get("chat_template", "auto") != "auto":
        raise _unsupported(where, "chat_template", "Use --tokenizer-from to choose the chat template.")
    models = [_model(entry, data, where) for entry in data.get("models") or ()]
    if not models:
        raise UserError(f"{where}: models: is missing or empty")
    base = data.get("base_model") or (models[0]["model"] if method == "linear" else None)
    if not base:
        raise UserError(f"{where}: base_model: method {method} needs one")
    shared = data.get("parameters") or {}
    _check_names(shared, method, where, "parameters")
    fields: dict[str, Any] = {"base": base, "method": method}
    if method == "slerp":
        fields["models"] = _slerp_models(models, base, _number(shared, "t", where), where)
    else:
        fields |= _sum_fields(models, base, method, shared, where)
    if dtype := data.get("out_dtype") or data.get("dtype"):
        fields["dtype"] = dtype
    return fields | _tokenizer(data.get("tokenizer_source"), base, fields["models"], where)


def _model(entry: Any, data: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return one of `models`; `BASE+ADAPTER` is an adapter of the base."""
    found: dict[str, Any] = {"model": entry} if isinstance(entry, str) else dict(entry)
    if other := sorted(found.keys() - {"model", "parameters"}):
        raise _unsupported(where, f"models: {other[0]}")
    name, plus, adapter = str(found["model"]).partition("+")
    if plus and name != data.get("base_model"):
        raise _unsupported(where, f"models: {found['model']}: an adapter of another model than base_model")
    parameters = found.get("parameters") or {}
    _check_names(parameters, data["merge_method"], where, "models.parameters")
    return {"model": adapter or name, "parameters": parameters}


def _check_names(parameters: Mapping[str, Any], method: str, where: str, key: str) -> None:
    if other := sorted(parameters.keys() - _PARAMETERS[method] - _WITHOUT_EFFECT):
        raise _unsupported(
            where, f"{key}.{other[0]}", f"Method {method} takes: {', '.join(sorted(_PARAMETERS[method]))}."
        )


def _sum_fields(
    models: list[dict[str, Any]], base: str, method: str, shared: Mapping[str, Any], where: str
) -> dict[str, Any]:
    merged = [each for each in models if method == "linear" or each["model"] != base]  # the base has no update
    weights = [_number({**shared, **each["parameters"]}, "weight", where) for each in merged]
    fields: dict[str, Any] = {
        "models": [{"model": each["model"], "weight": weight} for each, weight in zip(merged, weights, strict=True)]
    }
    if "density" in _PARAMETERS[method]:
        given = {_number({"density": 1.0, **shared, **each["parameters"]}, "density", where) for each in merged}
        if len(given) > 1:
            raise _unsupported(where, "models.parameters.density: different values for the models")
        fields["density"] = given.pop() if given else 1.0
    if shared.get("rescale", True) is not True:
        raise _unsupported(where, "parameters.rescale: false", "DARE always divides by the density.")
    normalize = shared.get("normalize", method in ("linear", "ties"))
    if method == "linear":
        if not normalize:
            raise _unsupported(where, "parameters.normalize: false with linear", "task_arithmetic does not divide.")
        return fields
    fields["normalize"] = "weights" if normalize else "none"
    return {**fields, **({"lambda": _number(shared, "lambda", where)} if "lambda" in shared else {})}


def _slerp_models(models: list[dict[str, Any]], base: str, t: float, where: str) -> list[dict[str, Any]]:
    others = [each["model"] for each in models if each["model"] != base]
    if len(others) != 1:
        raise UserError(f"{where}: models: method slerp needs base_model and one other model, not {len(others)}")
    return [{"model": base, "weight": 1 - t}, {"model": others[0], "weight": t}]


def _number(parameters: Mapping[str, Any], name: str, where: str) -> float:
    value = parameters.get(name)
    if value is None:
        raise UserError(f"{where}: {name} is missing")
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise _unsupported(
            where, f"{name}: {value!r:.60}", "Only single numbers are supported, no gradients and filters over layers."
        )
    return float(value)


def _tokenizer(source: Any, base: str, models: list[dict[str, Any]], where: str) -> dict[str, Any]:
    if source in (None, "union"):  # ftlib's default: the union of tokens, or an error if they conflict
        return {}
    if source == "base" or source == base:
        return {"tokenizer_from": "base"}
    name = str(source).removeprefix("model:")
    letters = [model_letter(number) for number, each in enumerate(models) if each["model"] == name]
    if not letters:
        raise _unsupported(where, f"tokenizer_source: {source}")
    return {"tokenizer_from": letters[0]}


def _unsupported(where: str, what: str, remedy: str = "") -> UserError:
    return UserError(f"{where}: {what}: this part of mergekit's configuration is not supported", remedy)
