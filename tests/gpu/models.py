"""Models of real shapes with random weights made on the GPU, rows for them, and ftlib's trainer over both."""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import random
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PreTrainedModel,
)
from transformers.initialization import no_init_weights

from ftlib.config.schema import Config
from ftlib.data.example import Example
from ftlib.models.adapters import prepare_for_training
from ftlib.models.causal_lm import CausalProcessor
from ftlib.models.paligemma import PaliGemmaInputProcessor, skip_image_token_count
from ftlib.models.registry import InputProcessor
from ftlib.models.tiny import tiny_processor, tiny_tokenizer
from ftlib.training import arguments
from ftlib.training.data import MixtureSampler, SupervisedDataset
from ftlib.training.resume import TrainingPhase
from ftlib.training.trainer import ResumableTrainer
from tests.gpu.machine import DEVICE, REHEARSAL, peak_allocated, peak_reserved, reset_peak

LORA = {"method": "lora", "r": 8, "alpha": 16}
ROWS = 32 if REHEARSAL else 1024


@functools.cache
def dtype() -> str:
    """The 16-bit numbers that this GPU computes with; a rehearsal is in float32."""
    if REHEARSAL:
        return "float32"
    return "bfloat16" if torch.cuda.get_device_capability() >= (8, 0) else "float16"


def mixed() -> dict[str, Any]:
    """Sections of a config that computes with them."""
    kinds = {"float32": {}, "bfloat16": {"bf16": True}, "float16": {"fp16": True}}
    return {"model": {"dtype": dtype()}, "training": kinds[dtype()]}


