"""Plan a merge: the source, name, shape and dtype of each weight of the result."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from ftlib.errors import UserError
from ftlib.merging.checkpoint_io import (
    is_buffer,
    is_vocabulary_sized,
    layer_of,
    model_part_of,
    tensors_equal,
)
from ftlib.merging.deltas import FinetunedModel, FullCheckpoint, LoraAdapter
from ftlib.merging.recipe import BASE, MERGED, VLM_PARTS, Recipe
from ftlib.models.tensor_files import StoredTensor, TensorEntry

_HEADS = ("lm_head.weight", "embed_out.weight")
_EMBEDDINGS = ("embed_tokens.weight", "embed_in.weight", "wte.weight", "word_embeddings.weight")
_POSITIONS = "wpe.weight"


@dataclass(frozen=True)
class PlannedTensor:
    """A weight of the result.

    Attributes:
        name: canonical.
        entry: what is written, under the base's stored name.
        source: BASE, MERGED, or the number of the model that it is copied from.
    """

    name: str
    entry: TensorEntry
    base: StoredTensor
    source: str | int

    @property
    def elements(self) -> int:
        """Number of elements in the base; rows of added tokens are handled separately, see `engine`."""
        return math.prod(self.base.shape)


def plan_weights(
    recipe: Recipe, base: dict[str, StoredTensor], names: dict[str, str], models: Sequence[FinetunedModel]
) -> list[PlannedTensor]:
    """Return the weights of the result, in the order of the base's files.

    Args:
        base: the base's weights by canonical name.
        names: the base's stored names.

    Raises:
        UserError: the recipe has a part that the base lacks, or the base is quantized.
    """
    parts = _parts(recipe, {model_part_of(name) for name in base})
    planned = []
    for name, stored in base.items():
        _require_unquantized("the base", names[name], stored)
        entry = TensorEntry(names[name], _shape(name, stored, models), _dtype(recipe, name, stored, models))
        planned.append(PlannedTensor(name, entry, stored, _source(recipe, name, stored, parts, models)))
    return planned


def _require_unquantized(label: str, name: str, tensor: StoredTensor) -> None:
    """Reject layers of small integers, which need scales to become weights.

    Raises:
        UserError: the weight is one.
    """
    if tensor.dtype in (torch.int8, torch.uint8) and len(tensor.shape) > 1:
        kind = str(tensor.dtype).removeprefix("torch.")
        raise UserError(f"{label}: {name} has dtype {kind}: its weights are quantized", "Merge unquantized weights.")


def _parts(recipe: Recipe, existing: set[str]) -> dict[str, str]:
    if missing := sorted(set(recipe.parts) - existing):
        why = ": its head is tied to its embeddings, set parts.embeddings" if missing[0] == "head" else ""
        raise UserError(f"parts.{missing[0]}: the base has no such part{why}")
    defaults = VLM_PARTS if "vision" in existing else {}
    return {**defaults, **{str(part): source for part, source in recipe.parts.items()}}


def _shape(name: str, stored: StoredTensor, models: Sequence[FinetunedModel]) -> tuple[int, ...]:
    """Return the base's shape, with the rows that a model has for tokens added to its vocabulary."""
    if not is_vocabulary_sized(name):
        return stored.shape
    rows = [tensor.rows for model in models if (tensor := model.whole(name))]
    return (max([stored.rows, *rows]), *stored.shape[1:])


def _dtype(recipe: Recipe, name: str, stored: StoredTensor, models: Sequence[FinetunedModel]) -> torch.dtype:
    """Return the recipe's dtype, or the widest dtype of the inputs; adapters' factors, always float32, do not count."""
    dtype = stored.dtype
    if dtype.is_floating_point and not is_buffer(name):
        if recipe.dtype:
            chosen: torch.dtype = getattr(torch, recipe.dtype)
            return chosen
        for model in models:
            if isinstance(model, FullCheckpoint):
                dtype = torch.promote_types(dtype, model.tensors[name].dtype)
    return dtype


def describe_dtype(
    recipe: Recipe, weights: Sequence[PlannedTensor], models: Sequence[FinetunedModel], labels: Sequence[str]
) -> str:
    """Return why the weights are stored in their dtype; empty if all inputs have the same dtype."""
    largest = max(weights, key=lambda weight: weight.elements)
    chosen = str(largest.entry.dtype).removeprefix("torch.")
    types = {"the base": largest.base.dtype}
    for label, model in zip(labels, models, strict=True):
        if isinstance(model, FullCheckpoint):
            types[label] = model.tensors[largest.name].dtype
    found = {label: str(dtype).removeprefix("torch.") for label, dtype in types.items()}
    if set(found.values()) == {chosen}:
        return ""
    stored = f"weights are stored in {chosen}"
    have = ", ".join(f"{label} {name}" for label, name in found.items())
    if recipe.dtype:
        return f"{stored}, as set in the recipe ({have})"
    if chosen not in found.values():
        return f"{stored}, the only dtype that represents all inputs ({have}); --dtype sets another one"
    return f"{stored}, the widest dtype of the inputs ({have}); --dtype sets another one"


