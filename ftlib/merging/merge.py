"""A whole merge: check inputs, write shards, publish the result with its model card."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ftlib import __version__
from ftlib.config.identity import canonical_fields
from ftlib.config.paths import hub_name, public_name
from ftlib.core import files, lease, log
from ftlib.core.environment import describe_environment
from ftlib.core.out_of_memory import MORE_MEMORY_HINT, oom_as_user_error
from ftlib.core.paths import Site
from ftlib.core.text import format_gib
from ftlib.errors import UserError
from ftlib.hub.cache import MERGE_RECORD
from ftlib.hub.offline import offline
from ftlib.merging.adapter_merge import write_adapter
from ftlib.merging.architecture import build_skeleton, is_tied, read_config
from ftlib.merging.checkpoint_io import INDEX, canonical_names, model_part_of, open_weights
from ftlib.merging.compatibility import check_compatible, check_vocabulary
from ftlib.merging.deltas import FinetunedModel, FullCheckpoint, LoraAdapter, canonical_weights, open_adapter
from ftlib.merging.engine import MergeJob, expected_peak, resident_peak, write_shards
from ftlib.merging.plan import (
    PlannedTensor,
    align_checkpoint,
    check_head,
    describe_dtype,
    plan_weights,
    without_tied_head,
)
from ftlib.merging.recipe import BASE, MERGED, Recipe, model_letter
from ftlib.merging.sources import MergeInput, find_merge_input, weight_hashes
from ftlib.merging.statistics import TensorStatistics, by_layer, table
from ftlib.merging.tokenizer_files import (
    TokenizerChoice,
    check_added_rows,
    choose_tokenizer,
    copy_model_files,
    require_rows,
)
from ftlib.models.tensor_files import StoredTensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TOKENIZER = "tokenizer, chat template and generation settings"
_FEWER_THREADS = f"{MORE_MEMORY_HINT} Or use fewer cores (taskset, --cpus-per-task): every thread has blocks in memory."


@dataclass(frozen=True)
class _MergeInputs:
    """Base and models, and the identity of the merge.

    Attributes:
        earlier: the identity in version 0.1, which included the models' paths.
    """

    base: MergeInput
    models: list[MergeInput]
    hashes: list[dict[str, str]]
    identity: str
    earlier: str


@offline()
def merge(recipe: Recipe, site: Site, adjust: Callable[[Path], None] | None = None) -> Path:
    """Merge and publish; resumes a killed merge.

    Args:
        adjust: changes the config of a whole model's folder before it is published.

    Returns:
        The folder of the result.

    Raises:
        UserError: incompatible inputs, NaN, an existing output of something else, storage full, out of memory.
    """
    with oom_as_user_error(host=_FEWER_THREADS):
        return _merge(recipe, site, adjust)


def _merge(recipe: Recipe, site: Site, adjust: Callable[[Path], None] | None) -> Path:
    output = Path(recipe.output).expanduser().absolute()
    inputs = _find_inputs(recipe, site)
    if output.exists():
        return _existing_output(output, inputs)
    stored = open_weights(inputs.base.folder)
    config = read_config(inputs.base.folder)
    for source in (inputs.base, *inputs.models):
        if source.config and read_config(source.folder) is None:
            problem = "transformers cannot read its config.json, so only names and shapes of its weights are compared"
            log.warning(f"{source.label}: {problem}")
    skeleton = build_skeleton(config, stored, inputs.base.label) if config else None
    base = without_tied_head(inputs.base.label, canonical_weights(inputs.base.folder), is_tied(config))
    models = [_open(source, base, skeleton) for source in inputs.models]
    weights = plan_weights(recipe, base, {key: name for name, key in canonical_names(stored).items()}, models)
    labels = [source.label for source in inputs.models]
    if recipe.form == "model":
        check_head(weights, models, labels)
        check_added_rows(weights, models, inputs.models)
        if len(base) < len(stored):
            log.info(f"{inputs.base.label}: its head is tied to its embeddings; the result stores this matrix once")
    log.info(formula(recipe))
    if recipe.form == "model" and (chosen := describe_dtype(recipe, weights, models, labels)):
        log.info(chosen)
    partial = output.with_name(f"{output.name}.partial")
    if partial.is_symlink():
        raise UserError(f"{partial}: is a symbolic link; unfinished weights are only written to a folder", "Remove it.")
    with files.storage_errors(output):
        partial.mkdir(parents=True, exist_ok=True)
        with lease.acquire_lease(partial):
            _discard_other_shards(partial, inputs)
            if recipe.form == "adapter":
                _publish_adapter(recipe, inputs, weights, models, output)
            else:
                job = MergeJob(recipe, weights, models, labels, partial)
                _publish_model(job, inputs, output, adjust)
            shutil.rmtree(partial, ignore_errors=True)
    return output


def _find_inputs(recipe: Recipe, site: Site) -> _MergeInputs:
    base = find_merge_input(recipe.base, recipe.revision, site)
    models = [find_merge_input(model.model, None, site) for model in recipe.models]
    for model in models:
        check_compatible(base, recipe.revision, model, site)
    for one, other in itertools.combinations(models, 2):  # both may have added tokens
        check_vocabulary(one.folder, other.folder, other.label, one.label)
    log.info("hashing the inputs")
    digests = weight_hashes([base, *models])
    fields = canonical_fields(recipe, {"Recipe": ("base", "output"), "Input": ("model",)})
    earlier = canonical_fields(recipe, {"Recipe": ("output",)})
    identities = [files.json_sha256([each, digests, __version__]) for each in (fields, earlier)]
    return _MergeInputs(base, models, digests, *identities)


def _existing_output(output: Path, inputs: _MergeInputs) -> Path:
    record = output / MERGE_RECORD
    made = record.is_file() and files.read_json(record)["identity"] in (inputs.identity, inputs.earlier)
    if made and files.is_complete(output):
        log.info(f"{output}: already merged")
        return output
    raise UserError(f"{output} exists and is not the result of this merge", "Use another output, or remove it first.")


def _open(source: MergeInput, base: dict[str, StoredTensor], skeleton: PreTrainedModel | None) -> FinetunedModel:
    if source.kind == "adapter":
        return open_adapter(source.folder, base, skeleton)
    tied = is_tied(read_config(source.folder))
    tensors = without_tied_head(source.label, canonical_weights(source.folder), tied)
    return align_checkpoint(source.label, FullCheckpoint(tensors), base)


def _discard_other_shards(partial: Path, inputs: _MergeInputs) -> None:
    """Remove the shards of a different merge."""
    plan = partial / "plan.json"
    if plan.exists() and files.read_json(plan) not in (inputs.identity, inputs.earlier):
        log.warning("the recipe or its models have changed; starting again")
        for path in partial.glob("model*"):
            path.unlink()
    files.write_json(plan, inputs.identity)


def _publish_model(job: MergeJob, inputs: _MergeInputs, output: Path, adjust: Callable[[Path], None] | None) -> None:
    factors = [f for model in job.models if isinstance(model, LoraAdapter) for f in model.low_rank.values()]
    held = sum(factor.left.nbytes + factor.right.nbytes for factor in factors)
    choice = choose_tokenizer(job.recipe, inputs.base, inputs.models)
    if choice.reason:
        log.info(f"{_TOKENIZER}: from {choice.letter}, {choice.reason}")
    require_rows(
        choice, [inputs.base, *inputs.models][0 if choice.source == BASE else 1 + int(choice.source)], job.weights
    )
    log.info(f"{len(job.weights)} weights; peak memory: at most {format_gib(expected_peak(job, held))}")
    records = write_shards(job)
    layers = by_layer(records)
    log.info(table(layers, len(job.models)))
    with files.atomic_directory(output) as folder:
        for path in [*job.folder.glob("*.safetensors"), *job.folder.glob(INDEX)]:
            os.link(path, folder / path.name)
        copy_model_files(inputs.base, inputs.models, choice, folder)
        _describe_weights(folder / "config.json", job.weights)
        if adjust:
            adjust(folder)
        _write_card(job.recipe, inputs, job.weights, layers, folder, **_remarks(job, choice), tensors=records)
    log.info(f"peak memory: {format_gib(resident_peak())}")


def _publish_adapter(
    recipe: Recipe,
    inputs: _MergeInputs,
    weights: Sequence[PlannedTensor],
    models: Sequence[FinetunedModel],
    output: Path,
) -> None:
    adapters = [model for model in models if isinstance(model, LoraAdapter)]
    if len(adapters) < len(models):
        raise UserError("form adapter: some of the models are not adapters", "Set form model.")
    with files.atomic_directory(output) as folder:
        write_adapter(folder, recipe, weights, adapters, [source.label for source in inputs.models])
        _write_card(recipe, inputs, weights, [], folder)


def _write_card(
    recipe: Recipe,
    inputs: _MergeInputs,
    weights: Sequence[PlannedTensor],
    layers: Sequence[TensorStatistics],
    folder: Path,
    **facts: Any,
) -> None:
    sources = [inputs.base, *inputs.models]
    environment = describe_environment()
    parts = _parts(weights)
    text = card(recipe, sources, inputs.hashes, environment["packages"], parts, layers)
    files.write_text(folder / "README.md", text)
    named = {source.label: digests for source, digests in zip(sources, inputs.hashes, strict=True)}
    saved = record(recipe, inputs.identity, inputs=named, parts=parts, layers=layers, environment=environment, **facts)
    files.write_json(folder / MERGE_RECORD, saved)


def _parts(weights: Sequence[PlannedTensor]) -> dict[str, str]:
    """Return part → origin of its weights."""
    found: dict[str, set[str]] = {}
    for weight in weights:
        source = weight.source if isinstance(weight.source, str) else model_letter(weight.source)
        found.setdefault(model_part_of(weight.name), set()).add(source)
    return {part: ", ".join(sorted(sources)) for part, sources in found.items()}


def _describe_weights(config_file: Path, weights: Sequence[PlannedTensor]) -> None:
    """Set the dtype of the weights and the size of an enlarged vocabulary in config.json."""
    if not config_file.is_file():
        return
    config = files.read_json(config_file)
    rows = max((weight.entry.shape[0] for weight in weights if weight.entry.shape != weight.base.shape), default=0)
    for section in (config, config.get("text_config", {})):
        if rows and "vocab_size" in section:
            section["vocab_size"] = rows
    field = "torch_dtype" if "torch_dtype" in config else "dtype"
    largest = max(weights, key=lambda weight: weight.elements)
    files.write_json(config_file, {**config, field: str(largest.entry.dtype).removeprefix("torch.")})


def _remarks(job: MergeJob, choice: TokenizerChoice) -> dict[str, Any]:
    """Return additional fields of the record: the chosen tokenizer, and tensors that trimming emptied."""
    found: dict[str, Any] = {}
    if choice.reason:
        found["tokenizer"] = {"from": choice.letter, "reason": choice.reason}
    settings = job.recipe.resolved
    if settings.get("trim") == "tensor":
        merged = [weight for weight in job.weights if weight.source == MERGED]
        if emptied := [weight.entry.name for weight in merged if int(settings["density"] * weight.elements) == 0]:
            found["trimmed_to_nothing"] = emptied
            log.warning(f"{len(emptied)} tensors have fewer than 1/density entries, so none are kept: {emptied[0]} …")
    return found


# The model card of a merge: inputs, formula and versions.

_FORMULAS = {
    "linear": "Σ wθ / Σ w: the weighted average of the models",
    "task_arithmetic": "base + λ · Σ wΔ{divided}",
    "ties": "base + λ · (the wΔ with the sign of Σ wΔ){divided}, of updates trimmed to {density:g} of their "
    "entries by magnitude, {trim}",
    "dare_linear": "base + λ · Σ wΔ{divided}, of updates with {density:g} of their "
    "entries kept at random (seed {seed}) and divided by {density:g}",
    "dare_ties": "base + λ · (the wΔ with the sign of Σ wΔ){divided}, of updates with {density:g} of their "
    "entries kept at random (seed {seed}) and divided by {density:g}",
    "layerswap": "language layers 0 to {layer} of a; everything else Σ wθ / Σ w, the weighted average",
    "slerp": "spherical interpolation from a to b at {share:g}, with one angle per tensor",
}
_DIVIDED = {"weights": " / Σ w of these models", "count": " / number of these models", "none": ""}
_TRIMS = {"tensor": "in every tensor", "global": "over all tensors together"}


def formula(recipe: Recipe) -> str:
    """Return the recipe in one line; Δ is a model's weights minus the base's, w its weight."""
    settings = recipe.resolved
    words = {
        **settings,
        "divided": _DIVIDED[settings.get("normalize", "none")],
        "trim": _TRIMS[settings.get("trim", "tensor")],
        "share": recipe.weights[-1] / (sum(recipe.weights) or 1),
    }
    text = _FORMULAS[recipe.method].format(**words)
    return f"{text}; λ = {settings['scale']:g}" if "scale" in settings else text


def card(
    recipe: Recipe,
    sources: Sequence[MergeInput],
    hashes: Sequence[dict[str, str]],
    packages: dict[str, str],
    parts: dict[str, str],
    layers: Sequence[TensorStatistics],
) -> str:
    """Return README.md of the result, with the hub's metadata.

    Args:
        sources: the base and the models.
        hashes: of their weight files.
        parts: part → origin.
    """
    named = [name for source in sources if (name := hub_name(str(source.origin)))]
    metadata = {
        **({"base_model": named} if named else {}),
        "library_name": "peft" if recipe.form == "adapter" else "transformers",
        "tags": ["merge", recipe.method],
    }
    title = f"Merge of {len(recipe.models)} models by `{recipe.method}`"
    if len(recipe.models) == 1:
        title = f"{public_name(sources[1].label)}, a whole model"
    names = ["base", *(f"{model_letter(n)}, weight {weight:g}" for n, weight in enumerate(recipe.weights))]
    lines = [
        f"---\n{yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)}---\n",
        f"# {title}\n",
        f"{formula(recipe)}. Δ: a model's weights minus the base's; w: its weight. Computed in float32.\n",
    ]
    if parts:
        lines += ["; ".join(f"{part}: from {source}" for part, source in parts.items()) + ".\n"]
    lines += ["## Inputs\n", "| | model | file | SHA-256 |", "|---|---|---|---|"]
    for name, source, digests in zip(names, sources, hashes, strict=True):
        lines += [f"| {name} | {public_name(source.label)} | {file} | `{digest}` |" for file, digest in digests.items()]
    if layers:
        lines += ["\n## Statistics\n", f"```\n{table(layers, len(recipe.models))}\n```"]
    versions = ", ".join(f"{name} {version}" for name, version in packages.items())
    return "\n".join([*lines, f"\nMade with {versions}.\n"])


def record(recipe: Recipe, identity: str, **facts: Any) -> dict[str, Any]:
    """Return the content of merge.json: the recipe and all facts of the card."""
    made = {"recipe": canonical_fields(recipe), "resolved": recipe.resolved, "formula": formula(recipe)}
    return {"identity": identity, **made, **facts}
