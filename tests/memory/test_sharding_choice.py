"""Which configs can be sharded, when `parallel.shard: auto` does so, and what each GPU then needs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from ftlib.config.identity import identity
from ftlib.config.schema import Config
from ftlib.errors import UserError
from ftlib.memory.estimate import MemoryEstimate, host_estimate, shard_estimate
from ftlib.memory.search import choose_sharding
from ftlib.models import sharding
from ftlib.models.adapters import prepare_for_training

LORA = {"method": "lora", "r": 4}
FULL = {"method": "full"}
GIB = 1 << 30


def config(
    adapter: dict[str, Any],
    shard: str = "full",
    training: dict[str, Any] | None = None,
    batch: dict[str, Any] | None = None,
    **model: Any,
) -> Config:
    fields = {"name": "x", "task": "instruct", "model": {"family": "causal", "base": "base", **model}}
    data = {"source": "instructions", "root": "x"}
    parallel = {"parallel": {"shard": shard}} if shard else {}
    others = {"training": training or {}, "batch": batch or {}, **parallel}
    return Config.model_validate({**fields, "adapter": adapter, "data": data, **others})


@pytest.mark.parametrize(
    ("adapter", "training", "model", "reason"),
    [
        (LORA, {}, {"quantization": "nf4"}, "quantization: nf4"),
        (LORA, {"torch_compile": True}, {}, "torch_compile"),
        (FULL, {"optim": "adafactor"}, {}, "optim: adafactor cannot update sharded weights"),
        (FULL, {"optim": "adamw_8bit"}, {}, "optim: adamw_8bit cannot update sharded weights"),
        (FULL, {"fp16": True}, {}, "fp16"),
        (FULL, {}, {"batch": {"auto": True}}, "batch.auto: a GPU that runs out of memory"),
    ],
)
def test_what_cannot_be_sharded_is_refused(
    adapter: dict[str, Any], training: dict[str, Any], model: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ValidationError, match=reason):
        config(adapter, "full", training, **model)
    choice = choose_sharding(config(adapter, "auto", training, **model), lambda: pytest.fail("unneeded"), GIB, 4, 1)
    assert choice.scope == "none" and reason in choice.reason


def test_sharding_is_not_part_of_the_run_id() -> None:
    assert len({identity(config(LORA, shard), 4) for shard in ("", "auto", "none", "full")}) == 1
    assert config(LORA, "full", {"optim": "adafactor"}).sharding_obstacle is None, "adapters stay whole"


@pytest.mark.parametrize("adapter", [FULL, LORA])
def test_each_gpu_holds_its_part_and_auto_shards_only_what_does_not_fit(adapter: dict[str, Any]) -> None:
    shapes = GPTNeoXConfig(hidden_size=256, num_hidden_layers=24, num_attention_heads=4, intermediate_size=1024)
    shapes.vocab_size = 512
    one = config(adapter, "auto")
    with torch.device("meta"):
        model = prepare_for_training(GPTNeoXForCausalLM(shapes), one.adapter, "base", "causal")
    trained = sum(4 * p.numel() for p in model.parameters() if p.requires_grad)
    every = sum(4 * p.numel() for p in model.parameters())
    base = every if adapter is FULL else every - trained
    whole = MemoryEstimate(base, every - base, trained, 2 * trained, 0, 0, context=0)
    parts = [shard_estimate(whole, model, shards) for shards in (2, 8)]
    four = one.model_copy(update={"job": one.job.model_copy(update={"gpus": 4})})
    hosts = [host_estimate(model, four, shards) for shards in (1, 4)]
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    largest = 4 * 256 * 1024
    assert [host.loading for host in hosts] == [4 * (every + buffers), 4 * (4 * largest // 4 + largest)]
    packed = four.model_copy(update={"loss": four.loss.model_copy(update={"packing": True})})
    assert host_estimate(model, packed, 4).loading == every + buffers, "one task after the other"
    assert [host.checkpoint for host in hosts] == [3 * trained] * 2, "weights and two moments"
    assert [host.gathering for host in hosts] == [0, largest if adapter is FULL else 0]
    assert base / 8 < parts[1].weights < base / 2 < parts[0].weights < base
    if adapter is FULL:
        assert [one.optimizer for one in parts] == [trained, trained // 4]
        assert parts[1].gradients < trained / 4
    else:
        assert parts[0].optimizer == whole.optimizer and parts[0].gradients == whole.gradients

    def choose(capacity: float, world: int = 8, nodes: int = 1) -> str:
        return choose_sharding(one, lambda: (model, whole), int(capacity), world, nodes).scope

    assert choose(whole.total * 1.2) == "none" == choose(1, world=1)
    assert choose(whole.total * 0.5) == "full" == choose(1)
    in_node = shard_estimate(whole, model, 4).total
    assert choose(in_node * 1.1, 8, 2) == "node" and choose(in_node * 1.0, 8, 2) == "full"


def test_blocks_are_groups_and_old_versions_of_torch_are_refused() -> None:
    with torch.device("meta"):
        tied = GPTNeoXForCausalLM(
            GPTNeoXConfig(hidden_size=8, num_hidden_layers=3, num_attention_heads=2, tie_word_embeddings=True)
        )
    tied.tie_weights()
    found = sharding.groups(prepare_for_training(tied, config(LORA).adapter, "base", "causal"))
    assert [len(group) for group in found] == [1, 1, 1, 2], "tied embeddings are one group"
    with pytest.raises(UserError, match=r"torch 2\.13 or newer, here it is 2\.12\.1"):
        sharding.require_torch("2.12.1+cu130")
    sharding.require_torch("2.14.0")
