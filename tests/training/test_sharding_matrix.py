"""Sharded training of more models and methods, with other numbers of ranks, and killed at random moments."""

from __future__ import annotations

import json
import os
import random
import signal
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from ftlib.core import jsonl
from ftlib.runs.run import Run
from tests.conftest import LORA
from tests.models.test_vlm import ARCHITECTURES, require_packages
from tests.training.sharded_ranks import Case, Ranks
from tests.training.test_divergence import INFINITE_STEP
from tests.training.test_resume import run_of
from tests.training.test_sharding import (
    Ftlib,
    assert_same,
    case,
    causal_config,
    checkpoint_step,
    exact,
    image_config,
    job,
    paligemma,
    ranks,
    rows_of_many_images,
    train_on,
)

__all__ = ["paligemma", "ranks"]  # fixtures

FULL, ATTENTION = "{method: full}", "{method: attention}"
LORA_0 = LORA.replace("dropout: 0.1", "dropout: 0.0")
DORA = LORA_0.replace("lora", "dora")
SHORT = ("training.max_steps=6", "checkpoint.steps=3", "checkpoint.keep=9", "evaluation.loss=true")


BFLOAT16 = "model.dtype=bfloat16"
"""The base; trained weights stay float32."""
ROUNDS = "rounds=[{learning_rate: 0.01}, {learning_rate: 0.003}]"
ONE_ROW = "training.per_device_train_batch_size=1"
BEST = "checkpoint.best={metric: accuracy, every: 3}"


@dataclass(frozen=True)
class Variant:
    """A config, and the ranks that train it.

    Attributes:
        model: paligemma1, paligemma2, or an architecture of `tiny_causal`.
        micro: rows of a micro-batch.
        nodes: with two of them the model is sharded within each.
        coarse: factor of the tolerances.
    """

    model: str
    adapter: str
    overrides: tuple[str, ...] = ()
    count: int = 2
    micro: int = 1
    nodes: int = 1
    coarse: float = 1


VARIANTS = {
    "paligemma-lora": Variant("paligemma1", LORA_0, ("evaluation.loss=true",)),
    "paligemma-dora": Variant("paligemma1", DORA),
    "paligemma-attention": Variant("paligemma1", ATTENTION),
    "paligemma-projector": Variant("paligemma1", LORA_0.replace("r: 4", "r: 4, modules_to_save: [projector]")),
    "paligemma2-full": Variant("paligemma2", FULL),
    "paligemma2-lora": Variant("paligemma2", LORA_0, ("loss.average=example",)),
    "paligemma2-four": Variant("paligemma2", FULL, ("loss.average=example",), count=4),
    "neox-full": Variant("gpt_neox", FULL),
    "neox-lora": Variant("gpt_neox", LORA_0, ("loss.average=example",)),
    "neox-sgd": Variant("gpt_neox", FULL, ("training.optim=sgd",)),
    "llama-full": Variant("llama", FULL, ("loss.average=example",)),
    "llama-dora": Variant("llama", DORA),
    "llama-four": Variant("llama", LORA_0, count=4),
    "gemma-tied": Variant("gemma", FULL),
    "llama-pissa": Variant("llama", LORA_0.replace("r: 4", "r: 4, init_lora_weights: pissa")),
    "packing": Variant("llama", FULL, ("loss.packing=true",), micro=2),
    "mixture": Variant("llama", FULL, ("data.source=mixture",)),
    "whole-batch": Variant("gpt_neox", FULL, micro=2),
    "checkpointing-full": Variant("llama", FULL, ("training.gradient_checkpointing=true",)),
    "checkpointing-lora": Variant("paligemma1", LORA_0, ("training.gradient_checkpointing=true",)),
    "clipping": Variant("llama", FULL, ("training.max_grad_norm=0.05",)),
    "nodes-full": Variant("llama", FULL, count=4, nodes=2),
    "nodes-lora": Variant("llama", LORA_0, count=4, nodes=2),
    "rounds": Variant(
        "llama",
        FULL,
        (ROUNDS, "training={max_steps: 4, gradient_accumulation_steps: 4}", ONE_ROW),
    ),
    "parts": Variant("paligemma1", FULL, ("parts={vision: {learning_rate_factor: 0.1}}",)),
    "bfloat16-full": Variant("paligemma1", FULL, (BFLOAT16, BEST), coarse=1000),
    "bfloat16-lora": Variant("paligemma2", LORA_0, (BFLOAT16, BEST), coarse=1000),
}


