"""Models of the hub: staged, merged, evaluated beside each other, reported, queried, pushed, and staged again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from transformers import PaliGemmaForConditionalGeneration

from tests.conftest import LORA
from tests.fake_hub import TOKEN, serving

Ftlib = Callable[..., tuple[int, str, str]]
WriteConfig = Callable[..., Path]


def publish_adapter(folder: Path, base: Path, seed: int) -> None:
    """Save a random adapter of `lab/base` as PEFT does."""
    torch.manual_seed(seed)
    model = PaliGemmaForConditionalGeneration.from_pretrained(base)
    settings = peft.LoraConfig(r=4, lora_alpha=16, target_modules=r".*language_model.*\.(q_proj|down_proj)")
    tuned = peft.get_peft_model(model, settings)
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.5)
    tuned.peft_config["default"].base_model_name_or_path = "lab/base"
    tuned.save_pretrained(folder)
    (folder / "README.md").write_text("---\nbase_model: lab/base\n---\n")


def test_from_stage_to_push_and_back(
    store: Path,
    shared: Path,
    write_config: WriteConfig,
    ftlib: Ftlib,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def run(*command: object) -> str:
        code, out, error = ftlib(*command)
        assert code == 0 and "Traceback" not in error, error
        return out.strip()

    hub, merged = tmp_path / "hub", tmp_path / "merged"
    shutil.copytree(shared / "model", hub / "models" / "lab" / "base")
    for seed, name in enumerate("ab", 1):
        publish_adapter(hub / "models" / "lab" / name, shared / "model", seed)
    (tmp_path / "token").write_text(TOKEN)
    with serving(hub, tmp_path, monkeypatch):
        staged = {name: Path(run("stage", f"lab/{name}")) for name in ("base", "a", "b")}
        assert (staged["a"] / "adapter_model.safetensors").is_file() and (staged["base"] / "config.json").is_file()

        run("merge", "--base", "lab/base", "--model", "lab/a", "lab/b", "--method", "ties", "-o", merged)
        card = (merged / "README.md").read_text()
        assert "- lab/base\n- lab/a\n- lab/b\n" in card

        config = write_config(LORA, base="lab/base")
        run("prepare", config)
        models = ("lab/base", "lab/a", "lab/b", str(merged))
        answers = []
        for base in models:
            (scores,) = json.loads(run("evaluate", config, f"model.base={base}", "--before", "--json"))
            assert (scores["when"], scores["n"]) == ("before", 12)
        for path in sorted((store / "runs").glob("*/tiny/*/eval/*/valid/before/predictions.jsonl")):
            answers.append([json.loads(line)["prediction"] for line in path.read_text().splitlines()])
        assert len({json.dumps(each) for each in answers}) == 4, "four models, four sets of answers"

        page = Path(run("report", "tiny", "-o", tmp_path / "page.html")).read_text()
        assert "4 only evaluated, without training" in page and "ties of lab/a (weight 1), lab/b (weight 1)" in page

        image = next((shared / "data" / "images").iterdir())
        answer = run("predict", merged, "--prompt", "which digit?", "--image", image)

        assert run("push", merged, "--to", "lab/merged", "--yes").endswith("/lab/merged")
        (hub / "pushed").rename(hub / "models" / "lab" / "merged")
        again = Path(run("stage", "lab/merged"))
        came = {path.name for path in again.iterdir()} - {"COMPLETE.json"}
        assert came == {path.name for path in merged.iterdir()} - {"COMPLETE.json", "README.md"}
        different = {name for name in came if (again / name).read_bytes() != (merged / name).read_bytes()}
        assert different == {"merge.json"}, "the folder's path does not leave this machine"
        made, sent = (json.loads((folder / "merge.json").read_text()) for folder in (merged, again))
        assert made["recipe"].pop("output") == str(merged) and sent["recipe"].pop("output") == "merged" and made == sent
        assert run("predict", again, "--prompt", "which digit?", "--image", image) == answer
        (scores,) = json.loads(run("evaluate", config, "model.base=lab/merged", "--before", "--json"))
        assert scores["settings"]["model"] == "lab/merged"
