"""Runs keep their identities; the config's schema, every command's --help and the batch scripts stay as they are."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.conftest import REPOSITORY
from tests.golden.conftest import Golden, run_process
from tests.golden.normal import places

Ftlib = Callable[..., tuple[int, str, str]]
Identities = Callable[..., list[str]]

HERE = Path(__file__).parent
WHERE_IT_LIES = "capitals.yaml"  # its data are beside it, so that its run is named by the path of this clone
CONFIGS = sorted(path.name for path in (REPOSITORY / "configs").glob("*.yaml") if path.name != WHERE_IT_LIES)
GENERATED = json.loads((HERE / "identities.json").read_text())["generated"]
PLAIN = """\
name: plain
task: classify
model: {family: paligemma, base: google/paligemma-3b-pt-224}
adapter: {method: lora, r: 4, alpha: 8}
data: {source: jsonl, root: /data/x, split: {valid: 0.1, test: 0.2}}
training: {max_steps: 10, per_device_train_batch_size: 2}
"""
PLUGIN = """\
from ftlib.core.registry import register_source
@register_source(name="lines")
def examples(data):
    ...
"""
OVERRIDES = ["", *(HERE / "overrides.txt").read_text().splitlines()]
"""Over `PLAIN`; KEY=VALUE pairs of a line are separated by two blanks."""

SECTIONS = {
    "Model": "model", "Lora": "adapter", "Full": "adapter", "Attention": "adapter", "Data": "data",
    "Part": "data.parts", "SplitRule": "data.split", "Loss": "loss", "Guard": "guard", "Round": "rounds",
    "Until": "rounds", "Batch": "batch", "Checkpoint": "checkpoint", "Best": "checkpoint.best",
    "PartOptimization": "parts", "Evaluation": "evaluation", "Job": "job", "Privacy": "privacy",
    "Parallel": "parallel",
}  # fmt: skip
"""Definition of the JSON Schema → the config's section."""


@pytest.fixture
def identities(store: Path, tmp_path: Path, ftlib: Ftlib, monkeypatch: pytest.MonkeyPatch) -> Identities:
    """NAME/IDENTITY of each run of a config, and what sets it apart in a sweep, as `submit --dry-run` prints them."""
    monkeypatch.setenv("FTLIB_RUNS", str(store / "runs"))
    monkeypatch.chdir(tmp_path)

    def tell(config: Path, *overrides: str) -> list[str]:
        code, out, error = ftlib("submit", config, *overrides, "--dry-run")
        assert code == 0, (overrides, error)
        return re.findall(r"^# ([^/ ]+/[0-9a-f]{12}.*)$", out, re.MULTILINE)

    return tell


def test_identities_of_the_shipped_configs(identities: Identities, golden: Golden) -> None:
    golden.json("identities/configs.json", {name: identities(REPOSITORY / "configs" / name) for name in CONFIGS})


def test_identities_of_generated_configs(identities: Identities, golden: Golden, tmp_path: Path) -> None:
    path = tmp_path / "generated.yaml"
    found = []
    for known in GENERATED:
        path.write_text(yaml.safe_dump(known["config"]))
        found.append(identities(path))
    golden.json("identities/generated.json", found)


def test_identities_with_every_key_set(identities: Identities, golden: Golden, tmp_path: Path) -> None:
    path = tmp_path / "plain.yaml"
    path.write_text(PLAIN)
    for name in ("start.npz", "start.model"):  # whose content names a run, not their place
        (tmp_path / name).write_text(name)
    (tmp_path / "plugin.py").write_text(PLUGIN)
    found = {line: identities(path, *line.split("  ")) if line else identities(path) for line in OVERRIDES}
    golden.json("identities/keys.json", found)


def test_schema(golden: Golden, tmp_path: Path) -> None:
    found = run_process("schema", store=tmp_path / "store", folder=tmp_path)
    assert (found.code, found.err) == (0, "")
    golden.text("schema.json", found.out)


def test_overrides_name_every_key_of_the_schema() -> None:
    schema = json.loads((HERE / "expected" / "schema.json").read_text())
    keys = {(section, key) for name, section in SECTIONS.items() for key in schema["$defs"][name]["properties"]}
    assert set(schema["$defs"]) == set(SECTIONS)
    words = [set(re.findall(r"[\w.]+", line)) for line in OVERRIDES]
    missing = {
        (section, key)
        for section, key in keys
        if not any({section, key} <= line or f"{section}.{key}" in line for line in words)
    }
    assert missing == set()
    assert {key for key in schema["properties"] if not any(line.startswith(key) for line in OVERRIDES)} == set()


def test_help(golden: Golden, tmp_path: Path, ftlib: Ftlib, monkeypatch: pytest.MonkeyPatch) -> None:
    overview = run_process("--help", store=tmp_path / "store", folder=tmp_path)
    assert (overview.code, overview.err) == (0, "")
    commands = re.findall(r"^  (\w+) ", overview.out, re.MULTILINE)
    monkeypatch.setenv("COLUMNS", "1000")  # where argparse wraps a line is Python's choice
    told = [overview.out]
    for command in commands:
        code, out, error = ftlib(command, "--help")
        assert (code, error) == (0, "")
        out = re.sub(r"(?<= )(--?\w+) \S+(?=, --)", r"\1", out)  # left out since Python 3.13
        told.append(f"##### {command}\n" + re.sub(r"(?<=\S)(\n {10,}| +)(?=\S)", " ", out))
    golden.text("help.txt", "\n".join(told))


def test_batch_scripts(golden: Golden, store: Path, tmp_path: Path) -> None:
    told = []
    for name, *words in (
        ["digits.yaml"],
        ["digits.yaml", "sweep.seed=[0, 1]", "job.array_parallelism=1", "--then", "evaluate,report"],
        ["opencalm_3b.yaml", "job.gpus=2", "job.nodes=2", "job.gpu_type=a100"],
    ):
        config = REPOSITORY / "configs" / name
        found = run_process(
            "submit", config, *words, "--dry-run", store=store, folder=tmp_path, SBATCH_PARTITION="short"
        )
        text = places(found.text, {"store": store, "folder": tmp_path})
        told.append(re.sub(r"/code-[0-9a-f]{12}/", "/code-<hash>/", text))
    golden.text("batch-scripts.txt", "\n".join(told))