@pytest.mark.long
@pytest.mark.parametrize("name", VARIANTS)
def test_sharded_ranks_are_one(
    ranks: Ranks, paligemma: Callable[..., Path], tmp_path: Path, ftlib: Ftlib, name: str
) -> None:
    one = VARIANTS[name]
    overrides = [*one.overrides]
    if one.model.startswith("paligemma"):
        config = paligemma(one.adapter, int(one.model[-1]))
        overrides += SHORT
    else:
        config = causal_config(tmp_path / "causal", one.model, one.adapter, ftlib)
    if name == "mixture":
        overrides = [mixture_of(tmp_path / "causal" / "data")]
        assert ftlib("prepare", config, *overrides)[0] == 0
    plain = run_of(config, tmp_path / "one", *overrides)
    assert ftlib("train", config, *overrides)[0] == 0
    shard = "auto" if one.nodes > 1 else "full"
    overrides += job(one.count, shard, one.micro, one.nodes)
    ours = run_of(config, tmp_path / "ranks", *overrides)
    more: dict[str, Any] = {"scope": "node"} if one.nodes > 1 else {}
    train_on(ranks, one.count, [case(tmp_path / "ranks", [config, *overrides], **more)], nodes=one.nodes)
    assert_same(ours, plain, one.coarse)


