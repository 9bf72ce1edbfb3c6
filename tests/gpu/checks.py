"""The checks of the acceptance run; each yields (name, ok, figures) for every thing that it finds out."""

from __future__ import annotations

import gc
import json
import math
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from ftlib.config.loader import load_experiment
from ftlib.core import files, jsonl
from ftlib.core.out_of_memory import is_out_of_memory
from ftlib.core.paths import find_site
from ftlib.models.adapters import prepare_for_training
from ftlib.models.generation import generate_answers, generate_with_logprobs, label_loglikelihoods
from ftlib.models.loading import load_weights
from ftlib.models.loss import answer_loss
from ftlib.models.paligemma import PaliGemmaInputProcessor
from ftlib.run_module import module_command
from ftlib.runs import run as runs
from tests.gpu import models
from tests.gpu.budgets import ALONE
from tests.gpu.flops import neox_flops, paligemma_flops
from tests.gpu.machine import (
    DEVICE,
    REHEARSAL,
    copy_rate,
    data_sheet_peak,
    matmul_rate,
    reset_peak,
    seconds,
    synchronize,
)
from tests.gpu.models import adapted, config_of, image_rows, measure, mixed, text_rows
from tests.gpu.processes import start

Results = Iterator[tuple[str, bool, dict[str, Any]]]


def environment(folder: Path) -> Results:
    """What this machine is, and what its GPU reaches: the denominators of MFU."""
    packages = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "triton")
    facts: dict[str, Any] = {"python": platform.python_version()}
    for name in packages:
        try:
            facts[name] = version(name)
        except ImportError:
            facts[name] = None
    if not REHEARSAL:
        properties = torch.cuda.get_device_properties(0)
        facts |= {
            "gpu": properties.name, "capability": f"{properties.major}.{properties.minor}",
            "memory_gib": round(properties.total_memory / 2**30, 1), "cuda": torch.version.cuda,
            "arch_list": torch.cuda.get_arch_list(), "driver": _driver(),
        }  # fmt: skip
    peak = data_sheet_peak()
    rates = {"data_sheet_tflops": peak and peak / 1e12, "matmul_tflops": round(matmul_rate() / 1e12, 1)}
    yield "environment", True, {**facts, **rates, "copy_tb_per_s": round(copy_rate() / 1e12, 2)}


def _driver() -> str | None:
    path = Path("/proc/driver/nvidia/version")
    return path.read_text().splitlines()[0].split("  ")[1] if path.exists() else None


def sdpa(folder: Path) -> Results:
    """torch's attention with PaliGemma's mask, padding on the left: forward and backward, each backend by itself."""
    rows, heads, length, width = (2, 2, 24, 16) if REHEARSAL else (8, 8, 320, 256)
    torch.manual_seed(0)
    query = torch.randn(rows, heads, length, width, device=DEVICE)
    key, value = (torch.randn(rows, 1, length, width, device=DEVICE) for _ in range(2))
    pushed = torch.randn_like(query)
    padding = torch.arange(rows, device=DEVICE) * 3
    seen = _prefix_mask(length, length - 10, padding)
    expected = _attention(query.double(), key.double(), value.double(), seen, None, pushed.double())
    tolerances = {torch.float32: 2e-3, torch.bfloat16: 3e-2}  # float32 products may be TF32's
    backends = {"default": None, "efficient": SDPBackend.EFFICIENT_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION,
                "math": SDPBackend.MATH, "flash": SDPBackend.FLASH_ATTENTION}  # fmt: skip
    real = (torch.arange(length, device=DEVICE) >= padding[:, None])[:, None, :, None]
    for dtype, tolerance in tolerances.items():
        found: dict[str, Any] = {}
        ok = True
        inputs = [tensor.to(dtype) for tensor in (query, key, value)]
        for name, backend in backends.items():
            for kind, mask in _masks(seen, dtype).items():
                try:
                    got = _attention(*inputs, mask, backend, pushed.to(dtype))
                except RuntimeError as error:
                    found[f"{name} {kind}"] = f"not taken: {str(error).splitlines()[0][:80]}"
                    ok &= name not in ("default", "math")
                    continue
                errors = [_relative(one * real, other * real) if one.shape == real.shape[:2] else
                          _relative(one, other) for one, other in zip(got, expected, strict=True)]  # fmt: skip
                nans = sum(int(one.isnan().sum()) for one in got)
                found[f"{name} {kind}"] = {"error": round(max(errors), 6), "nan": nans}
                ok &= name == "cudnn" or (nans == 0 and max(errors) < tolerance)
        if not REHEARSAL:
            chosen = torch._fused_sdp_choice(*_expanded(*inputs), _masks(seen, dtype)["float"])
            found["chosen"] = next(name for name, one in SDPBackend.__members__.items() if int(one) == chosen)
        yield f"sdpa {str(dtype).removeprefix('torch.')}", ok, found


