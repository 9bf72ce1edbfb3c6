"""The model card of a merge: what went in, by which formula, with which versions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml

from ftlib.merging.recipe import Recipe, letter
from ftlib.merging.sources import Source
from ftlib.merging.statistics import Record, table

_FORMULAS = {
    "linear": "Σ wθ / Σ w: the weighted average of the models",
    "task_arithmetic": "base + λ · Σ wΔ{divided}",
    "ties": "base + λ · (those wΔ that have the sign of Σ wΔ){divided}, of updates trimmed to {density:g} of their "
    "entries by magnitude, {trim}",
    "dare_linear": "base + λ · Σ wΔ{divided}, of updates with {density:g} of their "
    "entries kept by chance (seed {seed}) and divided by {density:g}",
    "dare_ties": "base + λ · (those wΔ that have the sign of Σ wΔ){divided}, of updates with {density:g} of their "
    "entries kept by chance (seed {seed}) and divided by {density:g}",
    "layerswap": "language layers 0 to {layer} of a; everything else Σ wθ / Σ w, the weighted average",
    "slerp": "on the arc from a to b, {share:g} of the way, every tensor by its own angle",
}
_DIVIDED = {"weights": " / Σ w of what takes part", "count": " / number of what takes part", "none": ""}
_TRIMS = {"tensor": "in every tensor", "global": "over all tensors together"}


def formula(recipe: Recipe) -> str:
    """The recipe in one line; Δ is a model's weights minus the base's, w its weight."""
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
    sources: Sequence[Source],
    hashes: Sequence[dict[str, str]],
    packages: dict[str, str],
    parts: dict[str, str],
    layers: Sequence[Record],
) -> str:
    """README.md of the result, with the hub's metadata in front.

    Args:
        sources: the base and the models; `hashes`: of their weight files.
        parts: part → where it comes from.
    """
    metadata = {
        "base_model": [source.label for source in sources],
        "library_name": "peft" if recipe.form == "adapter" else "transformers",
        "tags": ["merge", recipe.method],
    }
    names = ["base", *(f"{letter(n)}, weight {weight:g}" for n, weight in enumerate(recipe.weights))]
    lines = [
        f"---\n{yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)}---\n",
        f"# Merge of {len(recipe.models)} models by `{recipe.method}`\n",
        f"{formula(recipe)}. Δ: a model's weights minus the base's; w: its weight. Computed in float32.\n",
    ]
    if parts:
        lines += ["; ".join(f"{part}: from {source}" for part, source in parts.items()) + ".\n"]
    lines += ["## What went in\n", "| | model | file | SHA-256 |", "|---|---|---|---|"]
    for name, source, digests in zip(names, sources, hashes, strict=True):
        lines += [f"| {name} | {source.label} | {file} | `{digest}` |" for file, digest in digests.items()]
    if layers:
        lines += ["\n## What it did\n", f"```\n{table(layers, len(recipe.models))}\n```"]
    versions = ", ".join(f"{name} {version}" for name, version in packages.items())
    return "\n".join([*lines, f"\nMade with {versions}.\n"])


def record(recipe: Recipe, identity: str, **facts: Any) -> dict[str, Any]:
    """merge.json: the recipe and everything of the card, for programs."""
    made = {"recipe": recipe.model_dump(by_alias=True), "resolved": recipe.resolved, "formula": formula(recipe)}
    return {"identity": identity, **made, **facts}
