"""What a training row with an image costs before the model sees it: CPU time by part, and the cores that it needs.

Run: `python -m tests.benchmarks.loading`. Prints a table on stderr and JSON on stdout. Photos are noise of all scales
with a camera's grain, as JPEGs of three sizes, and a small PNG. Times are CPU seconds of one thread, the median of
several repetitions. `FTLIB_PEER=/path/to/another/checkout` measures that checkout too, alternating, three rounds each.

Two faster ways are measured to show what they would change, and are not used: libjpeg's decoding at a reduced scale
(Pillow's `draft`) and torch's resizing of bytes.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, features

SIZES = {"640x480.jpg": (640, 480), "1920x1080.jpg": (1920, 1080), "4000x3000.jpg": (4000, 3000), "224.png": (224, 224)}
GOALS = {224: 150, 448: 40}
"""Edge of the model's image → rows/s of an H100 at 400 model TFLOP/s with LoRA, rounded."""
ROWS = 8
PEER = os.environ.get("FTLIB_PEER", "")


def main() -> int:
    """Measure and print."""
    from ftlib.core import log
    from tests.benchmarks.training import cpu_flags
    from tests.conftest import REPOSITORY

    codes = {"ftlib": str(REPOSITORY), **({"the other checkout": str(Path(PEER).absolute())} if PEER else {})}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in codes}
    with tempfile.TemporaryDirectory() as folder:
        for name, size in SIZES.items():
            make_photo(*size).save(Path(folder) / name, quality=90)
        for _ in range(3 if PEER else 1):
            for name, code in codes.items():
                environment = {**os.environ, "PYTHONPATH": code, "OMP_NUM_THREADS": "1"}
                command = [sys.executable, __file__, folder]
                done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, cwd=folder)
                found[name].append(json.loads(done.stdout))
    parts = {
        name: {case: middle([one[case] for one in rounds]) for case in rounds[0]} for name, rounds in found.items()
    }
    versions = {"torch": torch.__version__, "pillow": features.version("pil"), "libjpeg": features.version("jpg")}
    machine = {"load": os.getloadavg(), "cpu_flags": cpu_flags(), **versions}
    for name, cases in parts.items():
        rows = [[case, *[f"{value:.4g}" for value in case_parts.values()]] for case, case_parts in cases.items()]
        log.info(f"\n{name}, milliseconds a row\n" + log.format_table(["case", *next(iter(cases.values()))], rows))
    log.info(str(machine))
    print(json.dumps({"machine": machine, "parts": parts}, indent=1))
    return 0


def middle(facts: list[dict[str, float]]) -> dict[str, float]:
    """Medians over the rounds."""
    return {name: statistics.median(one[name] for one in facts) for name in facts[0]}


