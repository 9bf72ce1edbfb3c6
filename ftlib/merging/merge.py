"""A whole merge: inputs checked, shards written, the result published with its card."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftlib import __version__, console, files, ownership
from ftlib.environment import describe_environment
from ftlib.errors import UserError
from ftlib.hub import MERGE_RECORD
from ftlib.identity import lasting
from ftlib.merging.blend import Work
from ftlib.merging.card import card, formula, record
from ftlib.merging.concatenate import write_adapter
from ftlib.merging.deltas import Adapter, Checkpoint, Tuned, canonical_weights, open_adapter
from ftlib.merging.names import canonical, part_of
from ftlib.merging.plan import Weight, check_head, fitted_checkpoint, plan_weights
from ftlib.merging.recipe import Recipe, letter
from ftlib.merging.sources import Source, check_belonging, find_source, hashes
from ftlib.merging.statistics import Record, by_layer, table
from ftlib.merging.stream import expected_peak, resident_peak, write_shards
from ftlib.merging.tensors import INDEX, Stored, open_weights
from ftlib.out_of_memory import MORE_MEMORY, enough_memory
from ftlib.site import Site

_BESIDE = ("*.json", "*.model", "*.txt", "*.jinja")
"""Files of the base that belong to the result too: config, tokenizer, processor."""

_FEWER_THREADS = (
    f"{MORE_MEMORY} Or take fewer cores (taskset, --cpus-per-task): each core's thread holds its own blocks."
)


@dataclass(frozen=True)
class _Inputs:
    """The base and the models, and what identifies this merge of them.

    Attributes:
        earlier: what identified it in version 0.1, which looked at where the models lay, too.
    """

    base: Source
    models: list[Source]
    digests: list[dict[str, str]]
    identity: str
    earlier: str


def merge(recipe: Recipe, site: Site) -> Path:
    """Merge and publish; what a killed merge left is gone on with.

    Returns:
        The result's folder.

    Raises:
        UserError: inputs that do not belong together, NaN, an output that is something else, storage full, out of
            memory.
    """
    with enough_memory(host=_FEWER_THREADS):
        return _merge(recipe, site)


def _merge(recipe: Recipe, site: Site) -> Path:
    output = Path(recipe.output).expanduser().absolute()
    inputs = _find(recipe, site)
    if output.exists():
        return _already(output, inputs)
    stored = open_weights(inputs.base.folder)
    base = canonical_weights(inputs.base.folder)
    models = [_open(source, base) for source in inputs.models]
    weights = plan_weights(recipe, base, {canonical(name): name for name in stored}, models)
    labels = [source.label for source in inputs.models]
    if recipe.form == "model":
        check_head(weights, models, labels)
    console.say(formula(recipe))
    partial = output.with_name(f"{output.name}.partial")
    with files.storage_errors(output):
        partial.mkdir(parents=True, exist_ok=True)
        with ownership.owned(partial):
            _begin(partial, inputs)
            if recipe.form == "adapter":
                _publish_adapter(recipe, inputs, weights, models, output)
            else:
                work = Work(recipe, weights, models, labels, partial)
                _publish_model(work, inputs, output)
            shutil.rmtree(partial, ignore_errors=True)
    return output


def _find(recipe: Recipe, site: Site) -> _Inputs:
    base = find_source(recipe.base, recipe.revision, site)
    models = [find_source(model.model, None, site) for model in recipe.models]
    for model in models:
        check_belonging(base, recipe.revision, model, site)
    console.say("hashing what goes in")
    digests = hashes([base, *models])
    fields = lasting(recipe, {"Recipe": ("base", "output"), "Input": ("model",)})
    earlier = lasting(recipe, {"Recipe": ("output",)})
    identities = [files.fingerprint([each, digests, __version__]) for each in (fields, earlier)]
    return _Inputs(base, models, digests, *identities)


def _already(output: Path, inputs: _Inputs) -> Path:
    record = output / MERGE_RECORD
    made = record.is_file() and files.read_json(record)["identity"] in (inputs.identity, inputs.earlier)
    if made and files.is_complete(output):
        console.say(f"{output}: already merged")
        return output
    raise UserError(f"{output} exists and is not the result of this merge", "Name another output, or remove it first.")


def _open(source: Source, base: dict[str, Stored]) -> Tuned:
    if source.kind == "adapter":
        return open_adapter(source.folder, base)
    return fitted_checkpoint(source.label, Checkpoint(canonical_weights(source.folder)), base)


def _begin(partial: Path, inputs: _Inputs) -> None:
    """Shards of another merge are of no use."""
    plan = partial / "plan.json"
    if plan.exists() and files.read_json(plan) not in (inputs.identity, inputs.earlier):
        console.say("the recipe or its models have changed; beginning anew")
        for path in partial.glob("model*"):
            path.unlink()
    files.write_json(plan, inputs.identity)


def _publish_model(work: Work, inputs: _Inputs, output: Path) -> None:
    factors = [f for model in work.models if isinstance(model, Adapter) for f in model.low_rank.values()]
    held = sum(factor.left.nbytes + factor.right.nbytes for factor in factors)
    console.say(f"{len(work.weights)} weights; memory at the peak: at most {_gib(expected_peak(work, held))}")
    records = write_shards(work)
    layers = by_layer(records)
    console.say(table(layers, len(work.models)))
    with files.publish_folder(output) as folder:
        for path in [*work.folder.glob("*.safetensors"), *work.folder.glob(INDEX)]:
            os.link(path, folder / path.name)
        _copy_beside(inputs.base.folder, folder, work.weights)
        _write_card(work.recipe, inputs, work.weights, layers, folder, tensors=records)
    console.say(f"memory at the peak: {_gib(resident_peak())}")


def _publish_adapter(
    recipe: Recipe, inputs: _Inputs, weights: Sequence[Weight], models: Sequence[Tuned], output: Path
) -> None:
    adapters = [model for model in models if isinstance(model, Adapter)]
    if len(adapters) < len(models):
        raise UserError("form adapter: some of the models are no adapters", "Take form model.")
    with files.publish_folder(output) as folder:
        write_adapter(folder, recipe, weights, adapters, [source.label for source in inputs.models])
        _write_card(recipe, inputs, weights, [], folder)


def _write_card(
    recipe: Recipe, inputs: _Inputs, weights: Sequence[Weight], layers: Sequence[Record], folder: Path, **facts: Any
) -> None:
    sources = [inputs.base, *inputs.models]
    environment = describe_environment()
    parts = _parts(weights)
    text = card(recipe, sources, inputs.digests, environment["packages"], parts, layers)
    (folder / "README.md").write_text(text, encoding="utf-8")
    named = {source.label: digests for source, digests in zip(sources, inputs.digests, strict=True)}
    saved = record(recipe, inputs.identity, inputs=named, parts=parts, layers=layers, environment=environment, **facts)
    files.write_json(folder / MERGE_RECORD, saved)


def _parts(weights: Sequence[Weight]) -> dict[str, str]:
    """Where the weights of every part came from."""
    found: dict[str, set[str]] = {}
    for weight in weights:
        source = weight.source if isinstance(weight.source, str) else letter(weight.source)
        found.setdefault(part_of(weight.name), set()).add(source)
    return {part: ", ".join(sorted(sources)) for part, sources in found.items()}


def _copy_beside(base: Path, folder: Path, weights: Sequence[Weight]) -> None:
    """Config, tokenizer and processor of the base; the config names the type that the weights are written in."""
    for pattern in _BESIDE:
        for path in base.glob(pattern):
            if not path.name.endswith(".index.json") and path.name not in (files.MARKER, MERGE_RECORD):
                shutil.copyfile(path, folder / path.name)
    config_file = folder / "config.json"
    if not config_file.is_file():
        return
    config = files.read_json(config_file)
    field = "torch_dtype" if "torch_dtype" in config else "dtype"
    largest = max(weights, key=lambda weight: weight.elements)
    files.write_json(config_file, {**config, field: str(largest.entry.dtype).removeprefix("torch.")})


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
