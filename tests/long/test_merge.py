"""Two adapters that learned to read digits and to tell odd from even merge over their base. Run by `make long`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ftlib.core import log
from tests.conftest import read_lines

Ftlib = Callable[..., tuple[int, str, str]]
TASKS = {
    "size": ("is it below five?", lambda digit: "yes" if digit < 5 else "no"),
    "digit": ("which digit is this?", str),
    "parity": ("is it odd or even?", lambda digit: "odd" if digit % 2 else "even"),
}
METHODS: dict[str, list[str]] = {
    "linear": [],
    "task_arithmetic": [],
    "ties": ["--density", "0.5", "--lambda", "1"],
    "dare_linear": ["--density", "0.5"],
    "dare_ties": ["--density", "0.5"],
    "layerswap": ["--layer", "0"],
    "slerp": [],
}
PARTS = ["train"] * 7 + ["valid"] + ["test"] * 2
CONFIG = """\
name: {task}
task: classify
model: {{family: paligemma, base: "{base}"}}
adapter: {adapter}
data: {{source: jsonl, root: "{root}", file: {task}.jsonl, split: {{official: true}}}}
training: {{num_train_epochs: {epochs}, per_device_train_batch_size: 32, learning_rate: {rate}, warmup_steps: 0.1,
  lr_scheduler_type: cosine}}
evaluation: {{splits: [test], max_new_tokens: 5, batch_size: 128}}
"""


def make_tasks(root: Path) -> None:
    """The same images with three questions, each in a file of its own, and together in all.jsonl; the same parts."""
    from ftlib.data.sources.toy import make_digits

    root.mkdir()
    make_digits(root)
    together: list[dict[str, object]] = []
    for task, (prompt, answer) in TASKS.items():
        rows = [
            {**row, "prefix": prompt, "suffix": answer(int(str(row["suffix"]))), "part": PARTS[number % 10]}
            for number, row in enumerate(read_lines(root / "data.jsonl"))
        ]
        (root / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        together += [{**row, "id": f"{task} {row['id']}"} for row in rows]
    (root / "all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in together))


@pytest.mark.long
def test_merges_of_two_adapters_do_both_tasks(store: Path, tmp_path: Path, ftlib: Ftlib) -> None:
    make_tasks(tmp_path / "data")

    def done(*words: object) -> str:
        code, out, error = ftlib(*words)
        assert code == 0, error
        return out

    def config(task: str, base: object, adapter: str, epochs: float, rate: float) -> Path:
        path = tmp_path / f"{task}.yaml"
        root = tmp_path / "data"
        path.write_text(CONFIG.format(task=task, base=base, adapter=adapter, root=root, epochs=epochs, rate=rate))
        return path

    def trained(path: Path) -> Path:
        done("prepare", path)
        return Path(done("train", path).strip().splitlines()[-1])

    first = config("all", "ftlib/tiny-paligemma", "{method: full}", 1.5, 1e-3)  # it reads badly
    done("stage", first)
    base = tmp_path / "base"
    shutil.copytree(trained(first) / "model", base)
    lora = "{method: lora, r: 16, alpha: 32, freeze: []}"
    paths = {task: config(task, base, lora, 6, 1e-3) for task in ("digit", "parity")}
    adapters = [trained(path) for path in paths.values()]

    def scores(model: Path) -> list[float]:
        found: list[dict[str, Any]] = []
        for path in paths.values():
            found += json.loads(done("evaluate", path, f"model.base={model}", "--before", "--json"))
        return [each["value"] for each in found]

    def merged(name: str, method: str, models: list[Path], *words: str) -> Path:
        out = tmp_path / name
        parts = ["--part", "vision=merged", "--part", "projector=merged"]
        done("merge", "--base", base, "--model", *models, "--method", method, *words, *parts, "-o", out)
        return out

    values = {"base": scores(base)}
    values["a (digit)"] = scores(merged("a", "linear", adapters[:1]))
    values["b (parity)"] = scores(merged("b", "linear", adapters[1:]))
    values.update({name: scores(merged(name, name, adapters, *words)) for name, words in METHODS.items()})
    rows = [[name, *(f"{value:.4f}" for value in pair)] for name, pair in values.items()]
    print(f"\n{log.format_table(['model', 'digit', 'parity'], rows)}", flush=True)
    base, a, b = (values[name] for name in ("base", "a (digit)", "b (parity)"))
    assert a[0] > base[0] and b[1] > base[1]
    for name in METHODS:
        digit, parity = values[name]
        assert digit > max(base[0], b[0]) and parity > max(base[1], a[1]), f"{name} has learned of both parents"
