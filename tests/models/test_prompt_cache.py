"""Prompts read in pieces, behind what they share, give the answers and likelihoods of prompts read one by one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from ftlib.models import generation, prompt_cache
from ftlib.models.causal_lm import CausalProcessor
from ftlib.models.encoding import EncodedExample
from ftlib.models.generation import generate_answers, generate_with_logprobs, label_loglikelihoods
from ftlib.models.loading import load_weights
from ftlib.models.paligemma import PaliGemmaInputProcessor
from ftlib.models.prompt_cache import PromptReader
from ftlib.models.vlm import VisionLanguageProcessor
from tests.models import tiny_causal, tiny_paligemma, tiny_vlm

LABELS = ["0", "yes", "three or eight"]
QUESTIONS = ["what?", "how many?", "is it"]
PREAMBLE = "Below is an instruction. Write a short answer to it: "
Loaded = tuple[torch.nn.Module, Any, list[EncodedExample]]


def causal(name: str, folder: Path) -> Loaded:
    """The same words before every question."""
    tiny_causal.save(name, folder)
    inputs = CausalProcessor.load(folder)
    model = load_weights(folder, "float32", "causal").eval()
    return model, inputs, inputs.encode_prompts([PREAMBLE + question for question in QUESTIONS], None)


def with_images(name: str, folder: Path) -> Loaded:
    """Three questions about each of two images."""
    images = [Image.new("RGB", size, colour) for size, colour in (((40, 50), "red"), ((61, 40), "blue"))]
    if name.startswith("paligemma"):
        tiny_paligemma.save(folder, int(name[-1]))
        inputs: Any = PaliGemmaInputProcessor.load(folder)
        model = load_weights(folder, "float32").eval()
    else:
        tiny_vlm.save(name, folder)
        inputs = VisionLanguageProcessor.load(folder)
        model = load_weights(folder, "float32", "vlm").eval()
    return model, inputs, [row for image in images for row in inputs.encode_prompts(QUESTIONS, image)]


NAMES = ("gpt_neox", "gpt2", "llama", "paligemma1", "paligemma2", "gemma3", "idefics3")


@pytest.fixture(params=NAMES)
def loaded(request: pytest.FixtureRequest, tmp_path: Path) -> Loaded:
    texts = (*tiny_causal.ARCHITECTURES, *tiny_causal.ODD)
    make: Callable[[str, Path], Loaded] = causal if request.param in texts else with_images
    return make(request.param, tmp_path)


def test_reading_together_changes_nothing(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs, rows = loaded
    monkeypatch.setattr(prompt_cache, "CPU_CHUNK_TOKENS", 2 * len(rows[0].input_ids))
    seen = []
    watch = model.register_forward_pre_hook(
        lambda _, __, given: seen.append(given["position_ids"].shape[-2:].numel()), with_kwargs=True
    )
    found = generate_with_logprobs(model, inputs, rows, 8)
    read = sum(count for count in seen if count > len(rows))
    watch.remove()
    tokens = sum(len(row.input_ids) for row in rows)
    shares = not inputs.prefix_bidirectional and prompt_cache._keeps_key_values(model, 96)  # Gemma 3's window is 16
    assert (read < 0.75 * tokens) == shares, "shared prefixes are read once"
    alone = [generate_with_logprobs(model, inputs, [row], 8)[0] for row in rows]
    assert [one.token_ids for one in found] == [one.token_ids for one in alone]
    for one, other in zip(found, alone, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
    assert [one.text for one in found] == generate_answers(model, inputs, rows, 8, generation={"do_sample": False})
    likely = label_loglikelihoods(model, inputs, rows, LABELS)
    singly = torch.cat([label_loglikelihoods(model, inputs, [row], LABELS) for row in rows])
    torch.testing.assert_close(likely, singly, rtol=1e-4, atol=1e-3)


def test_rows_checked_every_few_tokens_end_where_they_would(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: rows that end, and rows that run out of positions, between two checks."""
    model, inputs, rows = loaded
    first = generate_with_logprobs(model, inputs, rows, 8)
    monkeypatch.setattr(type(inputs), "stop_token_ids", {first[0].token_ids[2], first[1].token_ids[1]})
    monkeypatch.setattr(inputs, "max_length", max(len(row.input_ids) for row in rows) + 3)
    wanted = generate_with_logprobs(model, inputs, rows, 8)
    monkeypatch.setattr(generation, "STEPS_BETWEEN_CHECKS", {"cpu": 4})
    found = generate_with_logprobs(model, inputs, rows, 8)
    assert len({len(one.token_ids) for one in found}) > 1
    for one, other in zip(found, wanted, strict=True):
        assert (one.token_ids, one.text, one.ended) == (other.token_ids, other.text, other.ended)
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


