"""What `shard` relies on is checked: it fails when a part of it stops working. One process is a group of one rank."""

from __future__ import annotations

import errno
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import distributed
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, Trainer

from ftlib.models import sharding
from ftlib.models.adapters import prepare_for_training
from ftlib.models.tensor_files import SafetensorsWriter, read_header
from ftlib.training.trainer import ResumableTrainer
from tests.memory.test_sharding_choice import FULL, LORA, config

CPU = torch.device("cpu")
ADAPTERS = {"lora": LORA, "dora": {"method": "dora", "r": 4}, "full": FULL, "attention": {"method": "attention"}}


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield sharding.make_mesh(CPU, "full", 1)
    distributed.destroy_process_group()


def model_with(method: str) -> torch.nn.Module:
    torch.manual_seed(0)
    tiny = GPTNeoXConfig(
        vocab_size=16, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    return prepare_for_training(GPTNeoXForCausalLM(tiny), config(ADAPTERS[method]).adapter, "base", "causal")


def trained(model: torch.nn.Module) -> dict[str, bool]:
    return {name: parameter.requires_grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("method", ADAPTERS)
def test_all_but_adapters_is_sharded_and_what_is_trained_stays(mesh: DeviceMesh, method: str) -> None:
    model = model_with(method)
    before = trained(model)
    sharding.shard(model, mesh, CPU)
    assert (
        sharding.is_sharded(model) and trained(model) == before and len(set(before.values())) == 1 + (method != "full")
    )
    whole = [name for name, parameter in model.named_parameters() if not isinstance(parameter, DTensor)]
    assert whole == [name for name in before if "lora_" in name]
    assert sharding.trains_shards(model) == (method in ("full", "attention"))


def test_weights_that_stay_whole_are_an_error(mesh: DeviceMesh, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise training would be DDP, or each rank's own, without a word."""
    monkeypatch.setattr("torch.distributed.fsdp.fully_shard", lambda *arguments, **settings: None)
    with pytest.raises(RuntimeError, match=r"\d+ parameters were not sharded, such as "):
        sharding.shard(model_with("lora"), mesh, CPU)


def test_a_changed_choice_of_trained_weights_is_an_error(mesh: DeviceMesh, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed import fsdp

    fully_shard = fsdp.fully_shard

    def shard_and_train_all(module: Any, **settings: Any) -> None:
        fully_shard(module, **settings)
        if isinstance(module, torch.nn.Module):
            module.requires_grad_(True)

    monkeypatch.setattr(fsdp, "fully_shard", shard_and_train_all)
    with pytest.raises(RuntimeError, match=r"sharding changed what is trained: \d+ parameters before, \d+ after"):
        sharding.shard(model_with("attention"), mesh, CPU)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_an_evaluation_before_the_first_step_has_whole_weights(mesh: DeviceMesh, method: str) -> None:
    model, plain = model_with(method), model_with(method)
    sharding.shard(model, mesh, CPU)
    tokens = torch.arange(6)[None]
    with sharding.whole(model), torch.no_grad():
        assert not any(isinstance(parameter, DTensor) for parameter in model.parameters())
        assert torch.equal(model(tokens).logits, plain(tokens).logits)
        answers = [one.generate(tokens, max_new_tokens=3, do_sample=False) for one in (model, plain)]  # type: ignore[operator]
    assert torch.equal(*answers)
    assert any(isinstance(parameter, DTensor) for parameter in model.parameters())


def test_a_file_that_could_not_be_written_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {"one": torch.arange(6.0).reshape(2, 3), "none": torch.zeros(0, 4), "number": torch.tensor(3)}
    sharding.write_tensors(tensors, tmp_path / "x.safetensors", {})
    header = read_header(tmp_path / "x.safetensors")
    mapped = {name: stored.map() for name, stored in header.items()}
    assert torch.equal(header["one"].read(1), tensors["one"][1:]) and header["one"].read(2, 2).shape == (0, 3)
    for found in (load_file(tmp_path / "x.safetensors"), mapped):
        assert found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in tensors)

    def fail(writer: SafetensorsWriter, name: str, row: int, values: torch.Tensor) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(SafetensorsWriter, "write", fail)
    with pytest.raises(OSError, match="No space left"):
        sharding.write_tensors(tensors, tmp_path / "y.safetensors", {})
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_the_trainer_calls_what_sharding_overrides() -> None:
    """Private methods of transformers' Trainer: renamed ones would move whole models to a GPU, or wrap them for DDP."""
    source = inspect.getsource(Trainer)
    for name in ("_move_model_to_device", "_wrap_model", "_clip_grad_norm"):
        assert name in vars(ResumableTrainer) and f"self.{name}(" in source, name
