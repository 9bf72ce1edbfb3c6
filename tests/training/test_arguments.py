"""The generated table of TrainingArguments, and how they are built."""

import json
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import pytest
import torch
from transformers import TrainingArguments

from ftlib.config import hf_fields
from ftlib.config.loader import load_experiment
from ftlib.config.schema import Config
from ftlib.core.paths import Site
from ftlib.errors import UserError
from ftlib.training import arguments
from ftlib.training.resume import TrainingPhase


def config(path: Path, *overrides: str) -> Config:
    return load_experiment(path, overrides, Site(Path("/s"), Path("/r")), {}).config


def test_the_table_is_what_the_installed_transformers_has() -> None:
    assert json.loads(hf_fields.TABLE.read_text()) == arguments.describe(), "run `make fields`"


def test_the_hand_kept_rules_name_real_fields() -> None:
    table = set(hf_fields.table())
    assert set(hf_fields.OWNED) <= table
    assert set(hf_fields.POSITIVE + hf_fields.NOT_NEGATIVE + hf_fields.NOT_IN_RESULT) <= table
    assert not set(hf_fields.REMOVED) & table


def test_values_reach_the_trainer(write_config: Callable[..., Path], tmp_path: Path) -> None:
    built = arguments.build_training_arguments(
        config(write_config(), "training.weight_decay=0.25", "training.optim=sgd"), tmp_path, TrainingPhase()
    )
    assert (built.weight_decay, built.optim, built.seed, built.max_steps) == (0.25, "sgd", 3, 12)
    assert not built.logging_nan_inf_filter


def test_what_transformers_refuses_is_the_users_mistake(write_config: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="transformers rejects these settings"):
        arguments.build_training_arguments(
            config(write_config(), "training.use_cpu=true", "training.fp16=false", "training.tf32=true"),
            tmp_path,
            TrainingPhase(),
        )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training.fp16=true"], "fp16 needs a GPU"),
        (["training.use_liger_kernel=true"], "training.use_liger_kernel needs a GPU"),
        (["training.fp16=true", "training.use_cpu=true"], "fp16 needs a GPU"),
        (["training.bf16=true"], r"torch sees no GPU.*\n.*use_cpu: true"),
        (["training.gradient_checkpointing_kwargs={use_reentrant: true}"], "use_reentrant"),
    ],
)
def test_what_a_cpu_lacks(
    write_config: Callable[..., Path], tmp_path: Path, overrides: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        arguments.build_training_arguments(config(write_config(), *overrides), tmp_path, TrainingPhase())


@pytest.mark.parametrize(
    ("overrides", "autocast"),
    [
        ([], None),
        (["model.dtype=bfloat16"], "bf16"),
        (["model.dtype=bfloat16", "training.bf16=false"], "bf16"),
        (["model.dtype=bfloat16", "adapter.master_weights=false"], None),
        (["model.dtype=bfloat16", "adapter={method: lora}"], None),
        (["training.bf16=true", "training.use_cpu=true"], "bf16"),
    ],
)
def test_master_weights_of_a_bfloat16_model_are_computed_with_in_bfloat16(
    write_config: Callable[..., Path], tmp_path: Path, overrides: list[str], autocast: str | None
) -> None:
    chosen = config(write_config(), *overrides)
    built = arguments.build_training_arguments(chosen, tmp_path, TrainingPhase())
    assert chosen.autocast == autocast and built.bf16 == (autocast is not None) and not built.fp16


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["lr_scheduler_type=cosine_with_min_lr"], "lr_scheduler_type: cosine_with_min_lr: .*min_lr"),
        (["lr_scheduler_type=warmup_stable_decay"], "lr_scheduler_type: warmup_stable_decay: .*num_decay_steps"),
        (["lr_scheduler_type=reduce_lr_on_plateau"], "lr_scheduler_type: reduce_lr_on_plateau .*stay constant"),
        (["lr_scheduler_type=greedy"], "lr_scheduler_type: greedy .*stay constant"),
        (["optim=galore_adamw"], "optim: galore_adamw: .*optim_target_modules"),
        (["optim=galore_adamw", "weight_decay=0.1"], "weight_decay: transformers does not pass it to galore_adamw"),
        (["optim=apollo_adamw", "weight_decay=0.1"], "weight_decay: transformers does not pass it to apollo_adamw"),
        (["optim=adamw_anyprecision"], "optim: adamw_anyprecision: .*install"),
        (["optim=sgd", "optim_args=momentum"], "optim: sgd: "),
    ],
)
def test_an_optimizer_or_schedule_that_cannot_be_made_is_found_before_the_model_loads(
    write_config: Callable[..., Path], tmp_path: Path, overrides: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=f"training.{message}"):
        arguments.build_training_arguments(
            config(write_config(), *[f"training.{one}" for one in overrides]), tmp_path, TrainingPhase()
        )


