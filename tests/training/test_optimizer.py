"""Learning rate and weight decay by part, and LoRA+: the groups of the optimizer, and a step by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ftlib.config.loader import load_experiment
from ftlib.config.schema import Config
from ftlib.core import jsonl
from ftlib.core.paths import Site
from ftlib.errors import UserError
from ftlib.models.adapters import no_decay_parameter_names, prepare_for_training
from ftlib.models.tiny import tiny_model, tiny_processor
from ftlib.training.optimizer import split_groups
from tests.conftest import FULL, LORA
from tests.training.test_resume import outcome, run_of

KERNELS = (
    "patch_embedding.weight", "fc1.weight", "fc2.weight", "out_proj.weight", "q_proj.weight", "k_proj.weight",
    "v_proj.weight", "multi_modal_projector.linear.weight",
)  # fmt: skip
"""What big_vision calls `.../kernel`: img/embedding, Dense_0, Dense_1, out, query, key, value, img/head."""

AUTHORS = ["training.weight_decay=0.1", "parts={language: {weight_decay: 0}}"]


def config(path: Path, *overrides: str) -> Config:
    return load_experiment(path, overrides, Site(Path("/s"), Path("/r")), {}).config


def groups(settings: Config, optimizer: Any = torch.optim.AdamW, rate: float = 0.1) -> tuple[dict[str, Any], float]:
    """Name of a parameter → (rate, decay), and the factor of the first group."""
    model = prepare_for_training(tiny_model(tiny_processor()), settings.adapter, "x")
    trained = {name: one for name, one in model.named_parameters() if one.requires_grad}
    decayed = set(trained) - no_decay_parameter_names(model)
    decay = float(settings.training.get("weight_decay", 0))
    made = optimizer(
        [
            {"params": [trained[name] for name in trained if name in decayed], "weight_decay": decay},
            {"params": [trained[name] for name in trained if name not in decayed], "weight_decay": 0.0},
        ],
        lr=rate,
    )
    first = split_groups(made, model, settings, decayed)
    names = {id(one): name for name, one in trained.items()}
    found = {
        names[id(one)]: (group["lr"], group["weight_decay"]) for group in made.param_groups for one in group["params"]
    }
    assert set(found) == set(trained) and sum(len(group["params"]) for group in made.param_groups) == len(trained)
    assert made.param_groups[0]["lr"] == rate * first
    return found, first


def test_weight_decay_of_kernels_only_as_the_authors_have_it(write_config: Callable[..., Path]) -> None:
    found, _ = groups(config(write_config("{method: full}"), *AUTHORS))
    decayed = {name for name, (_, decay) in found.items() if decay}
    kernels = {name for name in found if name.endswith(KERNELS) and "language_model" not in name}
    assert decayed == kernels and len(kernels) == 1 + 2 * 6 + 1
    assert {decay for _, decay in found.values()} == {0.0, 0.1}


def test_learning_rates_by_part(write_config: Callable[..., Path]) -> None:
    parts = "parts={vision: {learning_rate_factor: 0.5}, embeddings: {learning_rate_factor: 0.25, weight_decay: 9}}"
    found, first = groups(config(write_config("{method: full}"), parts))
    assert first == 1
    for name, (rate, decay) in found.items():
        factor = 0.5 if "vision_tower" in name else 0.25 if "embed_tokens" in name else 1
        assert (rate, decay) == (0.1 * factor, 0.0), "embeddings have no weight decay, whatever the key says"


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_loraplus_has_the_rates_of_peft(write_config: Callable[..., Path], method: str) -> None:
    from peft.optimizers import create_loraplus_optimizer

    settings = config(write_config(LORA.replace("lora", method)), "adapter.loraplus_lr_ratio=16")
    ours, first = groups(settings)
    model = prepare_for_training(tiny_model(tiny_processor()), settings.adapter, "x")
    theirs = create_loraplus_optimizer(model, torch.optim.AdamW, lr=0.1, loraplus_lr_ratio=16)
    names = {id(one): name for name, one in model.named_parameters()}
    assert first == 1
    assert {name: rate for name, (rate, _) in ours.items()} == {
        names[id(one)]: group["lr"] for group in theirs.param_groups for one in group["params"]
    }


def test_a_part_that_is_not_trained_is_an_error(write_config: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match=r"parts\.projector has no effect: no parameter of this part is trained"):
        groups(config(write_config(LORA), "parts={projector: {weight_decay: 1}}"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["parts={projector: {learning_rate_factor: 2}}"], "parts.projector has no effect"),  # FULL freezes it
        (["adapter={method: lora}", "parts={embeddings: {weight_decay: 1}}"], "parts.embeddings has no effect"),
        (["adapter={method: attention}", "parts={vision: {weight_decay: 1}}"], "parts.vision has no effect"),
        (["parts={head: {weight_decay: 1}}"], "parts"),
        (["parts={vision: {learning_rate_factor: 0}}"], "learning_rate_factor"),
        (["task=instruct", "model.family=causal", "parts={vision: {weight_decay: 1}}"], "have no part vision"),
        (["task=instruct", "model.family=causal", "model.dropout=0.1"], "dropout requires family: paligemma"),
        (["adapter={method: lora, modules_to_save: [projector], freeze: [projector]}"], "from adapter.freeze"),
        (["adapter={method: lora, modules_to_save: [projector], targets: [projector]}"], "adapter.targets"),
        (["adapter={method: lora, modules_to_save: [vision]}"], "modules_to_save"),
        (["adapter={method: lora, modules_to_save: [projector]}", "model.dtype=bfloat16"], "training.bf16: true"),
        (["adapter={method: dora, init_lora_weights: pissa}"], "pissa requires method: lora"),
        (["adapter={method: lora, init_lora_weights: pissa}", "model.quantization=nf4"], "quantization: none"),
        (["adapter={method: lora, init_lora_weights: pissa}", "warm_start=/x"], "warm_start"),
        (["adapter={method: lora, init_lora_weights: olora}"], "init_lora_weights"),
        (["adapter={method: lora, loraplus_lr_ratio: 0.5}"], "loraplus_lr_ratio"),
    ],
)  # fmt: skip
def test_mistakes(write_config: Callable[..., Path], overrides: list[str], message: str) -> None:
    with pytest.raises(UserError) as error:
        config(write_config(), *overrides)
    assert message in str(error.value) and "Traceback" not in str(error.value)


def test_the_first_step_moves_every_part_by_its_own_rate(
    store: Path, write_config: Callable[..., Path], tmp_path: Path, ftlib: Callable[..., tuple[int, str, str]]
) -> None:
    """Adam's first step moves every weight by the rate; big_vision's decay, wd · p, is weight_decay · rate · p here."""
    from safetensors.torch import load_file

    asked = ("training.max_steps=1", "training.warmup_steps=0", "training.lr_scheduler_type=constant",
             "parts={vision: {learning_rate_factor: 0.5}, language: {weight_decay: 0.0}}", "training.weight_decay=2",
             "training.learning_rate=1e-3", "training.max_grad_norm=0")  # fmt: skip
    path = write_config(FULL)
    run = run_of(path, tmp_path / "runs", *asked)
    assert ftlib("prepare", path)[0] == 0 and ftlib("train", path, *asked)[0] == 0
    before = load_file(config(path).model.base + "/model.safetensors")
    after = load_file(run.folder / "model" / "model.safetensors")

    def step(ending: str, decay: float) -> float:
        (name,) = (name for name in before if name.endswith(ending))
        moved = (after[name] - before[name] * (1 - decay)).abs()
        return float(moved[moved > 1e-6].median())

    assert step("encoder.layers.0.mlp.fc1.weight", 0.5e-3 * 2) == pytest.approx(0.5e-3, rel=0.02)
    assert step("layers.0.mlp.up_proj.weight", 0) == pytest.approx(1e-3, rel=0.02)
    assert jsonl.read_jsonl_log(run.metrics)[0]["learning_rate"] == 1e-3, "logged without a part's factor"


def test_new_keys_at_their_defaults_keep_the_run(write_config: Callable[..., Path], tmp_path: Path) -> None:
    """A run's name changes only with a value that changes its result."""
    path = write_config(LORA)
    plain = run_of(path, tmp_path).folder.name
    defaults = ["model.dropout=0", "parts={}", "adapter.modules_to_save=[]", "adapter.loraplus_lr_ratio=1",
                "adapter.init_lora_weights=default"]  # fmt: skip
    assert run_of(path, tmp_path, *defaults).folder.name == plain
    changed = ["model.dropout=0.1", "parts={vision: {weight_decay: 0}}", "adapter.modules_to_save=[projector]",
               "adapter.loraplus_lr_ratio=4", "adapter.init_lora_weights=pissa"]  # fmt: skip
    assert len({plain, *(run_of(path, tmp_path, one).folder.name for one in changed)}) == 1 + len(changed)


def test_the_optimizer_is_as_before_without_these_keys(
    store: Path, write_config: Callable[..., Path], tmp_path: Path, ftlib: Callable[..., tuple[int, str, str]]
) -> None:
    """A factor of 1 gives the bits of a run without the key: groups change the order of nothing that counts."""
    path = write_config(FULL)
    assert ftlib("prepare", path)[0] == 0
    found = []
    for overrides in ([], ["parts={vision: {learning_rate_factor: 1.0}}"]):
        asked = ["training.max_steps=2", *overrides]
        run = run_of(path, tmp_path / str(len(found)), *asked)
        assert ftlib("train", path, *asked)[0] == 0
        found.append(outcome(run)[1])
    assert found[0] == found[1]
