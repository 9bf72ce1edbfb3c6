"""Answers and labels against what transformers' `generate` takes for the same batch.

Run: `OMP_NUM_THREADS=1 python -m tests.benchmarks.answers [MODEL…] [PART…]`; `FTLIB_TORCHVISION=FOLDER` for
models whose processors need torchvision. Models have some 30 million random weights, float32:

- `paligemma`: 224 pixels, prompt and image attend to each other both ways,
- `idefics3` (the architecture of SmolVLM, too), `gemma3`, `qwen2_5_vl`: family `vlm`, the image before the question.

Prompts are questions of 20 to 60 characters (a character is a token) about noise. Both sides get the same encoded rows,
in turns, three times in this process; ratios are of the medians. Answers must be those of `generate`, token by token.
Where they are not, the two best logits must differ by less than 1e-4; such rows are counted, and anything else ends the
benchmark with exit code 1.

- `one`, `five`: questions an image.
- `unequal`: every eighth token ends an answer, so that rows end one after the other.
- `labels`: 20 labels scored behind prompts that are read once, against prompt and label read for every label.
- `adapter`: LoRA (r = 16) on all linear layers of the language model, against the same merged into the weights.
- `long`: SmolLM2-135M-Instruct (downloaded by pip) answers 64 questions of one kind or another, up to 256 tokens, 16 at
  a time: waiting questions in the places of answered ones, against batches of 16 one after the other, and against
  `generate` with these.
"""

from __future__ import annotations

import copy
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

if "FTLIB_TORCHVISION" in os.environ:
    from tests import torchvision_folder

    torchvision_folder.use(os.environ["FTLIB_TORCHVISION"])

import numpy as np
import peft
import torch
import transformers
from PIL import Image
from transformers import GenerationConfig

from ftlib.models.causal_lm import CausalProcessor
from ftlib.models.encoding import EncodedExample, model_inputs
from ftlib.models.generation import generate_with_logprobs, label_loglikelihoods
from ftlib.models.loading import load_weights
from ftlib.models.paligemma import PaliGemmaInputProcessor
from ftlib.models.smollm2 import make_smollm2
from ftlib.models.tiny import tiny_config, tiny_processor
from ftlib.models.vlm import VisionLanguageProcessor
from tests.benchmarks.training import cpu_flags
from tests.models import tiny_vlm

NEW_TOKENS, BATCH, ROUNDS, LABELS = 16, 16, 3, 20
NEAR_TIE = 1e-4
PARTS = ("one", "five", "unequal", "labels", "adapter", "long")
LONG = 256
COUNTRIES = ("Japan", "Italy", "Chile", "Kenya", "Canada", "India", "Norway", "Egypt")
QUESTIONS = (
    "What is the capital of {}?",
    "Name three foods from {}.",
    "Write one sentence about {}.",
    "Is {} in Europe? Answer yes or no.",
    "Which language do people speak in {}?",
    "What is the currency of {}?",
    "Write a short poem about {}.",
    "Which animals live in {}?",
)
Answers = list[list[int]]


