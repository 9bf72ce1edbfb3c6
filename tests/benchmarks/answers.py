"""Asking a model: labels chosen by likelihood against generating, images looked at once against once a question.

Run: `python -m tests.benchmarks.answers`. Both sides of every ratio run in this process, one after the other, on the
same rows and the tiny model (float32, as many threads as torch takes).
"""

from __future__ import annotations

import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from PIL import Image

from ftlib.data.sources.toy import make_digits
from ftlib.models.encoding import EncodedExample
from ftlib.models.generation import generate_answers, label_loglikelihoods
from ftlib.models.loading import load_weights
from ftlib.models.paligemma import PaliGemmaInputProcessor
from ftlib.models.tiny import tiny_model, tiny_processor

IMAGES, QUESTIONS, NEW_TOKENS, BATCH = 128, 5, 4, 64


def seconds(work: Callable[[], object]) -> float:
    """The least of three runs."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def main() -> None:
    """Print the ratios."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_digits(root)
        processor = tiny_processor()
        tiny_model(processor).save_pretrained(root / "model")
        processor.save_pretrained(root / "model")
        inputs, model = PaliGemmaInputProcessor.load(root / "model"), load_weights(root / "model", "float32")
        paths = sorted((root / "images").iterdir())[:IMAGES]
        prompts = [f"question {number}: which digit is this?" for number in range(QUESTIONS)]
        rows = [row for path in paths for row in inputs.encode_prompts(prompts, Image.open(path).convert("RGB"))]
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"transformers {transformers.__version__}; {IMAGES} images, {QUESTIONS} questions each")
    compare_choosing(model, inputs, rows[::QUESTIONS])
    compare_sharing(model, inputs, rows)


def batches(rows: list[EncodedExample]) -> list[list[EncodedExample]]:
    """Rows in batches of 64, cut at images."""
    size = BATCH - BATCH % QUESTIONS
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def compare_choosing(model: torch.nn.Module, inputs: PaliGemmaInputProcessor, rows: list[EncodedExample]) -> None:
    """Ten labels."""
    labels = [str(digit) for digit in range(10)]
    one_by_one = seconds(lambda: [generate_answers(model, inputs, [row], NEW_TOKENS) for row in rows])
    batched = seconds(lambda: [generate_answers(model, inputs, batch, NEW_TOKENS) for batch in batches(rows)])
    chosen = seconds(lambda: [label_loglikelihoods(model, inputs, batch, labels) for batch in batches(rows)])
    print(f"choose of {len(labels)} labels, {len(rows)} rows: {chosen:.2f} s")
    print(f"  generating one by one: {one_by_one:.2f} s, {one_by_one / chosen:.1f} times as long")
    print(f"  generating in batches: {batched:.2f} s, {batched / chosen:.1f} times as long")


def compare_sharing(model: torch.nn.Module, inputs: PaliGemmaInputProcessor, rows: list[EncodedExample]) -> None:
    """The same answers with the vision tower run once an image, and once a question."""
    apart = [EncodedExample(row.input_ids, row.n_labels, dict(row.image_inputs)) for row in rows]
    shared = seconds(lambda: [generate_answers(model, inputs, batch, 1) for batch in batches(rows)])
    alone = seconds(lambda: [generate_answers(model, inputs, batch, 1) for batch in batches(apart)])
    print(f"one-token answers to {len(rows)} questions: {shared:.2f} s with images looked at once")
    print(f"  once a question: {alone:.2f} s, {alone / shared:.2f} times as long")


if __name__ == "__main__":
    main()
