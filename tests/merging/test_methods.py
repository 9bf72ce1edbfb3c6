"""Every method against its formula written out in float64, from files to files, over several blocks and shards."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
import torch

from ftlib.merging import engine, methods
from tests.merging import bare, literal

WEIGHTS = [0.75, 0.25, 0.5]
"""Powers of two: what cancels out does so in every arithmetic."""


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "BLOCK", 50)
    monkeypatch.setattr(engine, "SHARD_BYTES", 2000)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    base = bare.random_weights(0)
    bare.save(tmp_path / "base", base)
    for number, name in enumerate(("a", "b", "c"), 1):
        bare.save(tmp_path / name, bare.tuned(base, number))
    return tmp_path


def updates_of(folder: Path, name: str, models: int = 3) -> list[np.ndarray]:
    base = bare.load(folder / "base")[name].double()
    return [(bare.load(folder / model)[name].double() - base).numpy() for model in "abc"[:models]]


def same(folder: Path, merged: dict[str, torch.Tensor], name: str, update: np.ndarray) -> None:
    """Equal to float32 rounding of sums near 1: a wrong entry is off by 1e-6 at least, a rounded one by 6e-8."""
    expected = bare.load(folder / "base")[name].double().numpy() + update
    np.testing.assert_allclose(merged[name].double().numpy(), expected, rtol=0, atol=1.3e-7, err_msg=name)


models = list(zip("abc", WEIGHTS, strict=True))


@pytest.mark.parametrize("normalize", ["weights", "count", "none"])
@pytest.mark.parametrize("density", [0.2, 0.55, 1.0])
def test_ties(folder: Path, normalize: str, density: float) -> None:
    merged = bare.run(folder, models, method="ties", density=density, normalize=normalize, **{"lambda": 1.5})
    assert len(list((folder / "out").glob("model-*.safetensors"))) > 2
    for name in bare.SHAPES:
        updates = updates_of(folder, name)
        trimmed = [literal.largest(update, int(density * update.size)) for update in updates]
        same(folder, merged, name, literal.agreeing(trimmed, WEIGHTS, normalize, 1.5))


def test_ties_without_words_is_mergekits(folder: Path) -> None:
    merged = bare.run(folder, models, method="ties", density=0.4)
    for name in bare.SHAPES:
        trimmed = [literal.largest(update, int(0.4 * update.size)) for update in updates_of(folder, name)]
        same(folder, merged, name, literal.agreeing(trimmed, WEIGHTS, "weights", 1.0))


@pytest.mark.parametrize("scale", [1.0, 0.4])
@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_ties_with_one_threshold_is_the_authors(folder: Path, density: float, scale: float) -> None:
    merged = bare.run(
        folder, ["a", "b"], method="ties", density=density, trim="global", normalize="count", **{"lambda": scale}
    )
    updates = [{name: updates_of(folder, name, 2)[model] for name in bare.SHAPES} for model in (0, 1)]
    cancelling = sum(
        int(((updates[0][name] + updates[1][name] == 0) & (updates[0][name] != 0)).sum()) for name in updates[0]
    )
    assert cancelling, "the sign of what cancels out must matter here"
    expected = literal.ties_of_the_authors(updates, density, scale)
    for name in bare.SHAPES:
        same(folder, merged, name, expected[name])


@pytest.mark.parametrize("normalize", ["weights", "count", "none"])
def test_task_arithmetic(folder: Path, normalize: str) -> None:
    merged = bare.run(folder, models, method="task_arithmetic", normalize=normalize, **{"lambda": 0.7})
    for name in bare.SHAPES:
        same(folder, merged, name, literal.summed(updates_of(folder, name), WEIGHTS, normalize, 0.7))


def test_linear_is_the_weighted_average_of_the_models(folder: Path) -> None:
    merged = bare.run(folder, models, method="linear")
    for name in bare.SHAPES:
        values = [bare.load(folder / model)[name].double() for model in "abc"]
        average = sum(w * value for w, value in zip(WEIGHTS, values, strict=True)) / sum(WEIGHTS)
        torch.testing.assert_close(merged[name].double(), average, rtol=0, atol=1.3e-7)


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dare(folder: Path, method: str) -> None:
    """What it drops is taken from it (all ones go in); the rest is written out."""
    merged = bare.run(folder, models, method=method, density=0.3, seed=5)
    mix = literal.summed if method == "dare_linear" else literal.agreeing
    for name, shape in bare.SHAPES.items():
        key = name.removeprefix("model.")
        masks = [methods.DareDrop(0.3, 5, number, key)(torch.ones(shape)).double().numpy() * 0.3 for number in range(3)]
        kept = [update * mask.round() / 0.3 for update, mask in zip(updates_of(folder, name), masks, strict=True)]
        same(folder, merged, name, mix(kept, WEIGHTS, "none", 1.0))


def test_dare_drops_by_chance_and_keeps_the_expectation() -> None:
    ones = torch.ones(200, 1000)
    drop = functools.partial(methods.DareDrop, 0.25)
    first = drop(0, 0, "x")(ones)
    assert set(first.unique().tolist()) == {0.0, 4.0}
    assert first.mean().item() == pytest.approx(1.0, abs=0.02)  # five standard errors
    assert torch.equal(first, drop(0, 0, "x")(ones))
    for other in (drop(1, 0, "x"), drop(0, 1, "x"), drop(0, 0, "y")):
        assert (first * other(ones)).mean().item() == pytest.approx(1.0, abs=0.05)  # independent
    pieces = drop(0, 0, "x")
    assert torch.equal(first, torch.cat([pieces(ones[:77]), pieces(ones[77:])]))


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.9, 0.3)])
def test_slerp(folder: Path, weights: tuple[float, float]) -> None:
    far = bare.random_weights(9)
    far["model.norm.weight"] = bare.random_weights(0)["model.norm.weight"] * 2  # the same direction
    bare.save(folder / "far", far)
    merged = bare.run(folder, [("base", weights[0]), ("far", weights[1])], method="slerp")
    a, b = bare.load(folder / "base"), bare.load(folder / "far")
    for name in bare.SHAPES:
        expected = literal.on_the_arc(a[name].double().numpy(), b[name].double().numpy(), weights[1] / sum(weights))
        np.testing.assert_allclose(merged[name].numpy(), expected, rtol=0, atol=5e-7, err_msg=name)


def test_layerswap_takes_the_first_layers_from_a(folder: Path) -> None:
    merged = bare.run(folder, [("a", 0.6), ("b", 0.2)], method="layerswap", layer=0)
    a, b = bare.load(folder / "a"), bare.load(folder / "b")
    for name in bare.SHAPES:
        if ".layers.0." in name:
            assert torch.equal(merged[name], a[name])
        else:
            average = 0.75 * a[name].double() + 0.25 * b[name].double()
            torch.testing.assert_close(merged[name].double(), average, rtol=0, atol=1.3e-7)


@pytest.mark.parametrize(
    "fields",
    [
        {"method": "linear"},
        {"method": "ties", "density": 1.0},
        {"method": "ties", "density": 1.0, "trim": "global", "normalize": "none"},
        {"method": "dare_ties", "density": 1.0},
        {"method": "task_arithmetic"},
        {"method": "layerswap", "layer": 0},
    ],
    ids=lambda fields: "-".join(map(str, fields.values())),
)
def test_one_whole_model_is_itself_bit_for_bit(tmp_path: Path, fields: dict[str, object]) -> None:
    draw = torch.Generator().manual_seed(0)
    scales = {"base": 1.0, "a": 1e-4}  # base + (a - base) would lose bits of a
    for name, scale in scales.items():
        weights = {key: torch.randn(shape, generator=draw).numpy() * scale for key, shape in bare.SHAPES.items()}
        bare.save(tmp_path / name, weights)
    merged = bare.run(tmp_path, ["a"], **fields)
    for name, value in bare.load(tmp_path / "a").items():
        assert torch.equal(merged[name], value), name


@pytest.mark.parametrize("keep", [0, 1, 2, 499, 999, 1000])
def test_the_threshold_is_the_sorted_ones(keep: int) -> None:
    for seed, values in enumerate(
        (torch.randn(1000), torch.randn(1000) * 1e-30, torch.randint(-3, 4, (1000,)).float())
    ):
        blocks = values.split(77)
        trim = methods.make_trim(functools.partial(iter, blocks), keep)
        kept = torch.cat([trim(block) for block in blocks])
        expected = literal.largest(values.double().numpy(), keep)
        assert np.array_equal(kept.double().numpy(), expected), (seed, keep)


def test_weights_that_cancel_out_are_divided_by_nothing() -> None:
    update = torch.tensor([1.0, -2.0])
    result = methods.ties_merge([update, update], [1.0, -1.0], "weights", 1.0)
    assert result.tolist() == literal.agreeing([update.numpy()] * 2, [1.0, -1.0], "weights", 1.0).tolist()


def test_what_is_stored_in_half_is_merged_in_float32(tmp_path: Path) -> None:
    """Updates far below a bfloat16 step add up: eight times 2^-11 over 1 is 2^-8, one step."""
    ones = {name: np.ones(shape) for name, shape in bare.SHAPES.items()}
    bare.save(tmp_path / "base", ones, torch.bfloat16)
    bare.save(tmp_path / "a", {name: value * (1 + 2.0**-7) for name, value in ones.items()}, torch.bfloat16)
    merged = bare.run(tmp_path, [("a", 0.125)] * 8, method="task_arithmetic")
    for value in merged.values():
        assert value.dtype == torch.bfloat16
        assert value.unique().tolist() == [1 + 2.0**-7]
