"""Training and merging start from what a real pretrained model (SmolLM2-135M) knows, and keep it.

The model knows capitals, but answers in whole sentences. After 24 steps on some countries it must answer with the name
alone for countries that it was not trained on: that part can only come from pretraining. Perplexity is measured on a
text that has nothing to do with capitals; a model whose weights are damaged has a perplexity of hundreds.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import ftlib as api
from ftlib.runs.run import Run
from tests.conftest import REPOSITORY
from tests.real.downloads import smollm2_store

pytestmark = pytest.mark.real

TEXT = (
    "The water cycle describes how water moves on the surface of the Earth and in the air. The sun heats the oceans "
    "and the lakes, and some of the water evaporates. The vapour rises, cools down and forms clouds. When the drops in "
    "the clouds become too heavy, they fall as rain or snow. Rivers bring the water back to the sea. Plants take up "
    "water through their roots and give it back to the air through their leaves."
)
MAX_PERPLEXITY_GROWTH = 1.5
"""A factor; that of LoRA is 1.02, of QLoRA with its higher rate 1.36, of two merged adapters 1.40."""

SHORT = {"max_steps": 12, "learning_rate": 2e-3}
"""Half of the demo's steps with twice its rate."""

NOUNS = (
    "apple arm bag ball bank bed bell bird boat bone book boot bottle bridge brother cake camera car carrot cat chair "
    "circle cloud coat coin cow cup desk doctor dog door dream duck ear egg engine eye farm finger floor flower fork "
    "friend garden girl goat hat hill horse hotel island jacket key king lake lamp lemon letter map moon mountain nail "
    "nose ocean onion orange pencil pig plant plate queen rabbit river road rock room ship shirt shoe shop sister song "
    "spoon star street table teacher tiger tower town train tree wall wheel window"
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs of all tests of this file: one that several tests need is trained once."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(autouse=True)
def site(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SmolLM2's store."""
    monkeypatch.setenv("FTLIB_STORE", str(smollm2_store()))
    monkeypatch.setenv("FTLIB_RUNS", str(runs))


def config(**sections: dict[str, Any]) -> dict[str, Any]:
    """configs/capitals.yaml, with fields of its sections replaced."""
    fields: dict[str, Any] = yaml.safe_load((REPOSITORY / "configs" / "capitals.yaml").read_text(encoding="utf-8"))
    fields["data"]["root"] = str(REPOSITORY / "configs" / "capitals")
    fields["evaluation"]["before"] = False
    for section, values in sections.items():
        fields[section] = {**fields.get(section, {}), **values}
    return fields


def write_data(folder: Path, rows: list[dict[str, Any]]) -> str:
    folder.mkdir()
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(folder)


def train(fields: dict[str, Any]) -> Run:
    api.prepare(fields)
    run = api.train(fields)
    losses = [json.loads(line)["loss"] for line in run.metrics.read_text(encoding="utf-8").splitlines()]
    assert len(losses) <= 25
    return run


def exact_match(target: Run | dict[str, Any], **arguments: Any) -> tuple[float, str]:
    """Percent of the rows of the test split, and the same with its interval for printing."""
    when = "before" if arguments.get("before") else "after"
    [scores] = [one for one in api.evaluate(target, splits="test", **arguments) if one["when"] == when]
    value: float = scores["value"]
    low, high = scores["interval"]
    return value, f"{value:.1f} % ({low:.0f}-{high:.0f}, n = {scores['n']})"


def perplexity(folder: Path, adapter: Path | None = None) -> float:
    """Of TEXT, by plain transformers and peft."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if adapter:
        model = PeftModel.from_pretrained(model, adapter)
    ids = AutoTokenizer.from_pretrained(folder)(TEXT, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return math.exp(float(model.eval()(input_ids=ids, labels=ids).loss))


@pytest.fixture(scope="module")
def base() -> tuple[Path, float]:
    """The model's folder, and its perplexity."""
    folder = smollm2_store() / "models" / config()["model"]["base"]
    return folder, perplexity(folder)


def chat_data(folder: Path) -> str:
    """Capitals as conversations. In `It is Paris` the name has the token with a blank that the model knows it by."""
    lines = (REPOSITORY / "configs" / "capitals" / "data.jsonl").read_text(encoding="utf-8").splitlines()
    rows = []
    for row in map(json.loads, lines):
        question = {"role": "user", "content": f"What is the capital of {row['instruction']}?"}
        rows.append({"messages": [question, {"role": "assistant", "content": f"It is{row['output']}"}]})
    return write_data(folder, rows)


@pytest.mark.parametrize(
    ("name", "sections"),
    [
        ("lora", {}),
        ("dora", {"training": SHORT, "adapter": {"method": "dora"}}),
        ("full", {"training": {**SHORT, "learning_rate": 1e-4}}),
        ("qlora", {"training": {"learning_rate": 2e-3}, "model": {"quantization": "nf4"}}),
        ("packing", {"training": SHORT, "loss": {"packing": True}}),
        ("chat", {"data": {"prompt": "chat"}}),
    ],
)
def test_unseen_countries(name: str, sections: dict[str, Any], base: tuple[Path, float], tmp_path: Path) -> None:
    fields = config(**sections)
    if name == "full":
        fields["adapter"] = {"method": "full"}
    if name == "chat":
        fields["data"]["root"] = chat_data(tmp_path / "chat")
    began = time.process_time()
    run = train(fields)
    seconds = time.process_time() - began
    if name in ("dora", "full", "packing"):  # the base and its prompt are those of lora
        before, told_before = 0.0, "lora's"
    else:
        before, told_before = exact_match(fields, before=True)
    after, told_after = exact_match(run)
    folder, plain = base
    trained = perplexity(run.folder / "model") if name == "full" else perplexity(folder, run.folder / "adapter")
    growth = trained / plain
    print(
        f"\n{name}: exact match {told_before} -> {told_after}, perplexity x {growth:.3f}, {seconds:.0f} CPU s",
        flush=True,
    )
    assert before <= 5 and after >= 50
    assert growth < MAX_PERPLEXITY_GROWTH


def test_an_exported_model_keeps_what_the_adapter_knows(base: tuple[Path, float], tmp_path: Path) -> None:
    run = train(config(training=SHORT))
    whole = api.export(run, tmp_path / "whole", dtype="float32")
    assert perplexity(whole) == pytest.approx(perplexity(base[0], run.folder / "adapter"), rel=1e-3)


def test_a_merge_keeps_both_skills(base: tuple[Path, float], tmp_path: Path) -> None:
    """The second skill has a form of its own: `many dogs`, which the adapter of capitals never answers."""
    rows = [{"instruction": noun, "output": f" many {noun}s"} for noun in NOUNS.split()]
    capitals = config()
    plurals = config(
        data={"root": write_data(tmp_path / "plurals", rows), "prompt": "The plural of {instruction} is"},
    )
    plurals["name"] = "plurals"
    files = {}
    for name, fields in (("capitals", capitals), ("plurals", plurals)):
        files[name] = tmp_path / f"{name}.yaml"
        files[name].write_text(yaml.safe_dump(fields), encoding="utf-8")
    skills = {"capitals": train(capitals), "plurals": train(plurals)}
    merged = api.merge(
        {
            "base": capitals["model"]["base"],
            "models": [{"model": str(run.folder)} for run in skills.values()],
            "method": "task_arithmetic",
            "lambda": 0.75,  # the sum of both updates overshoots: perplexity x 2.6; half of it loses plurals
            "dtype": "float32",
            "output": str(tmp_path / "merged"),
        }
    )
    growth = perplexity(merged) / base[1]
    print(f"\nmerge: perplexity x {growth:.3f}", flush=True)
    assert growth < MAX_PERPLEXITY_GROWTH
    for name, other in (("capitals", "plurals"), ("plurals", "capitals")):
        own, told_own = exact_match(skills[name])
        foreign, told_foreign = exact_match(skills[other], data=[files[name]])
        fields = yaml.safe_load(files[name].read_text(encoding="utf-8"))
        fields["model"]["base"] = str(merged)
        both, told_both = exact_match(fields, before=True)
        print(f"{name}: own adapter {told_own}, the other {told_foreign}, merged {told_both}", flush=True)
        assert own >= 50 and both >= own - 10 and foreign <= own - 20, "the other adapter alone lacks this skill"