def main(names: Sequence[str]) -> int:
    """Measure and print."""
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    say(f"{torch.get_num_threads()} threads, {', '.join(cpu_flags())}, {versions}, load {os.getloadavg()}")
    say(f"{NEW_TOKENS} tokens, batch {BATCH}; medians of {ROUNDS} alternations, ratios of CPU (and wall) seconds")
    good = True
    parts = [name for name in names if name not in MODELS] or PARTS
    if "long" in parts:
        good &= compare_long()
    for name in [name for name in names if name in MODELS] or (["paligemma", "idefics3"] if parts != ["long"] else []):
        with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
            model, inputs = MODELS[name](Path(folder))
            total = sum(parameter.numel() for parameter in model.parameters()) / 1e6
            one, five = make_rows(inputs, BATCH, 1), make_rows(inputs, BATCH // 5, 5)
            say(f"{name}: {total:.0f} million weights, prompts of {sorted({len(row.input_ids) for row in one})}")
            if "one" in parts:
                good &= compare_answers(f"{name}, one question an image", model, inputs, one)
            if "five" in parts:
                good &= compare_answers(f"{name}, five questions an image", model, inputs, five)
            if "unequal" in parts:
                kind, usual = type(inputs), type(inputs).stop_token_ids
                kind.stop_token_ids = {*range(0, model.get_input_embeddings().num_embeddings, 8)}
                good &= compare_answers(f"{name}, one question an image, unequal", model, inputs, one)
                kind.stop_token_ids = usual
            if "labels" in parts:
                compare_labels(f"{name}, {LABELS} labels", model, inputs, one[:4])
            if "adapter" in parts:
                compare_merged(f"{name}, adapter", model, inputs, one)
    return 0 if good else 1


def say(text: str) -> None:
    """Print a line at once."""
    print(text, flush=True)


def make_paligemma(folder: Path) -> tuple[Any, PaliGemmaInputProcessor]:
    """34 million weights: PaliGemma-3B's proportions of tower, layers and head."""
    processor = tiny_processor(224, 14)
    text = {"hidden_size": 384, "intermediate_size": 3072, "num_hidden_layers": 6, "head_dim": 48}
    text |= {"num_attention_heads": 8, "vocab_size": 12800, "initializer_range": 0.05}
    tower = {"hidden_size": 216, "intermediate_size": 808, "num_hidden_layers": 9, "num_attention_heads": 6}
    config = tiny_config(processor, **text)
    config.vision_config.projection_dim = config.projection_dim = text["hidden_size"]
    set_fields(config.vision_config, tower)
    save_model(transformers.PaliGemmaForConditionalGeneration, config, folder)
    processor.save_pretrained(folder)
    return load_weights(folder, "float32").eval(), PaliGemmaInputProcessor.load(folder)


def make_vlm(name: str, folder: Path) -> tuple[Any, VisionLanguageProcessor]:
    """A tiny architecture of the tests, wider and deeper, with some 256 tokens for an image of 448 pixels."""
    config, processor = tiny_vlm.ALL[name]()
    text, tower, images = config.text_config, config.vision_config, processor.image_processor
    widths = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "head_dim": 64}
    set_fields(text, widths | {"num_attention_heads": 8, "num_key_value_heads": 2, "initializer_range": 0.05})
    set_fields(tower, {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4})
    if name == "idefics3":  # four tiles and the whole image, 64 tokens each
        set_fields(tower, {"num_hidden_layers": 6, "image_size": 128})
        processor.image_seq_len = 64
        images.size, images.max_image_size = {"longest_edge": 256}, {"longest_edge": 128}
    elif name == "gemma3":
        kinds = ["full_attention" if layer == 5 else "sliding_attention" for layer in range(8)]
        set_fields(text, {"layer_types": kinds, "sliding_window": 512, "query_pre_attn_scalar": 64})
        set_fields(tower, {"num_hidden_layers": 6, "image_size": 224})
        config.mm_tokens_per_image = processor.image_seq_length = 256
        processor.full_image_sequence = processor.full_image_sequence.replace(
            processor.image_token * 4, processor.image_token * 256
        )
        images.size = {"height": 224, "width": 224}
    else:
        text.layer_types = ["full_attention"] * 8
        text.rope_parameters["mrope_section"] = [8, 12, 12]
        set_fields(tower, {"depth": 6, "out_hidden_size": 512, "num_heads": 4, "fullatt_block_indexes": [2, 5]})
        images.size = {"shortest_edge": 28**2, "longest_edge": 256 * 28**2}
    build = partial(transformers.AutoModelForImageTextToText.from_config, trust_remote_code=False)
    save_model(build, config, folder)
    processor.save_pretrained(folder)
    return load_weights(folder, "float32", "vlm").eval(), VisionLanguageProcessor.load(folder)


def save_model(make: Callable[[Any], Any], config: Any, folder: Path) -> None:
    """Random weights with which answers depend on image and question."""
    torch.manual_seed(0)
    model = make(config)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and not parameter.any():  # Gemma 3's projector: no image would count
            torch.nn.init.normal_(parameter, std=0.05)
        if "o_proj" in name or "down_proj" in name:  # layers outweigh the embedding of the last token
            parameter.data *= 8
        if ".post_" in name and parameter.dim() == 1:
            parameter.data += 3
    model.save_pretrained(folder)


