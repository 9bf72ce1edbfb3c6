"""Which weight comes from where: the recipe's parts and layers held against the weights that there are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ftlib.errors import UserError
from ftlib.merging.deltas import Adapter, Checkpoint, Tuned
from ftlib.merging.names import is_buffer, layer_of, part_of
from ftlib.merging.recipe import BASE, MERGED, VLM_PARTS, Recipe
from ftlib.merging.tensors import Entry, Stored, same

_HEAD, _EMBEDDINGS, _POSITIONS = "lm_head.weight", "embed_tokens.weight", "wpe.weight"


@dataclass(frozen=True)
class Weight:
    """A weight of the result.

    Attributes:
        name: canonical.
        entry: what is written, under the base's own name for it.
        source: BASE, MERGED, or the number of the model that it is taken from.
    """

    name: str
    entry: Entry
    base: Stored
    source: str | int

    @property
    def elements(self) -> int:
        return math.prod(self.entry.shape)


def plan_weights(
    recipe: Recipe, base: dict[str, Stored], names: dict[str, str], models: Sequence[Tuned]
) -> list[Weight]:
    """Every weight of the result, in the order of the base's files.

    Args:
        base: the base's weights by canonical name; `names`: its own names for them.

    Raises:
        UserError: a part of the recipe that this model does not have.
    """
    parts = _parts(recipe, {part_of(name) for name in base})
    planned = []
    for name, stored in base.items():
        entry = Entry(names[name], stored.shape, _dtype(name, stored, models))
        planned.append(Weight(name, entry, stored, _source(recipe, name, stored, parts, models)))
    return planned


def _parts(recipe: Recipe, existing: set[str]) -> dict[str, str]:
    if missing := sorted(set(recipe.parts) - existing):
        why = ": its head is its embeddings, set parts.embeddings" if missing[0] == "head" else ""
        raise UserError(f"parts.{missing[0]}: the base has no such part{why}")
    defaults = VLM_PARTS if "vision" in existing else {}
    return {**defaults, **{str(part): source for part, source in recipe.parts.items()}}


def _dtype(name: str, stored: Stored, models: Sequence[Tuned]) -> torch.dtype:
    """The widest type that it is stored in; adapters count for nothing, their factors are always float32."""
    dtype = stored.dtype
    if dtype.is_floating_point and not is_buffer(name):
        for model in models:
            if isinstance(model, Checkpoint):
                dtype = torch.promote_types(dtype, model.tensors[name].dtype)
    return dtype


def _source(recipe: Recipe, name: str, stored: Stored, parts: dict[str, str], models: Sequence[Tuned]) -> str | int:
    if is_buffer(name) or not stored.dtype.is_floating_point:
        return BASE
    part = part_of(name)
    source: str | int = parts.get(part, MERGED)
    if source == MERGED:
        if not any(model.changes(name) for model in models):
            return BASE
        layer = layer_of(name)
        from_a = recipe.layer is not None and part == "language" and layer is not None and layer <= recipe.layer
        return 0 if from_a or _is_whole(recipe) else MERGED
    if isinstance(source, str) and source != BASE:
        source = ord(source) - ord("a")
        return source if models[source].changes(name) else BASE
    return source


def check_head(weights: Sequence[Weight], models: Sequence[Tuned], labels: Sequence[str]) -> None:
    """Refuse adapters of embeddings alone where the head is the same matrix: it would be changed with them.

    Without ensure_weight_tying PEFT leaves the head as it was (github.com/huggingface/peft/issues/2777).

    Raises:
        UserError: such an adapter's embeddings take part in the merge.
    """
    if any(part_of(weight.name) == "head" for weight in weights):
        return
    for weight in weights:
        if part_of(weight.name) != "embeddings" or weight.name.endswith(_POSITIONS):
            continue
        for number, (model, label) in enumerate(zip(models, labels, strict=True)):
            apart = isinstance(model, Adapter) and model.changes(weight.name) and not model.tied
            if apart and weight.source in (MERGED, number):
                raise UserError(
                    f"{label}: it changes the embeddings and not the head, which are one matrix in the base",
                    "Take the embeddings of the base: --part embeddings=base.",
                )


def _is_whole(recipe: Recipe) -> bool:
    """Whether the recipe is one model as it is; base + (model - base) would round."""
    settings = recipe.resolved
    if len(recipe.models) > 1 or settings.get("density", 1) < 1 or settings.get("scale", 1) != 1:
        return False
    return settings.get("normalize", "weights") == "weights" or recipe.weights == [1.0]


def fitted_checkpoint(label: str, model: Checkpoint, base: dict[str, Stored]) -> Checkpoint:
    """A checkpoint with exactly the base's weights: tied heads are stored by some and not by others.

    Raises:
        UserError: weights that are missing, left over, or of other shapes.
    """
    tensors = {name: tensor for name, tensor in model.tensors.items() if name in base or not is_buffer(name)}
    tensors.update({name: stored for name, stored in base.items() if is_buffer(name) and name not in tensors})
    _fit_head(label, tensors, base)
    for kind, found in (("missing", base.keys() - tensors.keys()), ("left over", tensors.keys() - base.keys())):
        if found:
            shown = ", ".join(sorted(found)[:3]) + (" …" if len(found) > 3 else "")
            raise UserError(f"{label}: {len(found)} weights {kind} beside the base: {shown}", "Is it of another model?")
    for name, stored in base.items():
        check_shape(label, name, tensors[name].shape, stored.shape)
    return replace(model, tensors=tensors)


def check_shape(label: str, name: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """Refuse a weight that the base has in another shape.

    Raises:
        UserError: it has; with embeddings and heads, it is the vocabularies that differ.
    """
    if shape == expected:
        return
    problem = f"{label}: {name} has shape {list(shape)}, the base's has {list(expected)}"
    if part_of(name) in ("embeddings", "head") and shape[1:] == expected[1:]:
        raise UserError(f"{problem}: the vocabularies differ", "Merge models with the base's own vocabulary.")
    raise UserError(problem, "Only models of the base's own architecture and size can be merged.")


def _fit_head(label: str, tensors: dict[str, Stored], base: dict[str, Stored]) -> None:
    embeddings = next((name for name in tensors if part_of(name) == "embeddings" and name.endswith(_EMBEDDINGS)), None)
    if embeddings is None or (_HEAD in tensors) == (_HEAD in base):
        return
    if _HEAD in base:
        tensors[_HEAD] = tensors[embeddings]
    elif same(tensors[_HEAD], tensors[embeddings]):
        del tensors[_HEAD]
    else:
        raise UserError(f"{label}: its head differs from its embeddings, and the base has one matrix for both")