@pytest.mark.long
@pytest.mark.parametrize("adapter", [FULL, LORA_0], ids=["full", "lora"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_vision_language_models_on_ranks_with_images_and_without(
    ranks: Ranks, paligemma: Any, write_config: Any, tmp_path: Path, ftlib: Ftlib, architecture: str, adapter: str
) -> None:
    require_packages(architecture)
    data = rows_of_many_images(tmp_path / "data")
    config = image_config(tmp_path / "vlm", architecture, adapter, data, write_config, ftlib)
    more = ["evaluation.loss=true", BEST.replace("every: 3", "every: 2"), "checkpoint.steps=2"]
    plain = run_of(config, tmp_path / "one", *more)
    assert ftlib("train", config, *more)[0] == 0
    ours = run_of(config, tmp_path / "ranks", *more, *job(2))
    train_on(ranks, 2, [case(tmp_path / "ranks", [config, *more, *job(2)])])
    assert_same(ours, plain)


@pytest.mark.long
def test_ranks_begin_anew_together_when_weights_are_no_numbers(
    ranks: Ranks, paligemma: Any, tmp_path: Path, ftlib: Ftlib
) -> None:
    """Infinite weights may be in one rank's part alone."""
    config = causal_config(tmp_path / "causal", "llama", FULL, ftlib)
    again = ("guard.restarts=1", "guard.learning_rate_factor=1e-40", "guard.max_loss=1e9", "evaluation.loss=false")
    arguments = [*INFINITE_STEP, *again, *job(2)]
    run = run_of(config, tmp_path / "runs", *arguments)
    train_on(ranks, 2, [case(tmp_path / "runs", [config, *arguments])])
    (trip,) = [line for line in jsonl.read_jsonl_log(run.history) if line["event"] == "diverged"]
    assert trip["step"] == 1 and "NaN or infinity in the weights" in trip["reason"]
    assert all(weight.isfinite().all() for weight in load_file(run.folder / "model" / "model.safetensors").values())


def mixture_of(folder: Path) -> str:
    """Two datasets, the second with longer answers and drawn twice."""
    rows = [{"instruction": f"{n} times", "input": "", "output": "word " * (1 + n % 9)} for n in range(24)]
    (folder / "words.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    parts = [{"name": name, "source": "instructions", "file": f"{file}.jsonl"} for name, file in
             (("sums", "data"), ("words", "words"))]  # fmt: skip
    data = {"source": "mixture", "root": str(folder), "parts": [parts[0], {**parts[1], "weight": 2}]}
    return f"data={json.dumps({**data, 'split': {'valid': 7, 'test': 0}})}"


CHAINS = {
    "ranks": [(4, "full", 1), (2, "full", 3), (1, "full", 5), (4, "full", 0)],
    "methods": [(2, "none", 1), (2, "full", 3), (2, "none", 5), (4, "full", 0)],
}
"""Number of ranks, `parallel.shard`, and the step after which a signal comes; the checkpoint is that of the next."""


@pytest.mark.long
@pytest.mark.parametrize(("model", "adapter"), [("gpt_neox", FULL), ("llama", LORA_0), ("gemma", FULL)])
@pytest.mark.parametrize("chain", CHAINS)
def test_runs_resume_with_other_numbers_of_ranks(
    ranks: Ranks, paligemma: Any, tmp_path: Path, ftlib: Ftlib, model: str, adapter: str, chain: str
) -> None:
    config = causal_config(tmp_path / "causal", model, adapter, ftlib)
    long = ["training.max_steps=8", "checkpoint.steps=2"]
    plain = run_of(config, tmp_path / "one", *long)
    assert ftlib("train", config, *long)[0] == 0
    ours = run_of(config, tmp_path / "ranks", *long, *job(2))
    for count, shard, stop in CHAINS[chain]:
        arguments = [config, *long, *job(count, shard)]
        one = case(tmp_path / "ranks", arguments, stop_after=stop)
        train_on(ranks, count, [one], [75 if stop else 0])
    assert_same(ours, plain)
    starts = [line["step"] for line in jsonl.read_jsonl_log(ours.history) if line["event"] == "start"]
    assert starts == [0, 2, 4, 6]


@pytest.mark.long
def test_killed_at_random_moments_the_result_is_the_same(
    ranks: Ranks, paligemma: Any, tmp_path: Path, ftlib: Ftlib
) -> None:
    """20 times a random rank of two that share a fully trained model."""
    config = causal_config(tmp_path / "causal", "gpt_neox", FULL, ftlib)
    long = ["training.max_steps=200", "checkpoint.steps=3", "checkpoint.keep=2", "evaluation.loss=false", *job(2)]
    straight, broken = (run_of(config, tmp_path / name, *long) for name in ("straight", "broken"))
    train_on(ranks, 2, [case(tmp_path / "straight", [config, *long])])
    pace = statistics.median(line["seconds"] for line in jsonl.read_jsonl_log(straight.metrics) if "seconds" in line)
    whole, chance = case(tmp_path / "broken", [config, *long]), random.Random(5)
    victims = [kill_one(ranks, broken, whole, chance, chance.uniform(0, 7 * pace)) for _ in range(20)]
    train_on(ranks, 2, [whole])
    assert exact(broken) == exact(straight)
    assert len(set(victims)) == 2 and checkpoint_step(broken) == 200
    starts = [line["step"] for line in jsonl.read_jsonl_log(broken.history) if line["event"] == "start"]
    assert len(set(starts)) > 10, starts


def kill_one(ranks: Ranks, run: Run, whole: Case, chance: random.Random, seconds: float) -> int:
    """Start two ranks and kill one, which is returned, some seconds after a step that no earlier start has reached."""
    before = last_step(run)
    pids = ranks.start(2, [whole])
    ends = time.monotonic() + 200
    while last_step(run) <= before:
        assert time.monotonic() < ends
        time.sleep(0.02)
    time.sleep(seconds)
    victim = chance.randrange(2)
    os.kill(pids[victim], signal.SIGKILL)
    ended = ranks.wait()
    assert (ended[victim].code, ended[1 - victim].codes) == (-signal.SIGKILL, [76]), [one.error for one in ended]
    return victim


def last_step(run: Run) -> int:
    return max((line["step"] for line in jsonl.read_jsonl_log(run.metrics)), default=0)
