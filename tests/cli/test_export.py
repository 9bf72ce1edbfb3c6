"""`ftlib export`: a run's result as a whole model, read by the lines of its model card."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import ftlib as api
from ftlib.core.paths import find_site
from ftlib.runs.run import create_run
from tests.cli.test_paligemma import answers_of, bases
from tests.conftest import FULL, LORA, read_lines

Ftlib = Callable[..., tuple[int, str, str]]
__all__ = ["bases"]


def loaded(card: Path, number: int, replace: dict[str, Path]) -> tuple[Any, Any]:
    """Execute a block of the card, with its placeholders replaced; model and processor."""
    code = re.findall(r"```python\n(.*?)```", card.read_text(), re.DOTALL)[number]
    for placeholder, folder in replace.items():
        assert f'"{placeholder}"' in code
        code = code.replace(f'"{placeholder}"', repr(str(folder)))
    names: dict[str, Any] = {}
    exec(code, names)  # the lines of the card
    return names["model"], names["processor"] if "processor" in names else names["tokenizer"]


def trained(ftlib: Ftlib, config: Path, *overrides: str) -> tuple[Path, list[dict[str, Any]]]:
    """A run of two steps, and its answers."""
    assert ftlib("prepare", config)[0] == 0
    code, output, error = ftlib("train", config, *overrides)
    assert code == 0, error
    assert ftlib("evaluate", "tiny", "--split", "test")[0] == 0
    run = Path(output.strip())
    return run, read_lines(run / "eval" / "jsonl" / "test" / "after" / "predictions.jsonl")


@pytest.mark.parametrize("base", ["first", "windowed"])
def test_an_adapter_becomes_a_whole_model(
    write_config: Callable[..., Path],
    store: Path,
    shared: Path,
    tmp_path: Path,
    ftlib: Ftlib,
    bases: dict[str, Path],
    base: str,
) -> None:
    config = write_config(LORA, base=str(bases[base]), replace=("max_steps: 12", "max_steps: 2"))
    run, records = trained(ftlib, config)
    answers = [record["prediction"] for record in records]
    whole = tmp_path / "a whole model"
    code, output, error = ftlib("export", "tiny", "-o", whole)
    assert (code, output.strip()) == (0, str(whole)), error
    card = run / "adapter" / "README.md"
    assert answers_of(*loaded(card, 1, {"FOLDER": whole}), shared / "data", records) == answers
    if base == "first":  # a window is in the config of the base, which an adapter leaves as it is
        replaced = {"FOLDER": run / "adapter", f"FOLDER OF {bases[base].name}": bases[base]}
        assert answers_of(*loaded(card, 0, replaced), shared / "data", records) == answers
    weights, before = load_file(whole / "model.safetensors"), load_file(bases[base] / "model.safetensors")
    changed = {name for name in weights if not torch.equal(weights[name], before[name])}
    parts = {part for part in ("vision_tower", "language_model") if any(part in name for name in changed)}
    assert parts == {"vision_tower", "language_model"}  # LORA freezes nothing
    assert not list(whole.glob("adapter*")) and "a whole model" in (whole / "README.md").read_text()
    made = (whole / "config.json").read_bytes()
    assert ftlib("export", run / "adapter", "-o", whole)[0] == 0  # done already
    assert (whole / "config.json").read_bytes() == made
    half = api.export(run, tmp_path / "half", dtype="bfloat16")
    stored = json.loads((half / "config.json").read_text())
    assert stored["dtype"] == "bfloat16"
    assert {tensor.dtype for tensor in load_file(half / "model.safetensors").values()} == {torch.bfloat16}


def test_a_full_run_is_copied(
    write_config: Callable[..., Path], store: Path, shared: Path, tmp_path: Path, ftlib: Ftlib, bases: dict[str, Path]
) -> None:
    config = write_config(FULL, base=str(bases["windowed"]), replace=("max_steps: 12", "max_steps: 2"))
    run, records = trained(ftlib, config, "training.learning_rate=1e-3")
    assert ftlib("export", "tiny", "-o", tmp_path / "whole")[0] == 0
    weights, own = load_file(tmp_path / "whole" / "model.safetensors"), load_file(run / "model" / "model.safetensors")
    assert weights.keys() == own.keys() and all(torch.equal(weights[name], own[name]) for name in own)
    model, processor = loaded(run / "model" / "README.md", 0, {"FOLDER": tmp_path / "whole"})
    answers = [record["prediction"] for record in records]
    assert answers_of(model, processor, shared / "data", records) == answers


def test_what_cannot_be_exported(write_config: Callable[..., Path], store: Path, tmp_path: Path, ftlib: Ftlib) -> None:
    code, _, error = ftlib("export", "nothing", "-o", tmp_path / "out")
    assert code == 2 and "nothing: no such run" in error
    experiment = api.load_config(write_config(LORA))
    run = create_run(experiment, find_site())
    code, _, error = ftlib("export", "tiny", "-o", tmp_path / "out")
    assert code == 2 and f"{run.folder}: not trained yet" in error
