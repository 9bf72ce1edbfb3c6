"""Time and memory of TIES on checkpoints of PaliGemma-3B's shape: ftlib against mergekit, one after the other.

    python -m tests.benchmarks.merging [FOLDER [SHARE]]

Made in FOLDER (default: a temporary one; 35 GB) are a base and two models of random bfloat16 weights in shards; with
SHARE (1) only that share of the layers and of the vocabulary. Each side is a process of its own with the same cores;
files are in the page cache as far as it holds them. mergekit comes from the package registry into an environment of
its own; a ready one is named by FTLIB_MERGEKIT (its bin folder). The results are compared on rows of every tensor; they
differ by mergekit's rounding of updates.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ftlib.merging.checkpoint_io import canonical_name

MERGEKIT = "mergekit==0.1.5"
SHARE = float(sys.argv[2]) if len(sys.argv) > 2 else 1.0
LAYERS, VISION_LAYERS, WORDS = (max(1, round(SHARE * whole)) for whole in (18, 27, 257152))
WIDTH, INNER, HEAD = 2048, 16384, 256
VISION, VISION_INNER = 1152, 4304
ARCHITECTURE = "BareWeights"
"""A name that mergekit does not know, so that it looks at the files: under PaliGemma's own it passes nearly all by."""

SHARD_BYTES = 5 * 10**9
DENSITY = 0.3


def shapes() -> dict[str, tuple[int, ...]]:
    """PaliGemma-3B-pt-448's weights under the names of its released files; of its layers and words, a share."""
    text, vision = "language_model.model", "vision_tower.vision_model"
    found: dict[str, tuple[int, ...]] = {f"{text}.embed_tokens.weight": (WORDS, WIDTH), f"{text}.norm.weight": (WIDTH,)}
    for layer in (f"{text}.layers.{number}" for number in range(LAYERS)):
        found |= {f"{layer}.mlp.{name}_proj.weight": (INNER, WIDTH) for name in ("gate", "up")}
        found |= {f"{layer}.self_attn.{name}_proj.weight": (WIDTH, WIDTH) for name in "qo"}
        found |= {f"{layer}.self_attn.{name}_proj.weight": (HEAD, WIDTH) for name in "kv"}
        found[f"{layer}.mlp.down_proj.weight"] = (WIDTH, INNER)
        found |= {f"{layer}.{name}_layernorm.weight": (WIDTH,) for name in ("input", "post_attention")}
    for layer in (f"{vision}.encoder.layers.{number}" for number in range(VISION_LAYERS)):
        for name, shape in {"fc1": (VISION_INNER, VISION), "fc2": (VISION, VISION_INNER)}.items():
            found |= {f"{layer}.mlp.{name}.weight": shape, f"{layer}.mlp.{name}.bias": shape[:1]}
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            found |= {f"{layer}.self_attn.{name}.weight": (VISION, VISION), f"{layer}.self_attn.{name}.bias": (VISION,)}
        for name in ("layer_norm1", "layer_norm2"):
            found |= {f"{layer}.{name}.weight": (VISION,), f"{layer}.{name}.bias": (VISION,)}
    found |= {f"{vision}.post_layernorm.{name}": (VISION,) for name in ("weight", "bias")}
    found |= {
        f"{vision}.embeddings.patch_embedding.weight": (VISION, 3, 14, 14),
        f"{vision}.embeddings.patch_embedding.bias": (VISION,),
        f"{vision}.embeddings.position_embedding.weight": (1024, VISION),
        "multi_modal_projector.linear.weight": (WIDTH, VISION),
        "multi_modal_projector.linear.bias": (WIDTH,),
    }
    return found