def _prefix_mask(length: int, prompt: int, padding: Tensor) -> Tensor:
    """Shape (rows, 1, length, length): a prompt sees all of itself, an answer what came before; padding sees itself."""
    places = torch.arange(length, device=DEVICE)
    causal = places[None, :] <= places[:, None]
    both_ways = (places < prompt)[None, :] & (places < prompt)[:, None]
    real = places[None, :] >= padding[:, None]
    seen = (causal | both_ways)[None] & real[:, None, :]
    return (seen | torch.eye(length, dtype=torch.bool, device=DEVICE))[:, None]


def _masks(seen: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """The two forms of a mask that torch takes."""
    least = torch.finfo(dtype).min
    return {"bool": seen, "float": torch.zeros(seen.shape, dtype=dtype, device=DEVICE).masked_fill(~seen, least)}


def _expanded(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return query, key.expand_as(query), value.expand_as(query)


def _attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, backend: SDPBackend | None, pushed: Tensor
) -> list[Tensor]:
    """Output and gradients of query, key and value; without a backend, of double numbers by plain products."""
    query, key, value = (tensor.detach().clone().requires_grad_() for tensor in (query, key, value))
    many = _expanded(query, key, value)
    if query.dtype == torch.float64:
        scores = many[0] @ many[1].transpose(2, 3) / math.sqrt(query.shape[-1])
        output = scores.masked_fill(~mask, -math.inf).softmax(-1) @ many[2]
    elif backend is None:
        output = scaled_dot_product_attention(*many, attn_mask=mask)
    else:
        with sdpa_kernel(backend):
            output = scaled_dot_product_attention(*many, attn_mask=mask)
    output.backward(pushed)
    return [output.detach(), query.grad, key.grad, value.grad]  # type: ignore[list-item]


def _relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def agreement(folder: Path) -> Results:
    """Tiny models on the GPU in float32 and bfloat16, by every way of computing attention, against the CPU."""
    from transformers import PaliGemmaForConditionalGeneration

    from ftlib.models.tiny import make_tiny_neox, tiny_config, tiny_processor

    torch.backends.cuda.matmul.allow_tf32 = False
    processor = tiny_processor()
    gemma2 = {"model_type": "gemma2", "attn_logit_softcapping": 5.0, "final_logit_softcapping": 30.0,
              "sliding_window": 8, "query_pre_attn_scalar": 32}  # fmt: skip
    for name, text in {"paligemma": {}, "paligemma2": gemma2}.items():
        torch.manual_seed(0)
        PaliGemmaForConditionalGeneration(tiny_config(processor, **text)).save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
    make_tiny_neox(folder / "neox")
    for name in ("paligemma", "paligemma2", "neox"):
        family = "causal" if name == "neox" else "paligemma"
        batch = _tiny_batch(folder / name, family)
        expected = _loss_and_gradients(folder / name, family, "float32", "eager", batch, "cpu")
        ways = ["eager"] + ["sdpa"] * (name != "paligemma2") + ["flex"] * (not REHEARSAL)
        found: dict[str, Any] = {}
        ok = True
        for way in ways:
            for dtype, tolerance in {"float32": 2e-4, "bfloat16": 6e-2}.items():
                if REHEARSAL and dtype == "bfloat16":
                    continue
                got = _loss_and_gradients(folder / name, family, dtype, way, batch, DEVICE)
                loss = abs(got[0] - expected[0]) / expected[0]
                gradient = _relative(got[1], expected[1].double())
                found[f"{way} {dtype}"] = {"loss": round(loss, 7), "gradient": round(gradient, 6)}
                ok &= loss < tolerance / 4 and gradient < tolerance
        yield f"agreement {name}", ok, found


def _tiny_batch(folder: Path, family: str) -> dict[str, Tensor]:
    """Four rows of different lengths."""
    from PIL import Image

    answers = ["7", "a dog", "two cats and a horse", "yes"]
    if family == "causal":
        from ftlib.models.causal_lm import CausalProcessor

        inputs: Any = CausalProcessor.load(folder)
        return inputs.collate(
            [inputs.encode_train("q" * (3 + 5 * n), None, answer) for n, answer in enumerate(answers)]
        )
    inputs = PaliGemmaInputProcessor.load(folder)
    picture = Image.radial_gradient("L").convert("RGB")
    return inputs.collate([inputs.encode_train("q" * (3 + 5 * n), picture, answer) for n, answer in enumerate(answers)])


def _loss_and_gradients(
    folder: Path, family: str, dtype: str, attention: Any, batch: dict[str, Tensor], device: str
) -> tuple[float, Tensor]:
    """Of a whole model, on the CPU: the loss, and all gradients in a row."""
    model = load_weights(folder, dtype, family, attention=attention).to(device)
    moved = {name: tensor.to(device) for name, tensor in batch.items()}
    loss = answer_loss(model, moved, "token")
    loss.backward()
    gradients = [p.grad.float().flatten().cpu() for p in model.parameters() if p.grad is not None]
    return float(loss.detach()), torch.cat(gradients)


def prepare(config: Path) -> None:
    """`ftlib stage` and `ftlib prepare`.

    Raises:
        RuntimeError: one of them failed.
    """
    store, runs_folder = config.parent / "store", config.parent / "runs"
    environment = {**os.environ, "FTLIB_STORE": str(store), "FTLIB_RUNS": str(runs_folder)}
    for command in ("stage", "prepare"):
        line = module_command("ftlib", command, str(config))
        if code := subprocess.run(line, env=environment, stdout=subprocess.DEVNULL).returncode:
            raise RuntimeError(f"ftlib {command} ended with {code}")


def _run_of(config: Path, runs_folder: Path) -> runs.Run:
    site = find_site({"FTLIB_STORE": str(config.parent / "store"), "FTLIB_RUNS": str(runs_folder)})
    return runs.create_run(load_experiment(config, [], site), site)


def outcome(config: Path, runs_folder: Path) -> tuple[list[float], dict[str, str]]:
    """The logged losses, and hashes of the result's weights."""
    run = _run_of(config, runs_folder)
    losses = [line["loss"] for line in jsonl.read_jsonl_log(run.metrics) if "loss" in line]
    results = [path for name in ("adapter", "model") for path in sorted((run.folder / name).glob("*.safetensors"))]
    return losses, {path.name: files.file_sha256(path) for path in results}


def _interrupted(folder: Path, sections: dict[str, Any], function: str = "train", die_at: int = 5) -> dict[str, Any]:
    """Train once undisturbed and once killed and resumed, by a function of `processes`: what differs."""
    config = models.write_config(folder, **sections)
    (folder / "store").symlink_to(folder.parent / "store")
    undisturbed = start(function, config, folder / "straight")
    killed = start(function, config, folder / "broken", die_at).code()
    resumed = start(function, config, folder / "broken").code()
    codes = [undisturbed.code(), killed, resumed]
    found: dict[str, Any] = {"exit_codes": codes}
    if codes != [0, -signal.SIGKILL, 0]:
        return {**found, "complete": False}
    straight, broken = outcome(config, folder / "straight"), outcome(config, folder / "broken")
    difference = max((abs(a - b) for a, b in zip(straight[0], broken[0], strict=True)), default=math.inf)
    finite = all(map(math.isfinite, straight[0]))
    return {**found, "complete": bool(straight[1]) and finite, "steps": len(straight[0]),
            "loss_difference": difference, "same_bytes": straight[1] == broken[1],
            "first_loss": round(straight[0][0], 4), "last_loss": round(straight[0][-1], 4)}  # fmt: skip


def _all_interrupted(
    folder: Path, kinds: dict[str, dict[str, Any]], function: str = "train"
) -> Iterator[tuple[str, dict[str, Any]]]:
    """`_interrupted` of several kinds at the same time; all are trained on the same prepared data."""
    prepare(models.write_config(folder, **next(iter(kinds.values()))))
    with ThreadPoolExecutor(len(kinds)) as pool:
        folders = [folder / name.replace(" ", "-") for name in kinds]
        found = pool.map(partial(_interrupted, function=function), folders, kinds.values())
        yield from zip(kinds, found, strict=True)


def resume(folder: Path) -> Results:
    """Killed with SIGKILL and resumed, on the GPU: the same losses and the same bytes."""
    kinds = {"lora 16 bits": models.mixed(), "full float32": {"adapter": {"method": "full"}}}
    for name, found in _all_interrupted(folder, kinds):
        ok = found["complete"] and found["loss_difference"] == 0.0 and found["same_bytes"]
        yield f"resume {name}", ok, found


def sharding(folder: Path) -> Results:
    """A model sharded over a single rank: killed and resumed, and the losses of training without sharding."""
    kinds = {"lora 16 bits": models.mixed(), "full float32": {"adapter": {"method": "full"}}}
    for name, found in _all_interrupted(folder, kinds, "train_sharded"):
        place = folder / name.replace(" ", "-")
        code = start("train", place / "config.yaml", place / "whole").code()
        ok = code == 0 and found["complete"] and found["loss_difference"] == 0.0 and found["same_bytes"]
        if ok:
            runs_of = (outcome(place / "config.yaml", place / kind)[0] for kind in ("straight", "whole"))
            found["difference_from_whole"] = max(abs(a - b) for a, b in zip(*runs_of, strict=True))
        yield f"sharding {name}", ok and found["difference_from_whole"] < 2e-2, found


def numbers(folder: Path) -> Results:
    """Other kinds of numbers than bf16: fp16 with its scaler, int8, NF4, paged optimizers; trained and resumed."""
    usual = models.mixed()
    half = {"model": {"dtype": "float16"}, "training": {"fp16": True}}
    kinds: dict[str, dict[str, Any]] = {
        "fp16": {} if REHEARSAL else half,
        "int8": {"model": {**usual["model"], "quantization": "int8"}, "training": usual["training"]},
        "nf4 paged_adamw_8bit": {
            "model": {**usual["model"], "quantization": "nf4"},
            "training": {**usual["training"], "optim": "paged_adamw_8bit"},
        },
        "adamw_8bit": {"training": {"optim": "adamw_8bit"}},
    }
    if REHEARSAL:  # the others are told apart by their numbers only
        kinds = {name: kinds[name] for name in ("int8", "nf4 paged_adamw_8bit")}
    for name, found in _all_interrupted(folder, kinds):
        yield f"numbers {name}", found["complete"] and found["loss_difference"] < 1e-6, found


def out_of_memory(folder: Path) -> Results:
    """Memory runs out in forward, backward, optimizer and evaluation: smaller pieces, the same losses, or a message."""
    adapter = {"method": "lora", "r": 4, "alpha": 8, "freeze": []}  # no dropout: halves draw other random numbers
    sections = {"batch": {"auto": True}, "adapter": adapter, **models.mixed()}
    config = models.write_config(folder, **sections)
    prepare(config)
    begun = {place: start("train_out_of_memory", config, folder / place, place)
             for place in ("nowhere", "forward", "backward", "optimizer")}  # fmt: skip
    codes = {place: one.code() for place, one in begun.items()}
    expected = outcome(config, folder / "nowhere")[0]
    for place in ("forward", "backward"):
        losses = outcome(config, folder / place)[0]
        history = jsonl.read_jsonl_log(_run_of(config, folder / place).history)
        halved = [line["micro_batch"] for line in history if line["event"] == "out of memory"]
        differences = [abs(a - b) for a, b in zip(expected, losses, strict=False)]
        ok = codes[place] == 0 and bool(halved) and len(losses) == len(expected) and max(differences) < 2e-2
        found = {"exit_code": codes[place], "micro_batch": halved, "loss_difference": max(differences, default=None)}
        yield f"out_of_memory {place}", ok, found
    checkpoints = list((_run_of(config, folder / "optimizer").folder / "checkpoints").rglob("COMPLETE.json"))
    ok = codes["optimizer"] == 2 and bool(checkpoints)
    yield "out_of_memory optimizer", ok, {"exit_code": codes["optimizer"], "checkpoints": len(checkpoints)}
    code = start("evaluate_out_of_memory", config, folder / "nowhere").code()
    yield "out_of_memory evaluation", code == 2, {"exit_code": code}


def words_without_memory(folder: Path) -> Results:
    """What libraries raise on a full GPU counts as out of memory. Alone: nothing else would find memory."""
    if REHEARSAL:
        yield "words_without_memory", True, {}
        return
    words = start("words_without_memory").result()
    yield "words_without_memory", all("not recognized" not in str(text) for text in words.values()), words


def synchronisation(folder: Path) -> Results:
    """Where a micro-batch's forward and backward wait for the GPU: nowhere in ftlib."""
    model, inputs = models.paligemma(224) if REHEARSAL else _small_paligemma()
    rows = image_rows(folder / "rows")
    config = config_of("paligemma", 4)
    with adapted(model, config) as trainable:
        trainer = models.trainer_of(config, trainable, inputs, rows, folder / "rows")
        trainer.model_wrapped = trainer.accelerator.prepare(trainable)
        trainer.create_optimizer()
        batches = iter(trainer.get_train_dataloader())
        items = torch.tensor(40, device=DEVICE)
        for _ in range(2):
            trainer.training_step(trainer.model_wrapped, _moved(next(batches)), items)
        batch = next(batches)
        places: dict[str, int] = {}

        def note(message: Any, *more: Any, **others: Any) -> None:
            frames = [
                f for f in traceback.extract_stack() if "warnings" not in f.filename and "checks.py" not in f.filename
            ]
            ours = [f for f in frames if "/ftlib/" in f.filename]
            last = frames[-1]
            text = f"{'/'.join(Path(last.filename).parts[-3:])}:{last.lineno}"
            if ours:
                text += f" < {'/'.join(Path(ours[-1].filename).parts[-2:])}:{ours[-1].lineno}"
            if "synchroniz" in str(message):
                places[text] = places.get(text, 0) + 1

        if not REHEARSAL:
            torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = note
            trainer.training_step(trainer.model_wrapped, _moved(batch), items)
        if not REHEARSAL:
            torch.cuda.set_sync_debug_mode("default")
    own = [place for place in places if "/ftlib/" in place.split(" < ")[0] or place.startswith("ftlib/")]
    yield "synchronisation", not own, {"in_ftlib": own, "all": places}


def _moved(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to(DEVICE, non_blocking=True) for name, tensor in batch.items()}


def _small_paligemma() -> tuple[Any, PaliGemmaInputProcessor]:
    """A tiny model: where it waits does not depend on its size."""
    from ftlib.models.tiny import tiny_model, tiny_processor

    processor = tiny_processor()
    model = tiny_model(processor).to(DEVICE, torch.bfloat16)
    return model, PaliGemmaInputProcessor(processor)


def paligemma_224(folder: Path) -> Results:
    """PaliGemma-3B at 224 pixels with LoRA: what `ftlib plan` says of its memory, rows/s, MFU, and against others."""
    model, inputs = models.paligemma(224)
    rows = image_rows(folder / "rows")
    rate = matmul_rate()
    yield from _planned(model, inputs, rows, folder, 224)
    best: dict[int, float] = {}
    for micro_batch in (2, 4) if REHEARSAL else (8, 16, 32, 64):
        config = config_of("paligemma", micro_batch, training={"max_steps": 12})
        with adapted(model, config) as trainable:
            speed = measure(config, trainable, inputs, rows, folder / "rows")
        best[micro_batch] = speed.rows_per_second
        figures = _speed_figures(speed, paligemma_flops(model.config, _mean_tokens(inputs, rows), "lora"), rate)
        yield f"paligemma_224 lora {micro_batch}", _fell(speed), figures
    yield from _others(model, inputs, rows, folder, best)


def _mean_tokens(inputs: Any, rows: Any) -> tuple[float, float]:
    """Tokens of a row, and of its answer, on average."""
    lengths = inputs.token_lengths([row.prefix for row in rows], [row.suffix for row in rows])
    return statistics.mean(a + b for a, b in lengths), statistics.mean(b for _, b in lengths)


def _fell(speed: models.Speed) -> bool:
    return all(map(math.isfinite, speed.losses))


def _speed_figures(speed: models.Speed, flops: float, rate: float) -> dict[str, Any]:
    """Rows a second, and model FLOPs over the data sheet's peak and over the measured product's rate."""
    reached = speed.rows_per_second * flops
    peak = data_sheet_peak()
    return {
        "rows_per_s": round(speed.rows_per_second, 2), "model_tflops": round(reached / 1e12, 1),
        "mfu": peak and round(reached / peak, 4), "of_measured_matmul": round(reached / rate, 4),
        "reserved_gib": round(speed.reserved / 2**30, 2), "allocated_gib": round(speed.allocated / 2**30, 2),
        "losses": [round(speed.losses[0], 4), round(speed.losses[-1], 4)],
    }  # fmt: skip


def _planned(model: Any, inputs: Any, rows: Any, folder: Path, size: int) -> Results:
    """`ftlib plan`'s prediction against what torch reserves."""
    from ftlib.memory.estimate import CONTEXT_BYTES, build_meta_model, estimate_step
    from ftlib.memory.search import _longest_row

    base = folder / "shapes"
    model.config.save_pretrained(base)
    inputs.save(base)
    for micro_batch in (4,) if REHEARSAL else (8, 32):
        config = config_of("paligemma", micro_batch, training={"max_steps": 6})
        lengths = np.array(inputs.token_lengths([row.prefix for row in rows], [row.suffix for row in rows]))
        predicted = estimate_step(
            build_meta_model(base, config), config, _longest_row(config, lengths, None), micro_batch, False
        )
        with adapted(model, config) as trainable:
            speed = measure(config, trainable, inputs, rows, folder / "rows")
        found = predicted.total - CONTEXT_BYTES
        figures = {
            "predicted_gib": round(found / 2**30, 2), "reserved_gib": round(speed.reserved / 2**30, 2),
            "allocated_gib": round(speed.allocated / 2**30, 2),
            "ratio": round(found / speed.reserved, 3) if speed.reserved else None,
            "parts_gib": {name: round(value / 2**30, 2) for name, value in vars(predicted).items()},
        }  # fmt: skip
        if not REHEARSAL:
            free, total = torch.cuda.mem_get_info()
            figures["context_gib"] = round((total - free - torch.cuda.memory_reserved()) / 2**30, 2)
        ok = REHEARSAL or 0.9 <= found / speed.reserved <= 1.1
        yield f"plan paligemma_{size} lora {micro_batch}", ok, figures


def _others(model: Any, inputs: Any, rows: Any, folder: Path, ours: dict[int, float]) -> Results:
    """The seeds' recipe (checkpointing, all logits, batch 4), and plain Trainer, PEFT and SDPA, in this process."""
    from tests.benchmarks.recipes.worker import image_collate

    collate = image_collate(inputs.processor)
    lines = [{"image": str(folder / "rows" / row.image), "prefix": row.prefix, "suffix": row.suffix} for row in rows]
    sizes = (2,) if REHEARSAL else (8, 16)
    kinds = {"seeds' recipe 4": (4, True, 0), **{f"plain trainer {size}": (size, False, 8) for size in sizes}}
    for name, (micro_batch, checkpointing, workers) in kinds.items():
        config = config_of("paligemma", micro_batch)
        with adapted(model, config) as trainable:
            try:
                speed = _plain(
                    trainable, lines, collate, micro_batch, checkpointing, 0 if REHEARSAL else workers, folder
                )
            except torch.OutOfMemoryError:
                yield f"paligemma_224 {name}", True, {"does_not_fit": True}
                continue
            finally:
                model.gradient_checkpointing_disable()
        figures = {"rows_per_s": round(speed.rows_per_second, 2), "reserved_gib": round(speed.reserved / 2**30, 2)}
        figures |= {"losses": [round(speed.losses[0], 4), round(speed.losses[-1], 4)]}
        ratios = {f"ftlib_{size}_over_it": round(rate / speed.rows_per_second, 2) for size, rate in ours.items()}
        yield f"paligemma_224 {name}", _fell(speed), {**figures, **ratios}


def _plain(
    model: Any, rows: Any, collate: Any, micro_batch: int, checkpointing: bool, workers: int, folder: Path
) -> models.Speed:
    """transformers' Trainer as it is."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    marks: list[float] = []

    class Marks(TrainerCallback):
        def on_step_end(self, *arguments: Any, **more: Any) -> None:
            synchronize()
            marks.append(time.monotonic())

    arguments = TrainingArguments(
        output_dir=str(folder / "plain"), max_steps=10, per_device_train_batch_size=micro_batch, learning_rate=1e-4,
        gradient_checkpointing=checkpointing, gradient_checkpointing_kwargs={"use_reentrant": False},
        save_strategy="no", report_to="none", remove_unused_columns=False, **mixed()["training"], disable_tqdm=True,
        logging_steps=1, dataloader_num_workers=workers,
    )  # fmt: skip
    models.restore_forward(model)
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collate, callbacks=[Marks()])
    reset_peak()
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    records = [{"seconds": b - a, "loss": loss} for a, b, loss in zip(marks, marks[1:], losses[1:], strict=False)]
    return models._speed(records, micro_batch, 3)


def paligemma_448(folder: Path) -> Results:
    """PaliGemma-3B at 448 pixels: LoRA, attention only, and all weights with float32 masters."""
    model, inputs = models.paligemma(448)
    rows = image_rows(folder / "rows")
    rate = matmul_rate()
    kinds: list[tuple[str, int, dict[str, Any]]] = [
        ("lora", 4, {}), ("lora", 8, {}), ("lora", 16, {}),
        ("lora checkpointing", 16, {"training": {"gradient_checkpointing": True}}),
        ("attention", 8, {"training": {"optim": "sgd", "learning_rate": 0.03}}),
        ("full", 4, {}),
    ]  # fmt: skip
    for method, micro_batch, sections in kinds:
        adapter = {"method": method} if method in ("attention", "full") else None
        config = config_of("paligemma", 2 if REHEARSAL else micro_batch, adapter, **_steps(sections))
        kind = method.split()[0]
        flops = paligemma_flops(model.config, _mean_tokens(inputs, rows), kind)
        try:
            with adapted(model, config) as trainable:
                speed = measure(config, trainable, inputs, rows, folder / "rows")
        except torch.OutOfMemoryError:
            yield f"paligemma_448 {method} {micro_batch}", True, {"does_not_fit": True}
            continue
        finally:
            if "checkpointing" in method:
                model.gradient_checkpointing_disable()
        yield f"paligemma_448 {method} {micro_batch}", _fell(speed), _speed_figures(speed, flops, rate)


def _steps(sections: dict[str, Any], steps: int = 8) -> dict[str, Any]:
    return {**sections, "training": {**sections.get("training", {}), "max_steps": steps}}


def nf4(folder: Path) -> Results:
    """PaliGemma-3B at 224 pixels in NF4, written and loaded as users do."""
    memory = Path("/dev/shm")
    base = (memory if memory.is_dir() and not REHEARSAL else folder) / f"ftlib-gpu-{os.getpid()}"
    try:
        model, inputs = models.paligemma(224)
        started = time.monotonic()
        model.save_pretrained(base)
        saved = time.monotonic()
        del model
        gc.collect()
        reset_peak()
        model = load_weights(base, models.dtype(), "paligemma", "none" if REHEARSAL else "nf4")
        loaded = time.monotonic()
    finally:
        for path in base.glob("*"):
            path.unlink()
    rows = image_rows(folder / "rows")
    rate = matmul_rate()
    flops = paligemma_flops(model.config, _mean_tokens(inputs, rows), "lora")
    for micro_batch in (2,) if REHEARSAL else (8, 32):
        config = config_of("paligemma", micro_batch)
        with adapted(model, config) as trainable:
            speed = measure(config, trainable, inputs, rows, folder / "rows")
        figures = {
            **_speed_figures(speed, flops, rate),
            "save_s": round(saved - started, 1),
            "load_s": round(loaded - saved, 1),
        }
        yield f"nf4 {micro_batch}", _fell(speed), figures


def generation(folder: Path) -> Results:
    """Answers of PaliGemma-3B: ftlib's loop, transformers' caches, a merged adapter, and choosing among labels."""
    model, inputs = models.paligemma(224)
    rows = image_rows(folder / "rows", 64)
    from ftlib.data.images import open_image

    count, new = (4, 4) if REHEARSAL else (32, 32)
    encoded = [
        inputs.encode_prompts([row.prefix], open_image(folder / "rows" / row.image, 0))[0] for row in rows[:count]
    ]

    def tokens_per_s(run: Callable[[], object]) -> float:
        return round(count * new / seconds(run, 1 if REHEARSAL else 2), 1)

    def ours(module: Any) -> Callable[[], object]:
        return lambda: generate_answers(module, inputs, encoded, new)

    def theirs(cache: str | None) -> Callable[[], object]:
        batch = {name: tensor.to(DEVICE) for name, tensor in inputs.collate_generate(encoded).items()}
        settings = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
        settings |= {"cache_implementation": cache} if cache else {}
        return lambda: model.generate(**batch, **settings)

    with torch.inference_mode():
        yield "generation ftlib", True, {"tokens_per_s": tokens_per_s(ours(model)), "rows": count, "new_tokens": new}
        yield "generation transformers dynamic", True, {"tokens_per_s": tokens_per_s(theirs(None))}
        yield "generation replaced rows", True, _replaced_rows(model, inputs, encoded, 2 * new)
        config = config_of("paligemma", 4)
        adapted_model = prepare_for_training(model, config.adapter, "none", "paligemma")
        adapted_model.eval()
        yield "generation adapter unmerged", True, {"tokens_per_s": tokens_per_s(ours(adapted_model))}
        adapted_model.merge_adapter()  # type: ignore[operator]
        yield "generation adapter merged", True, {"tokens_per_s": tokens_per_s(ours(adapted_model))}
        adapted_model.unmerge_adapter()  # type: ignore[operator]
        model = adapted_model.unload()  # type: ignore[operator]
        labels = [f"label {number}" for number in range(10)]
        reset_peak()
        took = seconds(lambda: label_loglikelihoods(model, inputs, encoded, labels), 2)
        from tests.gpu.machine import peak_reserved

        yield "generation choose", True, {"rows_per_s": round(count / took, 1), "labels": len(labels),
                                          "reserved_gib": round(peak_reserved() / 2**30, 2)}  # fmt: skip
        if not REHEARSAL:
            yield "generation transformers static", True, {"tokens_per_s": tokens_per_s(theirs("static"))}


def _replaced_rows(model: Any, inputs: Any, rows: list[Any], new: int) -> dict[str, Any]:
    """Answers of many lengths, because every 16th token ends one: waiting rows in the places of ended ones, and batch
    after batch."""
    kind, stops, size = type(inputs), type(inputs).stop_token_ids, max(1, len(rows) // 4)
    kind.stop_token_ids = {*range(0, model.get_input_embeddings().num_embeddings, 16)}
    try:
        lengths = [len(one.token_ids) for one in generate_with_logprobs(model, inputs, rows, new, batch_size=size)]
        replaced = seconds(lambda: generate_with_logprobs(model, inputs, rows, new, batch_size=size), 2)
        batches = [rows[start : start + size] for start in range(0, len(rows), size)]
        batched = seconds(lambda: [generate_with_logprobs(model, inputs, batch, new) for batch in batches], 2)
    finally:
        kind.stop_token_ids = stops
    return {
        "rows_per_s": round(len(rows) / replaced, 1),
        "batches_rows_per_s": round(len(rows) / batched, 1),
        "mean_tokens": round(sum(lengths) / len(lengths), 1),
        "longest": max(lengths),
    }


def neox(folder: Path) -> Results:
    """OpenCALM's shapes with LoRA: tokens a second and MFU at two lengths."""
    for name, width in {"3b": 2560, "7b": 4096}.items():
        model, inputs = models.neox(width)
        rate = matmul_rate()
        for length, micro_batch in {512: 16, 2048: 4}.items():
            if REHEARSAL:
                length, micro_batch = 64, 2
            rows = text_rows(length)
            config = config_of("causal", micro_batch, loss={"on": "everything"}, training={"max_steps": 8})
            inputs.labels_on = "everything"
            flops = neox_flops(model.config, length, length - 1)
            try:
                with adapted(model, config) as trainable:
                    speed = measure(config, trainable, inputs, rows, folder)
            except torch.OutOfMemoryError:
                yield f"neox {name} {length} x {micro_batch}", True, {"does_not_fit": True}
                reset_peak()
                continue
            figures = {"tokens_per_s": round(speed.rows_per_second * length), **_speed_figures(speed, flops, rate)}
            yield f"neox {name} {length} x {micro_batch}", _fell(speed), figures
        del model
        gc.collect()
        reset_peak()


def compile(folder: Path) -> Results:
    """torch.compile over an epoch of bucketed batches: graphs, recompiles, the same losses; PaliGemma-3B's speed."""
    from torch._dynamo.utils import counters

    backend = {"torch_compile_backend": "aot_eager"} if REHEARSAL else {}
    small, inputs = _small_paligemma() if not REHEARSAL else models.paligemma(224)
    rows = image_rows(folder / "rows", 64)
    losses = {}
    for compiling in (False, True):
        sections = {"training": {"max_steps": 16, "torch_compile": compiling, **(backend if compiling else {})}}
        config = config_of("paligemma", 4, **sections)
        torch.manual_seed(0)
        with adapted(small, config) as trainable:
            losses[compiling] = measure(config, trainable, inputs, rows, folder / "rows").losses
    recompiles = sum(counters["recompiles"].values()) if "recompiles" in counters else 0
    limit = sum(n for text, n in counters.get("unimplemented", {}).items() if "limit" in str(text))
    difference = max(abs(a - b) for a, b in zip(losses[False], losses[True], strict=True))
    figures = {"graphs": counters["stats"].get("unique_graphs"), "graph_breaks": dict(counters["graph_break"]),
               "recompiles": recompiles, "limit_hit": limit, "loss_difference": difference}  # fmt: skip
    yield "compile epoch", limit == 0 and difference < 0.05, figures
    del small
    model, inputs = models.paligemma(224)
    rows = image_rows(folder / "rows")
    rate = matmul_rate()
    micro_batch = 2 if REHEARSAL else 32
    torch._dynamo.reset()
    config = config_of("paligemma", micro_batch, training={"max_steps": 20, "torch_compile": True, **backend})
    begun = time.monotonic()
    with adapted(model, config) as trainable:
        speed = measure(config, trainable, inputs, rows, folder / "rows", settled=12)
    figures = _speed_figures(speed, paligemma_flops(model.config, _mean_tokens(inputs, rows), "lora"), rate)
    yield (
        f"compile paligemma_224 lora {micro_batch}",
        _fell(speed),
        {**figures, "total_s": round(time.monotonic() - begun, 1)},
    )


def main(name: str, folder: Path) -> None:
    """One check in this process: its results, as JSON lines, go to what stdout was; what ftlib prints does not."""
    lines = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    begun = time.monotonic()

    def tell(name: str, ok: bool, figures: dict[str, Any]) -> None:
        nonlocal begun
        result = {"name": name, "ok": ok, "seconds": round(time.monotonic() - begun, 1), **figures}
        print(json.dumps(result), file=lines, flush=True)
        begun = time.monotonic()

    folder.mkdir()
    try:
        for result in globals()[name](folder):
            tell(*result)
    except BaseException as error:
        traceback.print_exc()
        # What a smaller GPU has no room to measure is no fault; training itself must answer in its own words.
        too_small = name in ALONE and isinstance(error, Exception) and is_out_of_memory(error)
        tell(name, too_small, {"does_not_fit": True} if too_small else {"error": _without_paths(error)})
    os._exit(0)  # threads of data loading and compiling are not waited for


def _without_paths(error: BaseException) -> str:
    """The error and the line of the check that it came through."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "tests" in Path(frame.filename).parts]
    where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return re.sub(r"(?<![\w.])/[^\s:'\"]+", "…", f"{type(error).__name__}: {error}")[:500] + where


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
