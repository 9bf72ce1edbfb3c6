"""Merge fine-tuned models or adapters over their base into one model.

  ftlib merge CONFIG [KEY=VALUE…]
  ftlib merge --base BASE --model A --model B --method ties --density 0.3 -o OUTPUT
  ftlib merge MERGEKIT.yaml -o OUTPUT
  ftlib merge --base_model BASE --model_a A --model_b B --mode ties --density 0.3 --output OUTPUT

A model is a folder, a run or its name, or the name of a staged hub model. Run it again after an interruption to resume.
"""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import Any

from ftlib.cli import arguments
from ftlib.config.loader import validate_section
from ftlib.core import log
from ftlib.core.paths import Site, find_site
from ftlib.core.signals import raise_on_signal
from ftlib.errors import UserError
from ftlib.merging.mergekit import load_recipe
from ftlib.merging.recipe import Recipe

MODES = {
    "base": "linear",
    "layerswap": "layerswap",
    "ties": "ties",
    "dareties": "dare_ties",
    "darelinear": "dare_linear",
}
"""Values of `--mode`: short names of methods that merge two models."""


def main(argv: list[str]) -> int:
    """`ftlib merge CONFIG [KEY=VALUE…]` or `ftlib merge --base B --model M… --method METHOD -o OUTPUT`"""
    parsed = _parser().parse_intermixed_args(argv)
    site = find_site()
    recipe = _load_recipe(parsed, site)
    from ftlib.merging.merge import merge

    with raise_on_signal():
        output = merge(recipe, site)
    log.print_result(str(output))
    command = shlex.join(["ftlib", "evaluate", "CONFIG", f"model.base={output}", "--before"])
    log.info(f"to score it with the data and prompt of a config: {command}")
    return 0


def _parser() -> argparse.ArgumentParser:
    command = arguments.make_parser("merge", __doc__)
    command.add_argument("config", metavar="CONFIG", nargs="?", type=Path, help="YAML file of the merge")
    command.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help="with CONFIG: set a field")
    command.add_argument("--base", "--base_model", metavar="BASE", help="base model of the fine-tuned models")
    command.add_argument("--revision", help="the base's revision on the hub")
    command.add_argument("--model", action="extend", nargs="+", metavar="M", help="models a, b, c …; repeatable")
    command.add_argument("--weight", action="extend", nargs="+", type=float, metavar="W", help="one for each model")
    command.add_argument("--model_a", metavar="A", help="the first of two models")
    command.add_argument("--model_b", metavar="B", help="the second of two models")
    command.add_argument("--alpha", type=float, metavar="W", help="weight of model_a (0.5)")
    command.add_argument("--alpha2", type=float, metavar="W", help="weight of model_b (1 - alpha)")
    command.add_argument("--method", help="linear task_arithmetic ties dare_linear dare_ties layerswap slerp")
    command.add_argument("--mode", choices=list(MODES), help="alias of --method (short names)")
    command.add_argument("--density", type=float, help="ties, dare: share of each update that is kept (0.3)")
    command.add_argument("--trim", help="ties: by magnitude within each tensor, or global (tensor)")
    command.add_argument("--normalize", help="divide sums by weights, count or none (ties: weights; else none)")
    command.add_argument("--lambda", dest="lambda", type=float, help="multiplies the merged update (1)")
    command.add_argument("--seed", type=int, help="dare: the seed of what is dropped (0)")
    command.add_argument("--layer", "--layerswap_layer", type=int, help="layerswap: the last layer taken from a")
    command.add_argument("--part", action="append", metavar="PART=SOURCE", help="for example vision=base; repeatable")
    command.add_argument("--form", help="model, or adapter: exact, for weighted sums of LoRA adapters (model)")
    command.add_argument("--dtype", help="float32, float16 or bfloat16 (the widest of base and models)")
    command.add_argument(
        "--tokenizer-from", metavar="a|b|base", help="whose tokenizer, chat template and generation settings"
    )
    command.add_argument("-o", "--output", help="folder of the result")
    return command


def _load_recipe(parsed: argparse.Namespace, site: Site) -> Recipe:
    """Return the recipe from a file or from options, not both."""
    options = {name: value for name, value in vars(parsed).items() if value is not None}
    for name in ("config", "overrides"):
        options.pop(name, None)
    if not parsed.config:
        return validate_section(Recipe, _fields(options), site)
    return load_recipe(parsed.config, parsed.overrides, site, options)


def _fields(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options as fields of a recipe."""
    fields = dict(options)
    if "mode" in fields:
        if "method" in fields:
            raise UserError("--mode and --method both set the method; use only one of them")
        fields["method"] = MODES[fields.pop("mode")]
    fields["models"] = _models(fields)
    if "part" in fields:
        fields["parts"] = dict(_parse_part(text) for text in fields.pop("part"))
    return fields


def _models(fields: dict[str, Any]) -> list[dict[str, Any]]:
    """Return models and weights; removes their options from the fields."""
    pair = [fields.pop(name, None) for name in ("model_a", "model_b")]
    alpha, alpha2 = fields.pop("alpha", None), fields.pop("alpha2", None)
    models, weights = fields.pop("model", []), fields.pop("weight", None)
    if any(pair):
        if not all(pair) or models or weights:
            raise UserError("--model_a and --model_b go together, and without --model and --weight")
        first = 0.5 if alpha is None else alpha
        weights = [first, 1 - first if alpha2 is None else alpha2]
        models = pair
    elif alpha is not None or alpha2 is not None:
        raise UserError("--alpha and --alpha2 are the weights of --model_a and --model_b", "Use --weight with --model.")
    if weights and len(weights) != len(models):
        raise UserError(f"--weight: {len(weights)} weights for {len(models)} models")
    return [
        {"model": model, "weight": weight} for model, weight in zip(models, weights or [1.0] * len(models), strict=True)
    ]


def _parse_part(text: str) -> tuple[str, str]:
    part, equals, source = text.partition("=")
    if not equals:
        raise UserError(f"--part: {text!r} is not PART=SOURCE", "For example: --part vision=base")
    return part, source
