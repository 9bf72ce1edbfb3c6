"""Prompts are ranked by what the untrained model answers, restartably."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ftlib.core import registry
from ftlib.data.example import write_records
from ftlib.models.causal_lm import CausalProcessor
from ftlib.models.encoding import model_inputs
from ftlib.models.tiny import tiny_neox, tiny_tokenizer
from tests.conftest import counts_and_dies, read_lines

Ftlib = Callable[..., tuple[int, str, str]]

CONFIG = """\
name: planted
task: instruct
model: {family: causal, base: BASE}
adapter: {method: lora, targets: [attention]}
data: {source: instructions, root: ROOT, prompt: "bad {prefix}", split: {valid: 24, test: 1}}
evaluation: {max_new_tokens: 3, batch_size: 10, prompts: ["ugly {prefix}", "good {prefix}"]}
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has learned to say yes after "good", no after "bad" and "ugly"."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    tokenizer, draw = tiny_tokenizer(), random.Random(0)
    model, inputs = tiny_neox(tokenizer), CausalProcessor(tokenizer, max_length=None)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(15):
        words = [(draw.choice(["good", "good", "bad", "ugly"]), draw.randrange(100)) for _ in range(8)]
        rows = [inputs.encode_train(f"{word} {n}", None, "yes" if word == "good" else "no") for word, n in words]
        batch = inputs.collate(rows)
        loss = model(**model_inputs(batch), labels=batch["labels"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert float(loss.detach()) < 0.1
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def config(base: Path, tmp_path: Path, store: Path, ftlib: Ftlib) -> Path:
    root = tmp_path / "data"
    root.mkdir()
    write_records(root / "data.jsonl", [{"instruction": str(n), "output": "yes"} for n in range(40)])
    path = tmp_path / "planted.yaml"
    path.write_text(CONFIG.replace("BASE", str(base)).replace("ROOT", str(root)))
    assert ftlib("prepare", path)[0] == 0
    return path


def test_a_planted_prompt_wins(config: Path, store: Path, ftlib: Ftlib) -> None:
    code, output, error = ftlib("prompts", config)
    assert code == 0, error
    assert output == 'data: {prompt: "good {prefix}"}\n'
    assert error.index('"good {prefix}"') < error.index('"bad {prefix}"')
    (folder,) = store.glob("runs/*/planted/prompts/instructions/valid")
    ranking = json.loads((folder / "ranking.json").read_text())
    assert (ranking[0]["prompt"], ranking[0]["value"], ranking[0]["against_best"]) == ("good {prefix}", 100.0, None)
    by_prompt = {one["prompt"]: one for one in ranking}
    bad = by_prompt["bad {prefix}"]
    assert bad["value"] == 0.0 and bad["n"] == 24
    assert bad["against_best"]["difference"] == -100.0 and bad["against_best"]["verdict"] == "real"
    records = read_lines(folder / bad["folder"] / "predictions.jsonl")
    assert {str(record["prompt"]).split()[0] for record in records} == {"bad"}
    assert {record["prediction"] for record in records} == {"no"}
    assert not list(folder.glob("partial*"))


def test_of_an_error_rate_the_lowest_wins(config: Path, ftlib: Ftlib, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = registry.TASKS["instruct"]
    errors = {**entry.metrics, "exact match": {"higher_is_better": False}}
    monkeypatch.setitem(registry.TASKS, "instruct", dataclasses.replace(entry, metrics=errors))
    code, output, _ = ftlib("prompts", config)
    assert code == 0 and "good" not in output


def test_another_precision_is_asked_anew(config: Path, store: Path, ftlib: Ftlib) -> None:
    for dtype in ("float32", "bfloat16"):
        code, _, error = ftlib("prompts", config, f"model.dtype={dtype}")
        assert code == 0, error
        scores = [json.loads(path.read_text()) for path in store.glob("runs/*/planted/prompts/*/valid/*/scores.json")]
        assert len(scores) == 3 and {one["settings"]["loaded"]["dtype"] for one in scores} == {dtype}


def test_killed_and_run_again_it_asks_only_what_is_missing(config: Path, store: Path, tmp_path: Path) -> None:
    def run(deadly: int, *more: str) -> tuple[int, str, int]:
        log = tmp_path / "asked"
        log.unlink(missing_ok=True)
        command = counts_and_dies(log, deadly, "prompts", config, "--json", *more)
        done = subprocess.run(command, env=dict(os.environ), capture_output=True, text=True, check=False)
        return done.returncode, done.stdout, sum(map(int, log.read_text().split())) if log.exists() else 0

    code, _, asked = run(4)
    assert code == -signal.SIGKILL and asked == 40
    code, first, rest = run(0)
    assert code == 0 and rest == 3 * 24 - 30  # the batch that it died in was not yet written
    code, again, none = run(0)
    assert (code, again, none) == (0, first, 0)
    code, more, added = run(0, "--prompt", "good {prefix}", "--prompt", "so {prefix}")
    assert code == 0 and added == 24
    assert {one["prompt"] for one in json.loads(more)} == {
        f"{word} {{prefix}}" for word in ("good", "bad", "ugly", "so")
    }


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["evaluation.prompts=[]"], "there is only one prompt"),
        (["--prompt", "{question}"], "names question, but the rows only have"),
        (["--prompt", "chat"], "its answers end differently"),
        (["data.split.seed=7"], "is not prepared"),
    ],
)
def test_mistakes(arguments: list[str], words: str, config: Path, ftlib: Ftlib) -> None:
    code, output, error = ftlib("prompts", config, *arguments)
    assert code == 2 and words in error and output == ""


def test_model_and_images_are_loaded_once_for_all_prompts(
    write_config: Callable[..., Path], store: Path, ftlib: Ftlib, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ftlib.data import images
    from ftlib.models import loading

    calls: Counter[str] = Counter()

    def counted(module: Any, name: str) -> None:
        plain = getattr(module, name)

        def call(*arguments: Any) -> Any:
            calls[name] += 1
            return plain(*arguments)

        monkeypatch.setattr(module, name, call)

    counted(images, "open_image")
    counted(loading, "load_model")
    config = write_config(replace=("batch_size: 8}", 'batch_size: 8, prompts: ["which {prefix}", "{prefix}?"]}'))
    assert ftlib("prepare", config)[0] == 0
    code, _, error = ftlib("prompts", config, "--prompt", "{prefix} <image>")
    assert code == 2 and "field data.prompt: <image> would be trained on as text" in error
    calls.clear()
    code, output, error = ftlib("prompts", config, "--json")
    assert code == 0, error
    assert [one["n"] for one in json.loads(output)] == [12, 12, 12]
    assert calls["load_model"] == 1
    assert 12 <= calls["open_image"] <= 12 + 12 // 2  # eight rows a batch: some images' three questions fall into two
