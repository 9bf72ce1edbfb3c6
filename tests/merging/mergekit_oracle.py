"""Results of mergekit itself on small models: `python -m tests.merging.mergekit_oracle`, where mergekit is installed.

Writes mergekit.safetensors beside this file: case/weight → result. The inputs are random numbers of numpy, so tests can
make them again without mergekit.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors.torch import load_file, save_file

RESULTS = Path(__file__).with_name("mergekit.safetensors")
VERSION = "0.1.5"
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 13,
    "tie_word_embeddings": False,
    "dtype": "float32",
}
_LAYER = "model.layers.0"
SHAPES = {
    "model.embed_tokens.weight": (13, 8),
    **{f"{_LAYER}.self_attn.{name}_proj.weight": (8, 8) for name in "qkvo"},
    **{f"{_LAYER}.mlp.{name}_proj.weight": (12, 8) for name in ("gate", "up")},
    f"{_LAYER}.mlp.down_proj.weight": (8, 12),
    **{f"{_LAYER}.{name}_layernorm.weight": (8,) for name in ("input", "post_attention")},
    "model.norm.weight": (8,),
    "lm_head.weight": (13, 8),
}

_THREE = {"a": {"weight": 0.6}, "b": {"weight": -0.4}, "c": {"weight": 0.5}}
_HALF = {"a": {"weight": 0.6, "density": 0.37}, "b": {"weight": 0.4, "density": 0.37}}
_WHOLE = {"a": {"weight": 0.6, "density": 1.0}, "b": {"weight": 0.4, "density": 1.0}}
CASES: dict[str, dict[str, Any]] = {
    "linear": {"merge_method": "linear", "models": _THREE},
    "task_arithmetic": {"merge_method": "task_arithmetic", "models": _THREE, "parameters": {"lambda": 0.8}},
    "task_arithmetic normalized": {
        "merge_method": "task_arithmetic",
        "models": {"a": {"weight": 0.6}, "b": {"weight": 0.8}},
        "parameters": {"normalize": True},
    },
    "ties": {"merge_method": "ties", "models": _HALF},
    "ties of three": {
        "merge_method": "ties",
        "models": {**_HALF, "c": {"weight": 0.7, "density": 0.37}},
        "parameters": {"normalize": False, "lambda": 1.3},
    },
    "dare_linear": {"merge_method": "dare_linear", "models": _WHOLE},
    "dare_ties": {"merge_method": "dare_ties", "models": _WHOLE},
    "slerp": {"merge_method": "slerp", "models": {"a": {}, "b": {}}, "parameters": {"t": 0.3}},
}
"""mergekit's YAML without paths; DARE with density 1, because what it drops is random."""


def write_models(folder: Path) -> None:
    """Write base, a, b and c."""
    draw = np.random.default_rng(7)
    base = {name: draw.standard_normal(shape) for name, shape in SHAPES.items()}
    for name in ("base", "a", "b", "c"):
        step = 0.0 if name == "base" else 0.1
        weights = {key: value + step * draw.standard_normal(value.shape) for key, value in base.items()}
        (folder / name).mkdir()
        tensors = {key: torch.tensor(value, dtype=torch.float32) for key, value in weights.items()}
        save_file(tensors, folder / name / "model.safetensors", {"format": "pt"})
        (folder / name / "config.json").write_text(json.dumps(CONFIG))


def write_yaml(folder: Path, case: str) -> Path:
    """Write the YAML of a case for models in the same folder."""
    fields = CASES[case]
    models = [
        {"model": str(folder / name), **({"parameters": own} if own else {})} for name, own in fields["models"].items()
    ]
    base = {} if case == "linear" else {"base_model": str(folder / ("a" if case == "slerp" else "base"))}
    path = folder / f"{case}.yaml"
    path.write_text(yaml.safe_dump({**fields, **base, "models": models, "dtype": "float32"}))
    return path


def main() -> None:
    """Run mergekit on every case."""
    found = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_models(folder)
        for case in CASES:
            output = folder / f"{case} result"
            subprocess.run(["mergekit-yaml", write_yaml(folder, case), output, "--no-copy-tokenizer"], check=True)
            for path in output.glob("*.safetensors"):
                found |= {f"{case}/{name}": tensor.contiguous() for name, tensor in load_file(path).items()}
    save_file(found, RESULTS, {"mergekit": VERSION})


if __name__ == "__main__":
    main()
