"""A model that three ranks load in parts starts with the weights of one that is loaded whole, bit for bit; what they
write is whole."""

from __future__ import annotations

import errno
import faulthandler
import multiprocessing
import shutil
import time
import traceback
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import distributed
from torch.distributed.fsdp import fully_shard
from transformers import LlamaForCausalLM, set_seed

from ftlib.config.schema import Config
from ftlib.errors import UserError
from ftlib.models import loading, sharded_loading, sharding
from ftlib.training.initialize import trainable_model
from tests.models import tiny_causal, tiny_paligemma

LORA = {"method": "lora", "r": 4, "alpha": 8}
PATIENCE = 300
"""Seconds until ranks that have not ended show where they are."""


def config_of(family: str, base: Path, adapter: dict[str, Any], dtype: str = "float32") -> Config:
    vision = family == "paligemma"
    return Config.model_validate(
        {
            "name": "tiny",
            "task": "digits" if vision else "instruct",
            "model": {"family": family, "base": str(base), "dtype": dtype},
            "adapter": adapter,
            "training": {"max_steps": 1, "bf16": True, "use_cpu": True},
            "data": {"root": ".", "source": "digits"}
            if vision
            else {"root": ".", "source": "instructions", "file": "d.jsonl"},
        }
    )


def rank_main(rank: int, world: int, folder: Path, found: Any, check: Callable[..., None], *arguments: Any) -> None:
    """Join the other ranks by gloo and run a function; put (rank, what it raised, or "") to a queue."""
    fault = ""
    try:
        with (folder / f"stack{rank}").open("w") as file:
            faulthandler.dump_traceback_later(PATIENCE, file=file)
            meeting = f"file://{folder / 'meeting'}"
            distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world)
            check(*arguments)
            distributed.destroy_process_group()
            faulthandler.cancel_dump_traceback_later()
    except BaseException:
        fault = traceback.format_exc()
    found.put((rank, fault))


def on_ranks(check: Callable[..., None], folder: Path, *arguments: Any, world: int = 3) -> list[str]:
    """Run a function on ranks that are joined by gloo; return what each raised, or ""."""
    context = multiprocessing.get_context("forkserver")  # a fork of this process could wait for threads that it lost
    context.set_forkserver_preload([__name__])
    found = context.SimpleQueue()
    given = (world, folder, found, check, *arguments)
    processes = [context.Process(target=rank_main, args=(rank, *given)) for rank in range(world)]
    for process in processes:
        process.start()
    ends = time.monotonic() + PATIENCE + 10
    for process in processes:
        process.join(max(0, ends - time.monotonic()))
        process.kill()
    (folder / "meeting").unlink(missing_ok=True)
    faults = {rank: f"it has not ended\n{(folder / f'stack{rank}').read_text()}" for rank in range(world)}
    while not found.empty():
        faults |= [found.get()]
    return [*faults.values()]


def started(config: Config, base: Path, init_weights: Path | None, mesh: Any = None) -> torch.nn.Module:
    set_seed(5)
    return trainable_model(config, None, base, init_weights, mesh)  # type: ignore[arg-type]


def equal_starts(cases: list[tuple[Config, Path, Path | None]]) -> None:
    cpu = torch.device("cpu")
    mesh = sharding.make_mesh(cpu, "full", 1)
    for config, base, init_weights in cases:
        whole = started(config, base, init_weights)
        drawn = torch.get_rng_state()
        model = started(config, base, init_weights, mesh)
        assert torch.equal(torch.get_rng_state(), drawn), "adapters draw the same numbers"
        frozen = [one for one in model.parameters() if not one.requires_grad and not one.is_meta]
        in_memory = sum(one.untyped_storage().nbytes() for one in frozen)
        assert in_memory < 10_000, "the base's weights have no memory of their own here"
        sharding.shard(model, mesh, cpu)
        wanted, ours = dict(whole.named_parameters()), dict(model.named_parameters())
        assert list(ours) == list(wanted)
        for name, parameter in wanted.items():
            found = sharding.gather(ours[name])
            assert found is not None and found.dtype == parameter.dtype, name
            assert torch.equal(found, parameter) and ours[name].requires_grad == parameter.requires_grad, name
        buffers = dict(model.named_buffers())
        assert all(torch.equal(buffers[name], one) for name, one in whole.named_buffers())
        if config is not cases[0][0]:
            continue
        batch = {"input_ids": torch.arange(4, 8).reshape(1, 4)}
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(model.eval()(**batch).logits, whole.eval()(**batch).logits)


