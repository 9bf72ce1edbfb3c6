"""Warm start: a run begins with another's weights, goes on bit for bit, and keeps the weights that it began with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ftlib.config.loader import load_experiment
from ftlib.config.schema import Config
from ftlib.core import files, jsonl
from ftlib.core.paths import Site, find_site
from ftlib.errors import UserError
from ftlib.runs.run import Run, create_run
from ftlib.training.initialize import resolve_init_weights, trainable_model
from tests.conftest import FULL, LORA

ATTENTION = "{method: attention}"
SAVED = {
    FULL: "model/model.safetensors",
    LORA: "adapter/adapter_model.safetensors",
    ATTENTION: "model/model.safetensors",
}
Ftlib = Callable[..., tuple[int, str, str]]


def run_of(config: Path, *overrides: str) -> Run:
    return create_run(load_experiment(config, overrides, find_site()), find_site())


def start_of(config: Path, *overrides: str) -> tuple[Config, Run, Site]:
    experiment = load_experiment(config, overrides, find_site())
    return experiment.config, create_run(experiment, find_site()), find_site()


def trained(write_config: Callable[..., Path], ftlib: Ftlib, adapter: str, *overrides: str) -> tuple[Path, Run]:
    config = write_config(adapter)
    assert ftlib("prepare", config)[0] == 0
    code, _, error = ftlib("train", config, *overrides, "training.max_steps=4")
    assert code == 0, error
    return config, run_of(config, *overrides, "training.max_steps=4")


@pytest.mark.parametrize("adapter", [FULL, LORA], ids=["full", "lora"])
def test_training_goes_on_from_the_first_runs_weights(
    store: Path, write_config: Callable[..., Path], ftlib: Ftlib, adapter: str
) -> None:
    config, first = trained(write_config, ftlib, adapter)
    again = ftlib("train", config, "training.max_steps=4")[2]
    hint = f"warm_start=tiny/{first.folder.name}"
    assert "already finished" in again and hint in again
    still = ("training.max_steps=1", "training.learning_rate=0")  # a step that moves nothing
    assert ftlib("train", config, *still, hint)[0] == 0
    second = run_of(config, *still, hint)
    ours, theirs = (load_file(run.folder / SAVED[adapter]) for run in (second, first))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert files.read_json(second.warm_start)["folder"] == str((first.folder / SAVED[adapter]).parent)
    losses = [jsonl.read_jsonl_log(run.metrics)[0]["loss"] for run in (first, second)]
    assert losses[1] < 0.9 * losses[0], "the first step already knows what was learned"


def test_the_weights_that_a_run_began_with_must_stay(
    store: Path, write_config: Callable[..., Path], ftlib: Ftlib
) -> None:
    config, first = trained(write_config, ftlib, LORA)
    asked = start_of(config, "warm_start=tiny")
    assert resolve_init_weights(*asked) == first.folder / "adapter", "by name, though this run has the same one"
    start_of(config, "seed=9")
    assert resolve_init_weights(*asked) == first.folder / "adapter", "by now three runs have this name"
    weights = load_file(first.folder / SAVED[LORA])
    save_file({name: tensor + 1 for name, tensor in weights.items()}, first.folder / SAVED[LORA])
    with pytest.raises(UserError, match="have changed since this run began"):
        resolve_init_weights(*asked)
    with pytest.raises(UserError, match="training has not finished"):
        resolve_init_weights(*start_of(config, f"warm_start={asked[1].folder}"))


def test_an_adapter_of_another_base_is_refused(store: Path, write_config: Callable[..., Path], ftlib: Ftlib) -> None:
    config, first = trained(write_config, ftlib, LORA)
    with pytest.raises(UserError, match=r"was trained over .*, not over this config's model\.base"):
        resolve_init_weights(*start_of(config, f"warm_start={first.folder}", "model.base=google/paligemma-3b-mix-224"))


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [(FULL, LORA, "is a whole model.*\n.*model.base"), (LORA, FULL, "is an adapter.*\n.*ftlib merge")],
)
def test_the_kinds_must_fit(
    store: Path, write_config: Callable[..., Path], ftlib: Ftlib, source: str, target: str, message: str
) -> None:
    _, first = trained(write_config, ftlib, source)
    with pytest.raises(UserError, match=message):
        resolve_init_weights(*start_of(write_config(target), f"warm_start={first.folder}"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("adapter.r=2", "r is 4 there, 2 here"),
        ("adapter.alpha=9", "alpha is 8"),
        ("adapter.targets=[attention]", "unexpected weights"),
        ("adapter.method=dora", "dora is False there, True here"),
    ],
)
def test_an_adapter_of_another_shape_is_refused(
    store: Path, write_config: Callable[..., Path], ftlib: Ftlib, shared: Path, override: str, message: str
) -> None:
    from ftlib.models.adapters import prepare_for_training
    from ftlib.models.loading import load_weights

    config, run, _ = start_of(write_config(LORA))
    made = prepare_for_training(load_weights(shared / "model", "float32"), config.adapter, "x")
    made.save_pretrained(run.folder / "adapter", save_embedding_layers=False)
    other = start_of(write_config(LORA), override)[0]
    with pytest.raises(UserError, match=message):
        trainable_model(other, run, shared / "model", run.folder / "adapter")
    trainable_model(config, run, shared / "model", run.folder / "adapter")


def test_a_bfloat16_model_goes_on_from_its_saved_weights_in_float32(
    store: Path, write_config: Callable[..., Path], ftlib: Ftlib
) -> None:
    asked = ("model.dtype=bfloat16", "training.learning_rate=2e-5")
    config, first = trained(write_config, ftlib, FULL, *asked)
    saved = load_file(first.folder / SAVED[FULL])
    second, run, site = start_of(config, *asked, f"warm_start={first.folder}")
    model = trainable_model(second, run, site.store, resolve_init_weights(second, run, site))
    theirs = {tensor.data_ptr(): name for name, tensor in saved.items()}
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16} and len(theirs) == len(saved)
    types = {parameter.requires_grad: parameter.dtype for parameter in model.parameters()}
    assert types == {True: torch.float32, False: torch.bfloat16}
    ours = sorted(parameter.double().sum().item() for parameter in model.parameters())
    assert ours == sorted(tensor.double().sum().item() for tensor in saved.values())


def test_attention_weights_come_back_in_full_precision(
    store: Path, write_config: Callable[..., Path], shared: Path, tmp_path: Path
) -> None:
    overrides = ("model.dtype=bfloat16", "training.bf16=true")
    config, run, _ = start_of(write_config(ATTENTION), *overrides)
    model = trainable_model(config, run, shared / "model", None)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += torch.randn_like(parameter) * 1e-3
    model.save_pretrained(tmp_path / "made")
    again = trainable_model(config, run, shared / "model", tmp_path / "made")
    for (name, ours), theirs in zip(model.named_parameters(), again.parameters(), strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), name
