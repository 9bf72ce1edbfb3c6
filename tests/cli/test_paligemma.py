"""PaliGemma 1 and 2 through the chain, and their results as plain transformers and peft read them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.conftest import FULL, LORA, read_lines
from tests.models.tiny_paligemma import save

Ftlib = Callable[..., tuple[int, str, str]]


BASES = {
    "first": {"generation": 1},
    "second": {"sliding_window": 4096},  # longer than the rows, as in the released models at 224 and 448 pixels
    "windowed": {"sliding_window": 8},
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: save(tmp_path_factory.mktemp(name), **settings) for name, settings in BASES.items()}


def plain_answers(weights: Path, adapter: Path | None, data: Path, records: list[dict[str, Any]]) -> list[str]:
    """Greedy answers as a user without ftlib would get them, one by one."""
    from peft import PeftModel
    from transformers import PaliGemmaForConditionalGeneration, PaliGemmaProcessor

    processor = PaliGemmaProcessor.from_pretrained(weights)
    model = PaliGemmaForConditionalGeneration.from_pretrained(weights, dtype=torch.float32)
    if adapter:
        model = PeftModel.from_pretrained(model, adapter)
    return answers_of(model, processor, data, records)


def answers_of(model: Any, processor: Any, data: Path, records: list[dict[str, Any]]) -> list[str]:
    """Greedy answers of transformers, one by one."""
    model.eval()
    found = []
    for record in records:
        image = Image.open(data / record["image"]).convert("RGB")
        batch = processor(images=image, text=f"<image>{record['prompt']}", return_tensors="pt")
        with torch.no_grad():
            ids = model.generate(**batch, max_new_tokens=4, do_sample=False)
        found.append(processor.decode(ids[0, batch["input_ids"].shape[1] :], skip_special_tokens=True).strip())
    return found


@pytest.mark.parametrize(
    ("base", "adapter"),
    [("first", LORA), ("first", FULL), ("second", LORA), ("windowed", FULL)],
    ids=["1-lora", "1-full", "2-lora", "2-full"],
)
def test_the_chain_and_what_plain_transformers_makes_of_its_result(
    write_config: Callable[..., Path],
    store: Path,
    shared: Path,
    ftlib: Ftlib,
    bases: dict[str, Path],
    base: str,
    adapter: str,
) -> None:
    config = write_config(adapter, base=str(bases[base]), replace=("max_steps: 12", "max_steps: 2"))
    assert ftlib("prepare", config)[0] == 0
    rate = 1e-2 if adapter == LORA else 1e-3
    code, output, error = ftlib("train", config, f"training.learning_rate={rate}")
    assert code == 0, error
    run = Path(output.strip())
    assert ftlib("evaluate", "tiny", "--split", "test")[0] == 0
    folder = run / "eval" / "jsonl" / "test"
    records, before = (read_lines(folder / when / "predictions.jsonl") for when in ("after", "before"))
    answers = [record["prediction"] for record in records]
    assert len(answers) == 12 and len(set(answers)) > 3 and answers != [record["prediction"] for record in before]
    if adapter == LORA:
        assert plain_answers(bases[base], run / "adapter", shared / "data", records) == answers
    else:
        assert plain_answers(run / "model", None, shared / "data", records) == answers
    image = shared / "data" / str(records[0]["image"])
    code, output, _ = ftlib("predict", "tiny", "--image", image, "--prompt", records[0]["prompt"])
    assert (code, output.strip()) == (0, answers[0])
