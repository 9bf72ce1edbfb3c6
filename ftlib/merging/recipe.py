"""Schema of a merge recipe, from a file or from the options of `ftlib merge`. Does not import torch."""

from __future__ import annotations

import string
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from ftlib.config.schema import INT32_LIMIT, PathKind, Section

Method = Literal["linear", "task_arithmetic", "ties", "dare_linear", "dare_ties", "layerswap", "slerp"]
MergePart = Literal["vision", "projector", "embeddings", "head"]
Normalize = Literal["weights", "count", "none"]
PartSource = Annotated[str, Field(pattern=r"^(base|merged|[a-z])$")]

MERGED, BASE = "merged", "base"
VLM_PARTS: dict[str, str] = {"vision": "a", "projector": "a", "embeddings": BASE, "head": BASE}
"""Default sources of the parts of a vision-language model."""

DEFAULT_DENSITY = 0.3
_FIELDS: dict[str, tuple[str, ...]] = {
    "linear": (),
    "task_arithmetic": ("normalize", "scale"),
    "ties": ("density", "trim", "normalize", "scale"),
    "dare_linear": ("density", "seed", "normalize", "scale"),
    "dare_ties": ("density", "seed", "normalize", "scale"),
    "layerswap": ("layer",),
    "slerp": (),
}
"""Method → the fields that it uses; other fields are errors."""


class Input(Section):
    """A fine-tuned model or adapter (a folder, a run or its name, or a hub name) and its weight."""

    model: Annotated[str, Field(min_length=1)]
    weight: float = 1.0

    def paths(self) -> dict[str, PathKind]:
        return {"model": "run"}


class Recipe(Section):
    """A merge. `models` are called a, b, c … in `parts`.

    Updates are differences from `base`. `density` is the share of each update that `ties` keeps by magnitude (`trim`:
    per tensor, or over all of them), or DARE at random (`seed`). `normalize` divides the sum by the agreeing models'
    weights or their count; `lambda` multiplies it. `layerswap` copies language layers up to number `layer` from a and
    averages the rest. Missing fields get the method's defaults, see `resolved`. `dtype` is the dtype of the stored
    weights, `tokenizer_from` the source of tokenizer, chat template and generation settings.
    """

    base: Annotated[str, Field(min_length=1)]
    revision: str | None = None
    models: Annotated[list[Input], Field(min_length=1, max_length=len(string.ascii_lowercase))]
    method: Method
    density: Annotated[float, Field(gt=0, le=1)] | None = None
    trim: Literal["tensor", "global"] | None = None
    normalize: Normalize | None = None
    scale: Annotated[float, Field(allow_inf_nan=False)] | None = Field(default=None, alias="lambda")
    seed: Annotated[int, Field(ge=0, lt=2**32)] | None = None
    layer: Annotated[int, Field(ge=0, lt=INT32_LIMIT)] | None = None
    parts: dict[MergePart, PartSource] = Field(default_factory=dict)
    form: Literal["model", "adapter"] = "model"
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    tokenizer_from: Annotated[str, Field(pattern=r"^(base|[a-z])$")] | None = None
    output: Annotated[str, Field(min_length=1)]

    def paths(self) -> dict[str, PathKind]:
        return {"base": "run", "output": "path"}

    @model_validator(mode="after")
    def _check_consistency(self) -> Recipe:
        for field in ("density", "trim", "normalize", "scale", "seed", "layer"):
            if getattr(self, field) is not None and field not in _FIELDS[self.method]:
                raise ValueError(f"{'lambda' if field == 'scale' else field} has no effect with method {self.method}")
        if self.method == "layerswap" and self.layer is None:
            raise ValueError("method layerswap needs `layer`: the last language layer to copy from a")
        if self.method == "slerp" and len(self.models) != 2:
            raise ValueError(f"method slerp needs two models, not {len(self.models)}")
        if self.form == "adapter" and self.method not in ("linear", "task_arithmetic", "layerswap"):
            raise ValueError(f"form adapter: {self.method} is not a weighted sum; set form model")
        if self.form == "adapter" and (self.dtype or self.tokenizer_from):
            raise ValueError("dtype and tokenizer_from have no effect with form adapter")
        return self._check_weights()._check_parts()

    def _check_weights(self) -> Recipe:
        total = sum(model.weight for model in self.models)
        divides = self.method in ("linear", "layerswap", "slerp") or self.resolved["normalize"] == "weights"
        if divides and total == 0:
            raise ValueError("models: the weights add up to 0, and the sum is a divisor")
        if self.method == "slerp" and min(model.weight for model in self.models) < 0:
            raise ValueError("models: method slerp takes no negative weights")
        return self

    def _check_parts(self) -> Recipe:
        known = string.ascii_lowercase[: len(self.models)]
        for part, source in self.parts.items():
            if len(source) == 1 and source not in known:
                raise ValueError(f"parts.{part}: {source}: unknown; available: {', '.join(known)}")
        if self.tokenizer_from not in (None, BASE, *known):
            raise ValueError(f"tokenizer_from: {self.tokenizer_from}: unknown; available: {', '.join(known)}")
        return self

    @property
    def resolved(self) -> dict[str, Any]:
        """Return the fields that the method uses, with its defaults for missing fields.

        The defaults of `trim` and `normalize` are mergekit's; `ties` divides by the weights, task arithmetic and DARE
        do not.
        """
        own = {
            "density": DEFAULT_DENSITY,
            "trim": "tensor",
            "normalize": "weights" if self.method == "ties" else "none",
            "scale": 1.0,
            "seed": 0,
            "layer": self.layer,
        }
        given = {name: getattr(self, name) for name in own}
        return {name: own[name] if given[name] is None else given[name] for name in _FIELDS[self.method]}

    @property
    def weights(self) -> list[float]:
        return [model.weight for model in self.models]


def model_letter(number: int) -> str:
    """Return the letter of model number 0, 1, … in a recipe."""
    return string.ascii_lowercase[number]
