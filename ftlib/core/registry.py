"""Tasks, data sources and model families by name: built in, or from plugins.

Each has an entry: facts that can be read without importing the module that implements it. Built-in entries are the
tables `TASKS`, `SOURCES` and `MODELS`. A plugin declares its entries by the literal arguments of `@register_task`,
`@register_source` and `@register_model`; `ftlib.core.plugins` reads them without running the file. The decorators add
the function when the module is imported, which only `load` does.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from ftlib.core import plugins as core_plugins
from ftlib.core.metric_table import METRICS
from ftlib.core.plugins import Plugin
from ftlib.errors import UserError

Kind = Literal["task", "source", "model"]
Directions = Mapping[str, Mapping[str, bool]]
"""Metric → {"higher_is_better": whether it is}; the metric that stands for all others first."""
Function = TypeVar("Function", bound=Callable[..., Any])
Made = TypeVar("Made")


@dataclass(frozen=True)
class TaskEntry:
    """A task (`tasks.base.Task`).

    Attributes:
        metrics: of tables, the headline first.
        closed_labels: whether the answers are a closed set.
        scorer: the module whose `score` reads result files for `ftlib score`; "" for none.
        scored_as: the task's name in `ftlib score`, if it is another one.
        module: that implements it; "" for a plugin's.
        rule: name and version of its metrics' rules; "" for a plugin's.
    """

    name: str
    title: str
    metrics: Directions
    closed_labels: bool = False
    scorer: str = ""
    scored_as: str = ""
    module: str = ""
    rule: str = ""


@dataclass(frozen=True)
class SourceEntry:
    """A data source: a module with `examples` and `files`.

    Attributes:
        split_files: whether `data.files` names one file for each split, or several; "" if it is not for this source.
        split_names: whether rows, folders or files name their splits as their authors like (`data.splits`).
        encodings: whether files may have another encoding than UTF-8 (`data.encoding`).
        module: that implements it; "" for a plugin's.
    """

    name: str
    title: str
    split_files: Literal["", "one", "several"] = ""
    split_names: bool = False
    encodings: bool = False
    module: str = ""


@dataclass(frozen=True)
class ModelEntry:
    """A model family (`models.registry.ModelFamily`).

    Attributes:
        model_class: the class of transformers that loads its weights.
        pipeline_tag: of model cards.
        parts: that `adapter.freeze` may name and its models have.
        images: whether its rows may have images: none, one or several.
        chat: whether it has chat templates (`data.prompt: chat`).
        packing: whether rows can share sequences and prompts carry loss (`loss.packing`, `loss.on: everything`).
        auto_processor: whether all prompts and images go through the model's own processor: every prompt is written by
            its chat template, images as `model.image_arguments` say, and their tokens depend on their size.
        module: that implements it; "" for a plugin's.
    """

    name: str
    title: str
    model_class: str
    pipeline_tag: str
    parts: tuple[str, ...] | list[str] = ("embeddings", "language")
    images: bool = False
    chat: bool = False
    packing: bool = False
    auto_processor: bool = False
    module: str = ""


Entry = TaskEntry | SourceEntry | ModelEntry


_SOURCES, _TASKS = "ftlib.data.sources", "ftlib.tasks"


def _task(name: str, title: str, scorer: str, **more: Any) -> TaskEntry:
    """The entry of a built-in task, with the metrics of `metric_table.METRICS`."""
    table = METRICS[name]
    directions = {metric: {"higher_is_better": info.higher_is_better} for metric, info in table.columns.items()}
    return TaskEntry(name, title, directions, scorer=scorer, module=f"{_TASKS}.{name}", rule=table.rule, **more)


TASKS: dict[str, TaskEntry] = {
    entry.name: entry
    for entry in (
        _task("vqa", "visual question answering", f"{_SOURCES}.vqav2"),
        _task("docvqa", "questions about documents", f"{_SOURCES}.docvqa"),
        _task("gqa", "GQA", f"{_SOURCES}.gqa"),
        _task("caption", "captions", f"{_SOURCES}.coco_captions"),
        _task("detect", "object detection", f"{_SOURCES}.coco_detection"),
        _task("refer", "boxes of referring expressions", f"{_TASKS}.refer"),
        _task("segment", "masks of referring expressions", f"{_TASKS}.segment"),
        _task("classify", "classification", f"{_TASKS}.classify", closed_labels=True),
        _task("instruct", "instructions", f"{_TASKS}.instruct", scored_as="text"),
    )
}

SOURCES: dict[str, SourceEntry] = {
    entry.name: entry
    for entry in (
        SourceEntry("coco_captions", "COCO captions", "one", module=f"{_SOURCES}.coco_captions"),
        SourceEntry("coco_detection", "COCO instances", "one", module=f"{_SOURCES}.coco_detection"),
        SourceEntry("csv", "CSV", "several", True, True, module=f"{_SOURCES}.csv_table"),
        SourceEntry("digits", "handwritten digits, made by ftlib stage", module=f"{_SOURCES}.jsonl"),
        SourceEntry("digits_detect", "digits with boxes, made by ftlib stage", module=f"{_SOURCES}.jsonl"),
        SourceEntry("docvqa", "DocVQA", module=f"{_SOURCES}.docvqa"),
        SourceEntry("folder", "a folder of images for each label", split_names=True, module=f"{_SOURCES}.imagefolder"),
        SourceEntry("gqa", "GQA", module=f"{_SOURCES}.gqa"),
        SourceEntry("hub", "datasets of the Hugging Face hub", split_names=True, module=f"{_SOURCES}.hf_datasets"),
        SourceEntry("instructions", "instructions and chats", "several", True, True, module=f"{_SOURCES}.instructions"),
        SourceEntry("jsonl", "JSON Lines", "several", True, True, module=f"{_SOURCES}.jsonl"),
        SourceEntry("refcoco", "RefCOCO", module=f"{_SOURCES}.refcoco"),
        SourceEntry("refcoco+", "RefCOCO+", module=f"{_SOURCES}.refcoco"),
        SourceEntry("refcocog", "RefCOCOg", module=f"{_SOURCES}.refcoco"),
        SourceEntry("string_tasks", "string tasks, made by ftlib stage", module=f"{_SOURCES}.instructions"),
        SourceEntry("vqav2", "VQAv2", module=f"{_SOURCES}.vqav2"),
    )
}

MODELS: dict[str, ModelEntry] = {
    entry.name: entry
    for entry in (
        ModelEntry("paligemma", "PaliGemma 1 and 2", "PaliGemmaForConditionalGeneration", "image-text-to-text",
                   parts=("vision", "projector", "embeddings", "language"), images=True,
                   module="ftlib.models.paligemma"),
        ModelEntry("vlm", "vision-language models with a chat template", "AutoModelForImageTextToText",
                   "image-text-to-text", parts=("vision", "projector", "embeddings", "language"), images=True,
                   chat=True, auto_processor=True, module="ftlib.models.vlm"),
        ModelEntry("causal", "causal language models", "AutoModelForCausalLM", "text-generation",
                   chat=True, packing=True, module="ftlib.models.causal_lm"),
    )
}  # fmt: skip

_TABLES: dict[str, Mapping[str, Entry]] = {"task": TASKS, "source": SOURCES, "model": MODELS}
_TYPES: dict[str, type[Any]] = {"task": TaskEntry, "source": SourceEntry, "model": ModelEntry}
_FUNCTIONS: dict[tuple[str, str, str], Callable[..., Any]] = {}
"""(kind, name, name of the module) → what a decorator has registered."""


def names(kind: Kind, plugins: Sequence[Plugin] = ()) -> list[str]:
    """What a config may name: built in, then what plugins register."""
    return sorted(_TABLES[kind]) + [name for plugin in plugins for name in plugin.registers.get(kind, {})]


def lookup(kind: Kind, name: str, plugins: Sequence[Plugin] = ()) -> Any:
    """The entry of a name; None without one. Nothing is imported."""
    if name in _TABLES[kind]:
        return _TABLES[kind][name]
    plugin = provider(kind, name, plugins)
    return _TYPES[kind](**{"title": "", **plugin.registers[kind][name]}, name=name) if plugin else None


def find(kind: Kind, name: str, plugins: Sequence[Plugin] = ()) -> Any:
    """The entry of a name. Nothing is imported.

    Raises:
        UserError: nothing of that name is registered.
    """
    if (entry := lookup(kind, name, plugins)) is None:
        raise UserError(f"{kind} {name}: {unknown_name_message(kind, name, plugins)}")
    return entry


def provider(kind: Kind, name: str, plugins: Sequence[Plugin]) -> Plugin | None:
    """The plugin that registers a name; None for built-in names, which plugins cannot replace."""
    if name in _TABLES[kind]:
        return None
    return next((plugin for plugin in plugins if name in plugin.registers.get(kind, {})), None)


def unknown_name_message(kind: Kind, name: object, plugins: Sequence[Plugin] = (), also: Sequence[str] = ()) -> str:
    """What to say of a name that is not registered.

    Args:
        also: further names that are allowed there.
    """
    known = [*names(kind, plugins), *(each for each in core_plugins.installed(kind)), *also]
    near = difflib.get_close_matches(str(name), known, n=1)
    return f"must be one of {', '.join(known)}, got {name!r:.200}" + (f"; did you mean {near[0]}?" if near else "")


def load(kind: Kind, name: str, plugins: Sequence[Plugin] = ()) -> tuple[Any, Callable[..., Any]]:
    """A name's entry and the function that its module has registered; a plugin is run for that.

    Raises:
        UserError: nothing of that name is registered, or its plugin cannot be used.
    """
    entry, plugin = find(kind, name, plugins), provider(kind, name, plugins)
    module = entry.module
    if plugin:
        module = core_plugins.import_plugin(plugin)
    else:
        importlib.import_module(module)
    if (kind, name, module) not in _FUNCTIONS:
        raise UserError(f"{plugin.file or plugin.module if plugin else module}: registers no {kind} {name}")
    return entry, _FUNCTIONS[kind, name, module]


def made(function: Callable[..., Any], kind: type[Made], what: str) -> Made:
    """What a registered function without arguments returns.

    Raises:
        UserError: it returns something else than `kind`, or fails.
    """
    where = f"{function.__code__.co_filename}:{function.__code__.co_firstlineno}"
    try:
        found = function()
    except Exception as error:
        raise UserError(f"{where}: {what}: {type(error).__name__}: {error}") from error
    if not isinstance(found, kind):
        raise UserError(f"{where}: {what}: the function must return a {kind.__name__}, not {type(found).__name__}")
    return found


def _register(kind: Kind, name: str) -> Callable[[Function], Function]:
    def add(function: Function) -> Function:
        _FUNCTIONS[kind, name, function.__module__] = function
        return function

    return add


def register_task(
    *, name: str, title: str = "", metrics: Directions | None = None, closed_labels: bool = False
) -> Callable[[Function], Function]:
    """Register a function without arguments that returns a `tasks.base.Task`.

    In a plugin all arguments are literals: they are read without running the file.

    Args:
        metrics: metric → {"higher_is_better": True or False}, the headline first; of built-in tasks see `TASKS`.
        closed_labels: see `TaskEntry`.
    """
    return _register("task", name)


def register_source(
    *, name: str, title: str = "", split_files: str = "", split_names: bool = False, encodings: bool = False
) -> Callable[[Function], Function]:
    """Register a function `examples(data)` that yields `Example` and `InvalidRecord`; `files(data)` stands beside it.

    In a plugin all arguments are literals: they are read without running the file. See `SourceEntry`.
    """
    return _register("source", name)


def register_model(
    *,
    name: str,
    title: str = "",
    model_class: str = "",
    pipeline_tag: str = "",
    parts: Sequence[str] = (),
    images: bool = False,
    chat: bool = False,
    packing: bool = False,
    auto_processor: bool = False,
) -> Callable[[Function], Function]:
    """Register a function without arguments that returns a `models.registry.ModelFamily`.

    In a plugin all arguments are literals: they are read without running the file. See `ModelEntry`.
    """
    return _register("model", name)