def make_model(folder: Path, seed: int, base: Path | None) -> None:
    """Random weights, or those of `base` with random updates, in shards with an index."""
    folder.mkdir(parents=True)
    draw = torch.Generator().manual_seed(seed)
    shards: list[dict[str, torch.Tensor]] = [{}]
    weight_map = {}
    for name, shape in shapes().items():
        tensor = torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02 if base is None else 0.002, generator=draw)
        if base:
            tensor += read(base, name)
        if sum(other.nbytes for other in shards[-1].values()) + tensor.nbytes > SHARD_BYTES:
            save_file(shards[-1], folder / f"model-{len(shards):05d}.safetensors", {"format": "pt"})
            shards[-1].clear()
            shards.append({})
        shards[-1][name] = tensor
        weight_map[name] = f"model-{len(shards):05d}.safetensors"
    save_file(shards[-1], folder / f"model-{len(shards):05d}.safetensors", {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = {"architectures": [ARCHITECTURE], "model_type": "paligemma", "dtype": "bfloat16"}
    text = {"model_type": "gemma", "num_hidden_layers": LAYERS, "vocab_size": WORDS, "hidden_size": WIDTH}
    vision = {"model_type": "siglip_vision_model", "num_hidden_layers": VISION_LAYERS, "hidden_size": VISION}
    (folder / "config.json").write_text(json.dumps({**config, "text_config": text, "vision_config": vision}))


def read(folder: Path, name: str, rows: int | None = None) -> torch.Tensor:
    """A tensor of a model, or its first rows, under any of its names."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for stored in file.keys():  # noqa: SIM118 - no mapping
                if canonical_name(stored) == canonical_name(name):
                    return file.get_tensor(stored) if rows is None else file.get_slice(stored)[:rows]
    raise KeyError(name)


def run(words: list[str]) -> tuple[float, float, float]:
    """(seconds, seconds of all cores together, GiB of memory at the peak) of a process."""
    began = time.monotonic()
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{words[:3]} failed with status {status}")
    return time.monotonic() - began, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 2**20


def mergekit_bin(folder: Path) -> Path:
    """The environment with mergekit, made if there is none."""
    if ready := os.environ.get("FTLIB_MERGEKIT"):
        return Path(ready)
    subprocess.run([sys.executable, "-m", "venv", str(folder / "mergekit")], check=True)
    bin_folder = folder / "mergekit" / "bin"
    subprocess.run([str(bin_folder / "python"), "-m", "pip", "install", "--quiet", MERGEKIT], check=True)
    return bin_folder


def largest_difference(folder: Path) -> float:
    """The largest difference between the results, on rows of every tensor, as a share of the base's deviation."""
    worst = 0.0
    for name in shapes():
        ours, theirs = (read(folder / result, name, 16).float() for result in ("ftlib", "merged"))
        worst = max(worst, float((ours - theirs).abs().max()))
    return worst / 0.02


def measure(folder: Path) -> None:
    tool = mergekit_bin(folder)
    base, models = folder / "base", [folder / "a", folder / "b"]
    make_model(base, 0, None)
    for seed, model in enumerate(models, 1):
        make_model(model, seed, base)
    config = {
        "merge_method": "ties",
        "base_model": str(base),
        "models": [{"model": str(m), "parameters": {"weight": 0.5, "density": DENSITY}} for m in models],
        "parameters": {"normalize": True},
        "dtype": "bfloat16",
    }
    (folder / "mergekit.yml").write_text(json.dumps(config))
    parts = [word for part in ("vision", "projector", "embeddings") for word in ("--part", f"{part}=merged")]
    words = ["merge", "--base", base, "--model", *models, "--weight", 0.5, 0.5, "--method", "ties", *parts]
    ours = run([sys.executable, "-m", "ftlib", *map(str, [*words, "--density", DENSITY, "-o", folder / "ftlib"])])
    print(f"ftlib:    {ours[0]:6.1f} s, {ours[1]:6.1f} s of computing, {ours[2]:5.2f} GiB", flush=True)
    theirs = run([str(tool / "mergekit-yaml"), str(folder / "mergekit.yml"), str(folder / "merged")])
    print(f"mergekit: {theirs[0]:6.1f} s, {theirs[1]:6.1f} s of computing, {theirs[2]:5.2f} GiB ({MERGEKIT})")
    print("ratios:   " + ", ".join(f"{their / our:.2f}" for our, their in zip(ours, theirs, strict=True)))
    print(f"largest difference: {largest_difference(folder):.4f} of the weights' standard deviation")
    print(f"{len(os.sched_getaffinity(0))} cores, {platform.machine()}, Python {platform.python_version()}")


def main() -> None:
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    if root:
        root.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="merging-", dir=root))
    try:
        measure(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