def test_parts_are_those_of_a_whole_start(tmp_path: Path) -> None:
    """Names that transformers changes (PaliGemma, GPT-NeoX), tied embeddings (Gemma, GPT-2), a head of its own
    (Llama), weights with a number of rows that three ranks cannot share evenly, several files, pickles, DoRA's
    magnitudes, master weights, a module that trains fully, and a warm start of attention in float32.
    """
    families = ("gpt_neox", "gpt2", "llama", "gemma")
    bases = {name: tiny_causal.save(name, tmp_path / name) for name in families}
    paligemma = tiny_paligemma.save(tmp_path / "paligemma2", 2)
    several, pickled = (shutil.copytree(bases["llama"], tmp_path / name) for name in ("several", "pickled"))
    LlamaForCausalLM.from_pretrained(bases["llama"]).save_pretrained(several, max_shard_size="100KB")
    weights = pickled / "model.safetensors"
    torch.save(load_file(weights), pickled / "pytorch_model.bin")
    weights.unlink()
    (several / "model.safetensors").unlink()
    dora, full = {**LORA, "method": "dora"}, {"method": "full", "freeze": ["projector"]}
    cases = [
        (config_of("causal", several, dora, "bfloat16"), several, None),
        (config_of("causal", bases["llama"], {"method": "attention"}, "bfloat16"), bases["llama"], several),
        (config_of("causal", pickled, LORA), pickled, None),
        (config_of("causal", bases["gpt_neox"], {"method": "full"}, "bfloat16"), bases["gpt_neox"], None),
        (config_of("causal", bases["gpt2"], dora), bases["gpt2"], None),
        (config_of("causal", bases["gemma"], {"method": "full"}), bases["gemma"], None),
        (config_of("paligemma", paligemma, full, "bfloat16"), paligemma, None),
        (config_of("paligemma", paligemma, {**dora, "modules_to_save": ["projector"]}, "bfloat16"), paligemma, None),
    ]
    faults = on_ranks(equal_starts, tmp_path, cases)
    assert not any(faults), "\n".join(faults)


def equal_files(folder: Path) -> None:
    """Train a layer with AdamW on all ranks, write its weights and its optimizer, and compare them to one process."""
    rank, mesh = distributed.get_rank(), sharding.make_mesh(torch.device("cpu"), "full", 1)
    torch.manual_seed(0)
    model, alone = torch.nn.Linear(5, 7), torch.nn.Linear(5, 7)
    alone.load_state_dict(model.state_dict())
    fully_shard(model, mesh=mesh)
    optimizers = [torch.optim.AdamW(one.parameters(), weight_decay=0.1) for one in (model, alone)]
    for one, optimizer in zip((model, alone), optimizers, strict=True):
        one(torch.arange(10.0).reshape(2, 5)).square().mean().backward()
        optimizer.step()
    gathered: list[weakref.ref[torch.Tensor]] = []
    gather = sharding.gather

    def gather_one(tensor: torch.Tensor, keep: bool = True) -> torch.Tensor | None:
        whole = gather(tensor, keep)
        if whole is not None and whole is not tensor:
            assert sum(one() is not None for one in gathered) < 2, "earlier tensors were freed"
            gathered.append(weakref.ref(whole))
        return whole

    sharding.gather = gather_one
    mine = folder if rank == 0 else None
    sharding.write_optimizer_state(optimizers[0], mine and mine / "optimizer.pt")
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    sharding.write_tensors(weights, mine and mine / "weights.safetensors", {"bias": torch.bfloat16})
    if mine:
        found, wanted = torch.load(mine / "optimizer.pt", weights_only=True), optimizers[1].state_dict()
        assert found["param_groups"] == wanted["param_groups"]
        assert found["state"].keys() == wanted["state"].keys()
        for number, values in wanted["state"].items():
            assert values.keys() == found["state"][number].keys()
            torch.testing.assert_close(found["state"][number], values)  # the mean of three equal gradients is rounded
        stored = load_file(mine / "weights.safetensors")
        torch.testing.assert_close(stored["bias"], alone.bias.bfloat16())
        assert torch.allclose(stored["weight"], alone.weight) and stored["bias"].dtype == torch.bfloat16


def test_files_hold_whole_tensors_and_are_written_one_by_one(tmp_path: Path) -> None:
    """Rows that three ranks cannot share evenly, and the optimizer's counters, which are not sharded."""
    faults = on_ranks(equal_files, tmp_path, tmp_path)
    assert not any(faults), "\n".join(faults)


def fail_to_read_on_one_rank(base: Path, fails: str) -> None:
    mesh = sharding.make_mesh(torch.device("cpu"), "full", 1)

    def fail(*arguments: Any, **settings: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    if distributed.get_rank() == 1:
        setattr(*{"weights": (sharded_loading, "_open_files"), "config": (loading, "model_config")}[fails], fail)
    with pytest.raises(UserError, match=f"{base}: the model cannot be loaded: .*Input/output error"):
        loading.load_weights(base, "float32", "causal", mesh=mesh)


@pytest.mark.parametrize("fails", ["weights", "config"])
def test_a_rank_that_cannot_read_ends_all_at_once(tmp_path: Path, fails: str) -> None:
    """transformers compares tied weights that a file has twice on all ranks: none may wait there for another."""
    base = tiny_causal.save("gemma", tmp_path / "gemma")
    weights = load_file(base / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    faults = on_ranks(fail_to_read_on_one_rank, tmp_path, base, fails)
    assert not any(faults), "\n".join(faults)