def paligemma(size: int) -> tuple[PaliGemmaForConditionalGeneration, PaliGemmaInputProcessor]:
    """PaliGemma-3B's shape at an image size, with its whole vocabulary; its tokenizer knows characters."""
    small = REHEARSAL
    processor = tiny_processor(28 if small else size, 14)
    tokens = processor.tokenizer
    special = {f"{name}_token_id": getattr(tokens, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    config = PaliGemmaConfig(
        vision_config={"model_type": "siglip_vision_model", "image_size": 28 if small else size, "patch_size": 14,
                       "hidden_size": 64 if small else 1152, "intermediate_size": 128 if small else 4304,
                       "num_hidden_layers": 1 if small else 27, "num_attention_heads": 4 if small else 16,
                       "vision_use_head": False, "projection_dim": 64 if small else 2048},
        text_config={"model_type": "gemma", "hidden_size": 64 if small else 2048,
                     "intermediate_size": 128 if small else 16384, "num_hidden_layers": 2 if small else 18,
                     "num_attention_heads": 2 if small else 8, "num_key_value_heads": 1,
                     "head_dim": 32 if small else 256, "vocab_size": 2048 if small else 257216, **special},
        projection_dim=64 if small else 2048,
        image_token_index=processor.image_token_id,
        **special,
    )  # fmt: skip
    return _random(PaliGemmaForConditionalGeneration, config), PaliGemmaInputProcessor(processor)


def neox(width: int, layers: int = 32) -> tuple[GPTNeoXForCausalLM, CausalProcessor]:
    """OpenCALM's shapes: 3B is 2,560 wide with 32 layers, 7B 4,096 with 32."""
    tokenizer = tiny_tokenizer()
    eos = tokenizer.eos_token_id
    width, layers = (64, 2) if REHEARSAL else (width, layers)
    config = GPTNeoXConfig(
        vocab_size=512 if REHEARSAL else 52224, hidden_size=width, num_hidden_layers=layers,
        num_attention_heads=4 if REHEARSAL else 32, intermediate_size=4 * width, max_position_embeddings=2048,
        tie_word_embeddings=False, bos_token_id=eos, eos_token_id=eos, pad_token_id=eos,
    )  # fmt: skip
    return _random(GPTNeoXForCausalLM, config), CausalProcessor(tokenizer, config.max_position_embeddings)


def _random(kind: Any, config: Any) -> Any:
    """Weights of a normal distribution, drawn on the device in its type: no file is read."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype()))
    try:
        with torch.device(DEVICE), no_init_weights():
            model = kind(config)
    finally:
        torch.set_default_dtype(before)
    model.tie_weights()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.02)
            else:
                parameter.fill_(1.0 if "norm" in name and name.endswith("weight") and "gemma" not in name else 0.0)
    return model.eval()


def image_rows(folder: Path, count: int = ROWS) -> list[Example]:
    """Questions of 20 to 60 characters (each a token) about JPEGs of 640 × 480 pixels, answers of 4 to 16."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)
    for number in range(64):
        pixels = np.random.default_rng(number).integers(0, 256, (30, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((640, 480), Image.Resampling.BICUBIC).save(folder / f"{number}.jpg")
    return [
        Example(str(n), f"{n % 64}.jpg", "q" * draw.randint(20, 60), "a" * draw.randint(4, 16)) for n in range(count)
    ]


def text_rows(tokens: int, count: int = ROWS) -> list[Example]:
    """Rows of exactly so many tokens, a third of them the answer."""
    answer = tokens // 3
    return [Example(str(number), "", "q" * (tokens - answer), "a" * (answer - 1)) for number in range(count)]


def config_of(family: str, micro_batch: int, adapter: dict[str, Any] | None = None, **sections: Any) -> Config:
    """A config for models and rows that are there already; sections add fields to the ones that stand here."""
    fields: dict[str, Any] = {
        "name": "gpu",
        "task": "caption" if family == "paligemma" else "instruct",
        "model": {"family": family, "base": "none", **mixed()["model"]},
        "adapter": adapter or (LORA if family == "paligemma" else {**LORA, "targets": ["query_key_value"]}),
        "data": {"source": "jsonl", "root": "/", "prompt": "{prefix}"},
        "training": {"per_device_train_batch_size": micro_batch, "learning_rate": 1e-4, "max_steps": 8,
                     **mixed()["training"]},
        "checkpoint": {"steps": 1_000_000, "minutes": 1_000_000},
        "evaluation": {"before": False},
    }  # fmt: skip
    for name, values in sections.items():
        fields[name] = {**fields.get(name, {}), **values}
    return Config.model_validate(fields)


@dataclass(frozen=True)
class Speed:
    """What training steps took; the first ones, which allocate and choose kernels, do not count."""

    rows_per_second: float
    reserved: int
    allocated: int
    losses: list[float]


def trainer_of(
    config: Config, model: torch.nn.Module, inputs: InputProcessor, rows: list[Example], folder: Path
) -> Any:
    """ftlib's trainer over a model that has its trainable parameters marked."""
    kept = range(len(rows))
    dataset = SupervisedDataset(
        rows, folder, config.data.templates, inputs, kept, MixtureSampler([len(rows)], [1.0], config.seed)
    )
    built = arguments.build_training_arguments(config, folder, TrainingPhase())
    skip_image_token_count(model)
    trainer = ResumableTrainer(config, model, dataset, built, folder / "checkpoints", TrainingPhase())
    trainer._save_checkpoint = lambda model, trial: None
    return trainer


@contextlib.contextmanager
def adapted(model: PreTrainedModel, config: Config) -> Iterator[torch.nn.Module]:
    """The model with the config's adapter; afterwards it is the plain model again."""
    trainable = prepare_for_training(model, config.adapter, "none", config.model.family)
    trainable.train()
    try:
        yield trainable
    finally:
        restore_forward(trainable)
        if trainable is not model:
            trainable.unload()  # type: ignore[operator]
        else:
            model.to(getattr(torch, dtype()))  # master weights were float32
        model.zero_grad(set_to_none=True)
        gc.collect()
        reset_peak()


def restore_forward(model: torch.nn.Module) -> None:
    """Take off what accelerate wraps around a model's forward, and what ftlib leaves out of its work."""
    for module in model.modules():
        for name in ("forward", "_original_forward", "get_placeholder_mask", "enable_input_require_grads"):
            module.__dict__.pop(name, None)


def measure(
    config: Config, model: torch.nn.Module, inputs: InputProcessor, rows: list[Example], folder: Path, settled: int = 3
) -> Speed:
    """Train `max_steps` steps by ftlib's own loop and time them.

    Args:
        settled: steps that do not count.
    """
    trainer = trainer_of(config, model, inputs, rows, folder)
    records: list[dict[str, Any]] = []
    trainer.on_step = records.append
    reset_peak()
    trainer.train()
    restore_forward(model)
    found = _speed(records, config.effective_batch_size, settled)
    del trainer
    gc.collect()
    return found


def _speed(records: list[dict[str, Any]], batch: int, settled: int) -> Speed:
    times = [record["seconds"] for record in records[settled:]] or [records[-1]["seconds"]]
    losses = [record["loss"] for record in records]
    return Speed(batch / statistics.median(times), peak_reserved(), peak_allocated(), losses)


def write_config(folder: Path, **sections: Any) -> Path:
    """A config file for the embedded tiny models, with digits; sections add fields."""
    fields: dict[str, Any] = {
        "name": "tiny", "task": "classify", "seed": 3,
        "model": {"family": "paligemma", "base": "ftlib/tiny-paligemma"},
        "adapter": {"method": "lora", "r": 4, "alpha": 8, "dropout": 0.1, "freeze": []},
        "data": {"source": "digits", "root": "${store}/datasets/digits", "prompt": "which digit is this?",
                 "split": {"valid": 0.2, "test": 0.2}},
        "training": {"max_steps": 8, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2,
                     "learning_rate": 1e-2},
        "checkpoint": {"steps": 3, "keep": 2},
        "evaluation": {"splits": ["valid"], "before": False, "max_new_tokens": 2},
    }  # fmt: skip
    for name, values in sections.items():
        fields[name] = values if name == "adapter" else {**fields.get(name, {}), **values}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.yaml"
    path.write_text(json.dumps(fields))
    return path