def make_photo(width: int, height: int) -> Image.Image:
    """Colored noise, stronger in larger structures, as in photographs, and grain: 2 to 3 bits a pixel at quality 90."""
    draw, pixels, scale = np.random.default_rng(0), np.zeros((height, width, 3), np.float32), 2
    while scale < max(width, height):
        coarse = draw.normal(size=(3, height // scale + 2, width // scale + 2)).astype(np.float32)
        for channel, band in enumerate(coarse):
            pixels[..., channel] += scale * np.asarray(
                Image.fromarray(band).resize((width, height), Image.Resampling.BICUBIC)
            )
        scale *= 2
    pixels = 120 + 50 * (pixels - pixels.mean()) / pixels.std() + draw.normal(0, 5, pixels.shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def measure(folder: Path) -> dict[str, dict[str, float]]:
    """File and edge of the model's image → milliseconds of every part, and what follows from them."""
    kinds = [(224, name) for name in SIZES] + [(448, name) for name in list(SIZES)[:3:2]]
    return {f"{name} at {edge}": measure_row(folder / name, edge) for edge, name in kinds}


def measure_row(path: Path, edge: int) -> dict[str, float]:
    """One kind of row. Parts that are not called by themselves are differences: `rgb` is what opening costs beyond
    reading and decoding, `encode` what a row costs beyond resizing, `hand_over` what a batch costs in worker and
    training process together beyond collating, `values` what the training process pays where it has no GPU.
    """
    from ftlib.data.images import open_image
    from ftlib.models.encoding import model_inputs
    from ftlib.models.loss import cut_labels
    from ftlib.models.paligemma import PaliGemmaInputProcessor
    from ftlib.models.tiny import tiny_processor

    inputs = PaliGemmaInputProcessor(tiny_processor(edge, 14))
    content = path.read_bytes()
    digest, image = hashlib.sha256(content).hexdigest(), open_image(path)

    def encode() -> Any:
        return inputs.encode_train("answer en what is left of the car?", image, "a man with a dog")

    def collate(rows: list[Any]) -> dict[str, torch.Tensor]:
        return cut_labels(inputs.collate(rows))

    rows = [encode() for _ in range(ROWS)]
    batch = collate(rows)
    found = {
        "read": cpu(lambda: hashlib.sha256(path.read_bytes()).hexdigest()),
        "decode": cpu(lambda: Image.open(io.BytesIO(content)).load()),
        "resize": cpu(lambda: image.resize((edge, edge), Image.Resampling.BICUBIC)),
        "collate": cpu(lambda: collate(rows)) / ROWS,
        "values": cpu(lambda: model_inputs(batch)) / ROWS,
    }
    found["rgb"] = cpu(lambda: open_image(path, 0, digest)) - found["read"] - found["decode"]
    found["encode"] = cpu(encode) - found["resize"]
    found["hand_over"] = hand_over(rows, collate) - found["collate"]
    order = ("read", "decode", "rgb", "resize", "encode", "collate", "hand_over")
    together = sum(found[part] for part in order)
    rate = {"all": together, "rows/s/core": 1000 / together, "cores for the goal": GOALS[edge] * together / 1000}
    reduced = draft(content, edge)
    levels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]

    def by_torch() -> torch.Tensor:
        return torch.nn.functional.interpolate(levels, (edge, edge), mode="bicubic", antialias=True)

    wanted = np.asarray(image.resize((edge, edge), Image.Resampling.BICUBIC), dtype=np.int16)
    unused = {
        "draft": cpu(lambda: draft(content, edge)),
        "draft_differs": float((np.asarray(reduced, dtype=np.int16) != wanted).mean()),
        "torch_resize": cpu(by_torch),
        "torch_differs": float((by_torch()[0].permute(1, 2, 0).numpy().astype(np.int16) != wanted).mean()),
    }
    return {**{part: found[part] for part in order}, **rate, "values": found["values"], **unused}


def draft(content: bytes, edge: int) -> Image.Image:
    """Decoded at the smallest scale that has twice the model's pixels, and resized."""
    image = Image.open(io.BytesIO(content))
    image.draft(None, (2 * edge, 2 * edge))
    return image.resize((edge, edge), Image.Resampling.BICUBIC)


def cpu(action: Callable[[], object]) -> float:
    """Milliseconds of CPU time; the median of at least five repetitions in at least a tenth of a second."""
    action()
    times: list[float] = []
    while len(times) < 5 or sum(times) < 0.1:
        before = time.process_time()
        action()
        times.append(time.process_time() - before)
    return 1000 * statistics.median(times)


def hand_over(rows: list[Any], collate: Callable[[list[Any]], dict[str, torch.Tensor]]) -> float:
    """Milliseconds of CPU time a row, in both processes, to collate encoded rows in a worker and to receive them."""

    def spend(batches: int) -> float:
        before = os.times()
        loader: Any = torch.utils.data.DataLoader(rows * batches, ROWS, collate_fn=collate, num_workers=1)  # type: ignore[arg-type]
        for _ in loader:
            pass
        del loader
        return sum(os.times()[:4]) - sum(before[:4])

    return 1000 * (spend(130) - spend(30)) / (100 * ROWS)


if __name__ == "__main__":
    if sys.argv[1:]:
        print(json.dumps(measure(Path(sys.argv[1]))))
    else:
        sys.exit(main())