@pytest.mark.parametrize(
    ("optimizer", "reason"),
    [
        ("schedule_free_adamw", "saves weights that differ from those it trains"),
        ("adalomo", "steps within the backward pass"),
        ("galore_adamw_layerwise", "steps within the backward pass"),
        ("grokadamw", "does not save some of its averages in its state"),
    ],
)
def test_optimizers_that_do_not_resume_are_refused_in_the_config(
    write_config: Callable[..., Path], optimizer: str, reason: str
) -> None:
    with pytest.raises(UserError, match=rf"training\.optim: {optimizer} {reason}, so runs could not be resumed"):
        config(write_config(), f"training.optim={optimizer}")


def test_those_that_can_be_made_draw_no_random_numbers(write_config: Callable[..., Path], tmp_path: Path) -> None:
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    fields = ["optim=adafactor", "lr_scheduler_type=cosine_with_min_lr", "lr_scheduler_kwargs={min_lr: 0.001}"]
    arguments.build_training_arguments(
        config(write_config(), *[f"training.{one}" for one in fields]), tmp_path, TrainingPhase()
    )
    assert torch.rand(1) == expected


def test_a_gpu_in_sight_is_not_passed_over(
    write_config: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Quantized models are put on it, and several tasks meet over it, whatever the Trainer is told."""
    assert arguments.build_training_arguments(
        config(write_config(), "training.use_cpu=true"), tmp_path, TrainingPhase()
    ).use_cpu
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    with pytest.raises(UserError, match=r"training\.use_cpu: .*\n.*CUDA_VISIBLE_DEVICES="):
        arguments.build_training_arguments(config(write_config(), "training.use_cpu=true"), tmp_path, TrainingPhase())


@pytest.mark.parametrize("override", ["training.bf16=true", "model.dtype=bfloat16"])
def test_an_older_gpu_never_gets_another_type_of_numbers_silently(
    write_config: Callable[..., Path], tmp_path: Path, override: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (7, 5))
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "Tesla T4")
    with pytest.raises(UserError, match=r"Tesla T4 cannot compute in bfloat16[^$]*training\.fp16: true instead"):
        arguments.build_training_arguments(config(write_config(), override), tmp_path, TrainingPhase())


def test_one_process_uses_one_gpu(
    write_config: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    class OnTwoGpus(TrainingArguments):
        @cached_property
        def _setup_devices(self) -> torch.device:
            device = super()._setup_devices
            self._n_gpu = 2
            return device

    monkeypatch.setattr(arguments, "TrainingArguments", OnTwoGpus)
    built = arguments.build_training_arguments(config(write_config()), tmp_path, TrainingPhase())
    assert (built.n_gpu, built.train_batch_size) == (1, built.per_device_train_batch_size)
    assert "using 1 of 2 visible GPUs" in capsys.readouterr().err


@pytest.mark.parametrize(("ranks", "accumulation"), [(1, 4), (2, 2), (3, 2), (4, 1)])
def test_accumulation_keeps_the_effective_batch_on_any_number_of_ranks(
    write_config: Callable[..., Path], tmp_path: Path, ranks: int, accumulation: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight rows: two at once, twice, on two GPUs of one node, or on two nodes."""
    monkeypatch.setattr("ftlib.core.log.rank_and_world_size", lambda: (0, ranks))
    for job in (["job.gpus=2"], ["job.gpus=1", "job.nodes=2"], ["job.gpus=0", "job.nodes=2"]):
        built = arguments.build_training_arguments(config(write_config(), *job), tmp_path, TrainingPhase())
        assert built.gradient_accumulation_steps == accumulation