MODELS: dict[str, Callable[[Path], tuple[Any, Any]]] = {
    "paligemma": make_paligemma,
    **{name: lambda folder, name=name: make_vlm(name, folder) for name in ("idefics3", "gemma3", "qwen2_5_vl")},  # type: ignore[misc]
}


def set_fields(config: Any, fields: dict[str, Any]) -> None:
    """Change a config."""
    for name, value in fields.items():
        setattr(config, name, value)


def make_rows(inputs: Any, images: int, questions: int) -> list[EncodedExample]:
    """Questions about images of noise; those about one image share its pixels."""
    draw, rows = random.Random(0), []
    for number in range(images):
        pixels = np.random.default_rng(number).integers(0, 256, (448, 448, 3), dtype=np.uint8)
        prompts = ["".join(draw.choices("abcdefgh ", k=draw.randint(20, 60))) for _ in range(questions)]
        rows += inputs.encode_prompts(prompts, Image.fromarray(pixels))
    return rows


def compare_answers(title: str, model: Any, inputs: Any, rows: list[EncodedExample]) -> bool:
    """Print ratios, and return whether answers are equal but for near-ties."""
    own, others = alternate(
        lambda: [one.token_ids for one in generate_with_logprobs(model, inputs, rows, NEW_TOKENS)],
        lambda: generate(model, inputs, rows, NEW_TOKENS),
    )
    print_ratio(title, own, others)
    return are_equal(model, inputs, rows, own.result, others.result)


def are_equal(model: Any, inputs: Any, rows: Sequence[EncodedExample], own: Answers, others: Answers) -> bool:
    """Print and return whether answers are equal but for near-ties."""
    lengths = [len(answer) for answer in own]
    ties = [
        near_tie(model, inputs, row, mine, other)
        for row, mine, other in zip(rows, own, others, strict=True)
        if mine != other
    ]
    told = f"{len({tuple(answer) for answer in own})} different answers of {min(lengths)} to {max(lengths)} tokens"
    say(f"  {told}, mean {statistics.mean(lengths):.1f}; {sum(ties)} near-ties, {len(ties) - sum(ties)} wrong")
    return all(ties)


def compare_long() -> bool:
    """Print ratios, and return whether answers are equal but for near-ties."""
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        make_smollm2(Path(folder))
        model, inputs = (
            load_weights(Path(folder), "float32", "causal").eval(),
            CausalProcessor.load(Path(folder), chat=True),
        )
    questions = [question.format(country) for country in COUNTRIES for question in QUESTIONS]
    prompts = [json.dumps([{"role": "user", "content": question}]) for question in questions]
    rows = sorted(inputs.encode_prompts(prompts, None), key=lambda row: -len(row.input_ids))
    batches = [rows[start : start + BATCH] for start in range(0, len(rows), BATCH)]
    passes = []

    def answer(some: Sequence[EncodedExample]) -> Answers:
        return [one.token_ids for one in generate_with_logprobs(model, inputs, some, LONG, batch_size=BATCH)]

    def counted(work: Callable[[], Answers]) -> Answers:
        before = len(passes)
        with model.register_forward_pre_hook(lambda *_: passes.append(1)):
            found = work()
        say(f"  {len(passes) - before} forward passes")
        return found

    own, batched, others = alternate(
        lambda: counted(lambda: answer(rows)),
        lambda: counted(lambda: [ids for batch in batches for ids in answer(batch)]),
        lambda: counted(lambda: [ids for batch in batches for ids in generate(model, inputs, batch, LONG)]),
    )
    print_ratio("smollm2, against batches one after the other", own, batched)
    good = are_equal(model, inputs, rows, own.result, batched.result)
    print_ratio("smollm2, against generate", own, others)
    return are_equal(model, inputs, rows, own.result, others.result) and good