@pytest.mark.parametrize("checked_every", [1, 4])
@pytest.mark.parametrize("loaded", [*NAMES, *tiny_causal.ODD], indirect=True)
def test_waiting_rows_take_the_places_of_ended_ones(
    loaded: Loaded, checked_every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts and answers of many lengths; every second row is about the image of the one before."""
    model, inputs, some = loaded
    prompts = [f"{'so ' * (number % 4)}what is {number}?" for number in range(12)]
    images = [Image.new("RGB", (40 + 7 * number, 50), (number * 40, 99, 0)) for number in range(6)]
    if some[0].image_inputs:
        rows = [row for number, image in enumerate(images) for row in inputs.encode_prompts(prompts[number::6], image)]
    else:
        rows = inputs.encode_prompts([PREAMBLE + prompt for prompt in prompts], None)
    stops = {*range(0, model.get_input_embeddings().num_embeddings, 6)}  # type: ignore[operator]
    monkeypatch.setattr(type(inputs), "stop_token_ids", stops)
    monkeypatch.setattr(inputs, "max_length", max(len(row.input_ids) for row in rows) + 2)
    monkeypatch.setattr(generation, "STEPS_BETWEEN_CHECKS", {"cpu": checked_every})
    monkeypatch.setattr(generation, "GROWTH", 3)
    wanted = [generate_with_logprobs(model, inputs, [row], 16)[0] for row in rows]
    assert len({len(one.token_ids) for one in wanted}) > 2
    seen: list[tuple[int, int]] = []
    watch = model.register_forward_pre_hook(
        lambda _, __, given: seen.append(tuple(given["position_ids"].shape[-2:])), with_kwargs=True
    )
    joined, join = [], generation._Batch.join
    monkeypatch.setattr(generation._Batch, "join", lambda *given: joined.append(given) or join(*given))
    collected, collect = [], generation.collect_rows
    monkeypatch.setattr(generation, "collect_rows", lambda *a, **b: collected.append(collect(*a, **b)) or collected[-1])
    found = generate_with_logprobs(model, inputs, rows, 16, batch_size=4)
    watch.remove()
    for one, other in zip(found, wanted, strict=True):
        assert (one.token_ids, one.text, one.ended) == (other.token_ids, other.text, other.ended)
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
    assert max(count for count, columns in seen if columns == 1) <= 4
    joins = prompt_cache._keeps_key_values(model, 999)  # no windows of 12 or 16, no alibi, no convolution
    assert bool(joined) == joins
    most = max(len(row.input_ids) for row in rows) + 16 + generation.GROWTH
    assert all(one.capacity <= most for one in collected)
    if joins and not some[0].image_inputs:
        assert [count for count, columns in seen if columns >= len(PREAMBLE)] == [1], "the preamble is read once"


def test_a_row_that_begins_otherwise_costs_its_batch_alone(tmp_path: Path) -> None:
    model, inputs, _ = causal("llama", tmp_path)
    rows = inputs.encode_prompts([*(f"{PREAMBLE}{number}?" for number in range(15)), "?"], None)
    seen: list[int] = []
    with model.register_forward_pre_hook(
        lambda _, __, given: seen.append(given["position_ids"].numel()), with_kwargs=True
    ):
        found = generate_with_logprobs(model, inputs, rows, 1, batch_size=4)
    assert sum(seen) < 5 * len(PREAMBLE) + 16 * 7, "the preamble is read once, and four times in the last batch"
    assert [one.token_ids for one in found] == [
        generate_with_logprobs(model, inputs, [row], 1)[0].token_ids for row in rows
    ]


@pytest.mark.parametrize("name", tiny_causal.ODD)
def test_windows_that_answers_grow_out_of(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "GROWTH", 2)
    tiny_causal.save(name, tmp_path)
    inputs, model = CausalProcessor.load(tmp_path), load_weights(tmp_path, "float32", "causal").eval()
    rows = inputs.encode_prompts(["a", "bcd", "what?", "e"], None)
    states = PromptReader(model, inputs, rows, 30).read([0], 2).states
    assert (states is not None) == prompt_cache._keeps_key_values(model, 999), "by the whole answer, not by two columns"
    wanted = generate_answers(model, inputs, rows, 30, generation={"do_sample": False})
    assert max(map(len, wanted)) > tiny_causal.WINDOW
    assert generate_answers(model, inputs, rows, 30) == wanted
    answers = generate_with_logprobs(model, inputs, rows, 30, batch_size=2)
    assert [one.text for one in answers] == wanted


def test_no_rows_have_no_answers(tmp_path: Path) -> None:
    model, inputs, _ = causal("llama", tmp_path)
    assert generate_with_logprobs(model, inputs, [], 8) == []
    assert generate_with_logprobs(model, inputs, [], 8, num_beams=2, batch_size=4) == []
