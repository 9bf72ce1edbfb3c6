"""mergekit's YAML files: the same merge, or a plain refusal."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ftlib.cli.merge import _load_recipe, _parser
from ftlib.core.paths import Site
from ftlib.errors import UserError
from ftlib.merging.recipe import Recipe
from tests.merging import bare, literal, mergekit_oracle

Ftlib = Callable[..., tuple[int, str, str]]

TIES = """\
models:
  - model: BASE
  - model: A
    parameters: {weight: 0.7, density: 0.5}
  - model: B
    parameters: {weight: 0.2, density: 0.5}
merge_method: ties
base_model: BASE
parameters: {normalize: true, int8_mask: true}
dtype: float32
"""


def load(folder: Path, text: str) -> Recipe:
    path = folder / "mergekit.yaml"
    path.write_text(text)
    words = [str(path), "-o", "/o"]
    return _load_recipe(_parser().parse_intermixed_args(words), Site(Path("/store"), Path("/runs")))


def test_it_merges_as_mergekit_does(tmp_path: Path, store: Path, ftlib: Ftlib) -> None:
    """The sums written out on whole arrays, with mergekit's own defaults."""
    base = bare.random_weights(0)
    bare.save(tmp_path / "base", base)
    for number, name in enumerate("ab", 1):
        bare.save(tmp_path / name, bare.tuned(base, number))
    text = TIES
    for name in ("BASE", "A", "B"):
        text = text.replace(f"model: {name}\n", f"model: {tmp_path / name.lower()}\n")
    (tmp_path / "mergekit.yaml").write_text(text)
    code, _, error = ftlib("merge", tmp_path / "mergekit.yaml", "-o", tmp_path / "out")
    assert code == 0, error
    merged, models = bare.load(tmp_path / "out"), [bare.load(tmp_path / name) for name in "ab"]
    for name, value in base.items():
        updates = [model[name].double().numpy() - value for model in models]
        trimmed = [literal.largest(update, int(0.5 * update.size)) for update in updates]
        expected = value + literal.agreeing(trimmed, [0.7, 0.2], "weights", 1.0)
        np.testing.assert_allclose(merged[name].double().numpy(), expected, rtol=0, atol=1.3e-7)
        assert merged[name].dtype == torch.float32


@pytest.mark.parametrize("case", mergekit_oracle.CASES)
def test_it_merges_as_mergekit_did(tmp_path: Path, store: Path, ftlib: Ftlib, case: str) -> None:
    """Results of mergekit 0.1.5 itself; the largest difference is one unit in the last place of float32."""
    mergekit_oracle.write_models(tmp_path)
    code, _, error = ftlib("merge", mergekit_oracle.write_yaml(tmp_path, case), "-o", tmp_path / "out")
    assert code == 0, error
    merged, found = bare.load(tmp_path / "out"), load_file(mergekit_oracle.RESULTS)
    assert merged.keys() == mergekit_oracle.SHAPES.keys()
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, found[f"{case}/{name}"], rtol=2e-7, atol=2e-7)
        if case == "ties":
            assert torch.equal(tensor, found[f"{case}/{name}"])


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        (
            "models: [{model: o/a, parameters: {weight: 1}}, {model: o/b, parameters: {weight: 3}}]\n"
            "merge_method: linear\ndtype: bfloat16\n",
            {"base": "o/a", "models": [("o/a", 1), ("o/b", 3)], "dtype": "bfloat16", "resolved": {}},
        ),
        (
            "models: [{model: o/a}, {model: o/b}]\nmerge_method: slerp\nbase_model: o/a\nparameters: {t: 0.25}\n"
            "tokenizer_source: base\n",
            {"base": "o/a", "models": [("o/a", 0.75), ("o/b", 0.25)], "tokenizer_from": "base", "resolved": {}},
        ),
        (
            "models: [{model: o/c+o/a, parameters: {weight: 0.5}}, {model: o/b, parameters: {weight: 0.5}}]\n"
            "merge_method: dare_ties\nbase_model: o/c\nparameters: {density: 0.4, lambda: 2}\n"
            "tokenizer_source: model:o/b\n",
            {
                "base": "o/c",
                "models": [("o/a", 0.5), ("o/b", 0.5)],
                "tokenizer_from": "b",
                "resolved": {"density": 0.4, "seed": 0, "normalize": "none", "scale": 2.0},
            },
        ),
        (
            "models: [{model: o/a, parameters: {weight: 0.5}}]\nmerge_method: ties\nbase_model: o/c\n",
            {"resolved": {"density": 1.0, "trim": "tensor", "normalize": "weights", "scale": 1.0}},
        ),
    ],
)
def test_what_it_means(tmp_path: Path, text: str, fields: dict[str, object]) -> None:
    recipe = load(tmp_path, text)
    found = {name: getattr(recipe, name) for name in fields}
    if "models" in found:
        found["models"] = [(model.model, model.weight) for model in recipe.models]
    assert found == fields


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("ties", "model_stock"), "merge_method: model_stock: this part"),
        (("models:", "slices: []\nmodels:"), "slices: this part"),
        (("0.7", "[0.1, 0.9]"), r"weight: \[0.1, 0.9\]: this part"),
        (("0.2, density: 0.5", "0.2, density: 0.6"), "density: different values for the models: this part"),
        (("int8_mask", "epsilon"), "parameters.epsilon: this part"),
        (("weight: 0.7, ", ""), "weight is missing"),
        (("base_model: BASE\n", ""), "base_model: method ties needs one"),
    ],
)
def test_what_does_not_exist_here_is_refused(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(tmp_path, TIES.replace(*change))