def compare_labels(title: str, model: Any, inputs: Any, rows: list[EncodedExample]) -> None:
    """Labels behind one prompt against one after the other, prompt and all."""
    labels = [f"label {number}" for number in range(LABELS)]
    answers = [inputs.encode_answer(label) for label in labels]

    def one_by_one() -> torch.Tensor:
        scores = torch.empty(len(rows), len(labels))
        for number, answer in enumerate(answers):
            whole = [EncodedExample([*row.input_ids, *answer], len(answer), row.image_inputs) for row in rows]
            batch = model_inputs(inputs.collate(whole))
            logits = model(**batch, logits_to_keep=len(answer) + 1).logits[:, :-1]
            scores[:, number] = logits.log_softmax(-1)[:, range(len(answer)), answer].sum(dim=1)
        return scores

    own, others = alternate(lambda: label_loglikelihoods(model, inputs, rows, labels), one_by_one)
    torch.testing.assert_close(own.result, others.result, rtol=1e-4, atol=1e-3)
    print_ratio(title, own, others)


def compare_merged(title: str, model: Any, inputs: Any, rows: list[EncodedExample]) -> None:
    """What would be saved by merging an adapter before answering."""
    of_language = set(model.get_decoder().modules())
    layers = [
        name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and module in of_language
    ]
    with torch.inference_mode(False):
        settings = peft.LoraConfig(r=16, target_modules=layers)
        adapted = peft.get_peft_model(model, settings).eval()
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.01)
        merged = copy.deepcopy(adapted).merge_and_unload().eval()
    found = [
        lambda one=one: [answer.token_ids for answer in generate_with_logprobs(one, inputs, rows, NEW_TOKENS)]
        for one in (merged, adapted)
    ]
    own, others = alternate(*found)
    print_ratio(title, own, others)
    say(f"  {sum(mine == other for mine, other in zip(own.result, others.result, strict=True))} answers are equal")


def generate(model: Any, inputs: Any, rows: Sequence[EncodedExample], tokens: int) -> Answers:
    """transformers' own greedy answers, up to their ends."""
    batch = inputs.collate_generate(rows)
    settings = GenerationConfig(
        max_new_tokens=tokens,
        do_sample=False,
        pad_token_id=inputs.pad_token_id,
        eos_token_id=sorted(inputs.stop_token_ids),
    )
    found = model.generate(**batch, generation_config=settings)[:, batch["input_ids"].shape[1] :].tolist()
    ends = inputs.stop_token_ids
    places = [next((place for place, token in enumerate(ids, 1) if token in ends), None) for ids in found]
    return [ids[:end] for ids, end in zip(found, places, strict=True)]


def near_tie(model: Any, inputs: Any, row: EncodedExample, mine: list[int], other: list[int]) -> bool:
    """Whether two answers part where the two best logits are nearly the same."""
    first = next(place for place, (one, two) in enumerate(zip(mine, other, strict=False)) if one != two)
    read = EncodedExample([*row.input_ids, *mine[:first]], first, row.image_inputs)
    best = model(**model_inputs(inputs.collate([read])), logits_to_keep=1).logits[0, -1].topk(2).values
    return bool(best[0] - best[1] < NEAR_TIE)


class Timed:
    """Seconds of several runs of the same work, and its result."""

    def __init__(self) -> None:
        self.cpu: list[float] = []
        self.wall: list[float] = []
        self.result: Any = None

    def run(self, work: Callable[[], Any]) -> None:
        """Once more."""
        cpu, wall = time.process_time(), time.perf_counter()
        self.result = work()
        self.cpu.append(time.process_time() - cpu)
        self.wall.append(time.perf_counter() - wall)


def alternate(*works: Callable[[], Any]) -> list[Timed]:
    """Run all in turns."""
    timed = [Timed() for _ in works]
    for _ in range(ROUNDS):
        for one, work in zip(timed, works, strict=True):
            one.run(work)
    return timed


def print_ratio(title: str, own: Timed, other: Timed) -> None:
    """Medians, and how much longer the other takes."""
    (cpu, wall), (cpus, walls) = (map(statistics.median, (one.cpu, one.wall)) for one in (own, other))
    each = " ".join(f"{two / one:.2f}" for one, two in zip(own.cpu, other.cpu, strict=True))
    say(f"{title}: {cpus / cpu:.2f} ({walls / wall:.2f}); ftlib {cpu:.2f} s, other {cpus:.2f} s; rounds {each}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
