"""The tables of docs/methods.md on models and GPUs, from the planner: `python -m tests.memory.methods_table`."""

from __future__ import annotations

import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import Gemma2Config, GPTNeoXConfig, PaliGemmaConfig, PreTrainedConfig

from ftlib.config.schema import Config
from ftlib.memory.estimate import RowShape, build_meta_model, estimate_step, host_estimate, shard_estimate
from ftlib.memory.search import MEMORY_SHARE
from tests.conftest import REPOSITORY

PAGE = REPOSITORY / "docs" / "methods.md"
_IMAGE_ROW, _TEXT_ROW = RowShape(256 + 96, 32), RowShape(2048, 2047)
_LORA = {"method": "lora", "r": 16, "alpha": 32}
_SHARDS = (2, 4, 8)
_GPUS = (24, 40, 80)
_SIGLIP = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
    "vision_use_head": False,
}


def _paligemma(**text: Any) -> PaliGemmaConfig:
    width = text["hidden_size"]
    text = {"vocab_size": 257216, "head_dim": 256, **text}
    return PaliGemmaConfig(
        vision_config={**_SIGLIP, "projection_dim": width},
        text_config=Gemma2Config(**text) if "query_pre_attn_scalar" in text else {"model_type": "gemma", **text},
        projection_dim=width,
    )


def _shapes(model: str) -> PreTrainedConfig:
    if model == "OpenCALM-7B":
        sizes = {"hidden_size": 4096, "intermediate_size": 16384, "num_hidden_layers": 32, "num_attention_heads": 32}
        return GPTNeoXConfig(**sizes, vocab_size=52224, tie_word_embeddings=False)
    if model == "PaliGemma-3B":
        return _paligemma(
            hidden_size=2048,
            intermediate_size=16384,
            num_hidden_layers=18,
            num_attention_heads=8,
            num_key_value_heads=1,
        )
    return _paligemma(
        hidden_size=3584,
        intermediate_size=14336,
        num_hidden_layers=42,
        num_attention_heads=16,
        num_key_value_heads=8,
        query_pre_attn_scalar=256,
    )


@dataclass(frozen=True)
class Needs:
    """What each GPU needs, in bytes.

    Attributes:
        one: with one GPU.
        whole: with several that each hold the whole model.
        shared: number of GPUs → if they share the model.
        checkpoint: size of a checkpoint.
    """

    one: int
    whole: int
    shared: dict[int, int]
    checkpoint: int


def needs(model: str, adapter: dict[str, Any], folder: Path) -> Needs:
    """Plan a model and a method.

    Args:
        folder: an empty one.
    """
    _shapes(model).save_pretrained(folder)
    images = model.startswith("PaliGemma")
    rows = _IMAGE_ROW if images else _TEXT_ROW

    config = Config.model_validate(
        {
            "name": "x",
            "task": "vqa" if images else "instruct",
            "model": {"family": "paligemma" if images else "causal", "base": "x", "dtype": "bfloat16"},
            "adapter": adapter,
            "data": {"source": "jsonl", "root": "x"},
            "training": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8, "bf16": True},
            "job": {"gpus": 2},
        }
    )
    shapes = build_meta_model(folder, config)
    whole = estimate_step(shapes, config, rows, 1, True)
    shared = {gpus: shard_estimate(whole, shapes, gpus).total for gpus in _SHARDS}
    return Needs(whole.total - whole.buckets, whole.total, shared, host_estimate(shapes, config, 2).checkpoint)


def write_for(found: Needs, gpus_gib: int) -> str:
    """What to write in a config for GPUs of a size, where `parallel.shard` is auto."""
    capacity = MEMORY_SHARE * gpus_gib * 2**30
    if found.one <= capacity and all(min(found.whole, found.shared[gpus]) <= capacity for gpus in _SHARDS):
        return "any number"
    enough = next((gpus for gpus in _SHARDS if found.shared[gpus] <= capacity), None)
    if enough is None:
        return "–"
    return f"`job: {{gpus: {enough}}}`" + ("" if enough == _SHARDS[-1] else " or more")


CASES = (
    ("PaliGemma-3B", "`lora`", " (vision frozen)", {**_LORA, "freeze": ["vision"]}),
    ("PaliGemma-3B", "`full`", "", {"method": "full"}),
    ("OpenCALM-7B", "`lora`", "", _LORA),
    ("OpenCALM-7B", "`full`", "", {"method": "full"}),
    ("PaliGemma 2 10B", "`lora`", " (vision frozen)", {**_LORA, "freeze": ["vision"]}),
)


def tables() -> list[list[str]]:
    """The lines below the headings of the page's two tables."""
    memory, choices = [], []
    for model, method, more, adapter in CASES:
        with tempfile.TemporaryDirectory() as folder:
            found = needs(model, adapter, Path(folder))
        sizes = (found.one, found.whole, *found.shared.values(), found.checkpoint)
        memory.append(_line(model, method + more, *(f"{size / 2**30:.1f}" for size in sizes)))
        choices.append(_line(model, method, *(write_for(found, size) for size in _GPUS)))
    return [memory, choices]


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def with_tables(page: str) -> str:
    """Return the text of docs/methods.md with new tables."""
    for heading, lines in zip(("| model | method | one GPU |", "| model | method | GPUs of"), tables(), strict=True):
        pattern = re.compile(rf"({re.escape(heading)}[^\n]*\n\|[-|]+\n)(\|[^\n]*\n)+")
        assert pattern.search(page), heading
        page = pattern.sub(lambda found, lines=lines: found[1] + "".join(f"{line}\n" for line in lines), page)
    return page


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text()))