def _source(
    recipe: Recipe, name: str, stored: StoredTensor, parts: dict[str, str], models: Sequence[FinetunedModel]
) -> str | int:
    if is_buffer(name) or not stored.dtype.is_floating_point:
        return BASE
    part = model_part_of(name)
    source: str | int = parts.get(part, MERGED)
    if source == MERGED:
        if not any(model.changes(name) for model in models):
            return BASE
        layer = layer_of(name)
        from_a = recipe.layer is not None and part == "language" and layer is not None and layer <= recipe.layer
        return 0 if from_a or _is_single_model(recipe) else MERGED
    if isinstance(source, str) and source != BASE:
        source = ord(source) - ord("a")
        return source if models[source].changes(name) else BASE
    return source


def check_head(weights: Sequence[PlannedTensor], models: Sequence[FinetunedModel], labels: Sequence[str]) -> None:
    """Reject adapters of embeddings alone if the head is tied to them: the merge would change it, too.

    Without ensure_weight_tying PEFT does not change the head (github.com/huggingface/peft/issues/2777).

    Raises:
        UserError: the merge uses such an adapter's embeddings.
    """
    if any(model_part_of(weight.name) == "head" for weight in weights):
        return
    for weight in weights:
        if model_part_of(weight.name) != "embeddings" or weight.name.endswith(_POSITIONS):
            continue
        for number, (model, label) in enumerate(zip(models, labels, strict=True)):
            apart = isinstance(model, LoraAdapter) and model.changes(weight.name) and not model.tied
            if apart and weight.source in (MERGED, number):
                raise UserError(
                    f"{label}: it changes the embeddings but not the head, which are tied in the base",
                    "Use the base's embeddings: --part embeddings=base.",
                )


def _is_single_model(recipe: Recipe) -> bool:
    """Whether the result is one unchanged model, which is copied because base + (model - base) would round."""
    settings = recipe.resolved
    if len(recipe.models) > 1 or settings.get("density", 1) < 1 or settings.get("scale", 1) != 1:
        return False
    return settings.get("normalize", "weights") == "weights" or recipe.weights == [1.0]


def align_checkpoint(label: str, model: FullCheckpoint, base: dict[str, StoredTensor]) -> FullCheckpoint:
    """Return a checkpoint with exactly the base's weights; a tied head is added or removed.

    Raises:
        UserError: weights are missing, unexpected or quantized, or have other shapes.
    """
    tensors = {name: tensor for name, tensor in model.tensors.items() if name in base or not is_buffer(name)}
    tensors.update({name: stored for name, stored in base.items() if is_buffer(name) and name not in tensors})
    _align_head(label, tensors, base)
    for kind, found in (("missing", base.keys() - tensors.keys()), ("unexpected", tensors.keys() - base.keys())):
        if found:
            shown = ", ".join(sorted(found)[:3]) + (" …" if len(found) > 3 else "")
            raise UserError(
                f"{label}: {len(found)} weights {kind} compared to the base: {shown}", "Is it of another model?"
            )
    for name, stored in base.items():
        check_shape(label, name, tensors[name].shape, stored.shape)
        _require_unquantized(label, name, tensors[name])
    return replace(model, tensors=tensors)


def check_shape(label: str, name: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """Check that a weight has the base's shape; rows of added tokens are allowed.

    Raises:
        UserError: the shapes differ; for embeddings and heads, the vocabularies differ.
    """
    if shape == expected:
        return
    problem = f"{label}: {name} has shape {list(shape)}, the base's has {list(expected)}"
    if is_vocabulary_sized(name) and shape[1:] == expected[1:]:
        if shape[0] > expected[0]:
            return  # tokens were added
        raise UserError(f"{problem}: the vocabularies differ", "Merge models with the base's vocabulary.")
    raise UserError(problem, "Only models of the base's architecture and size can be merged.")


def _align_head(label: str, tensors: dict[str, StoredTensor], base: dict[str, StoredTensor]) -> None:
    head, embeddings = _find(tensors, _HEADS), _find(tensors, _EMBEDDINGS)
    ours = _find(base, _HEADS)
    if embeddings is None or (head is None) == (ours is None):
        return
    if ours is not None:
        tensors[ours] = tensors[embeddings]
    elif head is not None and tensors_equal(tensors[head], tensors[embeddings]):
        del tensors[head]
    else:
        raise UserError(f"{label}: its head differs from its embeddings, which are tied in the base")


def _find(tensors: Mapping[str, StoredTensor], names: tuple[str, ...]) -> str | None:
    return next((name for name in tensors if name.endswith(names)), None)


def without_tied_head(label: str, tensors: dict[str, StoredTensor], tied: bool) -> dict[str, StoredTensor]:
    """Return the weights without a tied head: some programs store the matrix twice.

    Raises:
        UserError: the two copies differ, so that the head is ambiguous.
    """
    head, embeddings = _find(tensors, _HEADS), _find(tensors, _EMBEDDINGS)
    if not tied or head is None or embeddings is None:
        return tensors
    if not tensors_equal(tensors[head], tensors[embeddings]):
        raise UserError(
            f"{label}: its config ties head and embeddings (tie_word_embeddings), but its files contain two different "
            "matrices",
            "Set tie_word_embeddings in its config.json as in training; if true, also remove the head.",
        )
    return {name: tensor for name, tensor in tensors.items() if name != head}
