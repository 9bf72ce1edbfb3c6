"""The model card: README.md beside a run's result. It names no path of this machine."""

from __future__ import annotations

from typing import Any

from ftlib import __version__, files
from ftlib.config import Attention, Config, Lora
from ftlib.history import recipe_in
from ftlib.identity import MASTER_WEIGHTS, told_recipe
from ftlib.metrics.summary import number, span
from ftlib.runs import Run

_CLASSES = {"paligemma": "PaliGemmaForConditionalGeneration", "causal": "AutoModelForCausalLM"}
_TEXT_PARTS = ("embeddings", "language")
"""What a text model has; `adapter.freeze` names vision by default, whatever the family."""

_TAGS = {"paligemma": "image-text-to-text", "causal": "text-generation"}
_SHOWN = (
    "num_train_epochs",
    "max_steps",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "optim",
    "weight_decay",
)


def write_card(run: Run, config: Config) -> None:
    """Write the card of a run's result, with the scores that there are by now.

    It is no part of what the result's marker names, so that it can be written anew after each evaluation.
    """
    sections = (_front(config), _method(run, config), _data(run, config), _scores(run), _loading(config))
    files.write_text(run.result(config.adapter.method) / "README.md", "\n\n".join(filter(None, sections)) + "\n")


def _base(config: Config) -> str:
    """A hub name as it is; of a local folder its own name only."""
    name = config.model.base
    return name if name.count("/") == 1 and name[0] not in "./~" else name.rstrip("/").rpartition("/")[2]


def _front(config: Config) -> str:
    library = "peft" if isinstance(config.adapter, Lora) else "transformers"
    revision = f" at revision {config.model.revision}" if config.model.revision else ""
    head = [
        "---",
        f"base_model: {_base(config)}",
        f"library_name: {library}",
        f"pipeline_tag: {_TAGS[config.model.family]}",
    ]
    title = (
        f"# {config.name}\n\n{_base(config)}{revision}, trained for the task `{config.task}` with ftlib {__version__}."
    )
    return "\n".join([*head, "---", "", title])


def _method(run: Run, config: Config) -> str:
    facts: dict[str, Any] = {name: config.training[name] for name in _SHOWN if name in config.training}
    facts |= {"rows a step": config.effective_batch, "loss averaged over": f"{config.loss.average}s"}
    facts |= _course(run, config)
    if config.loss.label_smoothing:
        facts["label smoothing"] = config.loss.label_smoothing
    lines = [f"- {name}: {value}" for name, value in facts.items()]
    recipe = recipe_in(files.read_jsonl_log(run.history))
    trained = _what_trained(config, recipe) + told_recipe(config, recipe)
    return "\n".join(["## Training", "", trained, "", *lines])


def _course(run: Run, config: Config) -> dict[str, Any]:
    """Seed and learning rate of the attempt that made the weights, and what else happened to them."""
    history = files.read_jsonl_log(run.history)
    told = [line for line in history if "learning_rate" in line]
    last = told[-1] if told else {"seed": config.seed}
    facts = {name: last[name] for name in ("learning_rate", "seed") if name in last}
    if last.get("attempt"):
        facts["attempts that diverged before"] = last["attempt"]
    if noted := [line for line in history if line["event"] == "precision"]:
        facts["precision"] = "{mode} on {gpu}".format(**noted[0])
    if run.warm_start.exists():
        facts["began with the weights of"] = f"another run, {files.read_json(run.warm_start)['sha256'][:16]}"
    if run.done.exists() and (best := files.read_json(run.done).get("best")):
        facts["chosen on valid"] = f"step {best['step']}, {best['metric']} {best['value']}"
    return facts


def _what_trained(config: Config, recipe: int) -> str:
    adapter, model = config.adapter, config.model
    if isinstance(adapter, Lora):
        kind = {"lora": "LoRA", "dora": "DoRA"}[adapter.method]
        over = f" over {model.quantization} weights" if model.quantization != "none" else ""
        how = f"rank {adapter.r}, alpha {adapter.alpha:g}, dropout {adapter.dropout:g}{', rsLoRA' * adapter.rslora}"
        return f"{kind}{over} ({how}) on {', '.join(adapter.targets)}{_frozen(config)}."
    if isinstance(adapter, Attention):
        return f"The language model's attention weights in float32; everything else frozen in {model.dtype}."
    exact = MASTER_WEIGHTS.affects(config) and recipe >= MASTER_WEIGHTS.recipe
    how = f", trained in float32 and saved in {model.dtype}" if exact else f" in {model.dtype}"
    return f"All weights{how}{_frozen(config)}."


def _frozen(config: Config) -> str:
    assert not isinstance(config.adapter, Attention)
    parts = [part for part in config.adapter.freeze if config.model.family != "causal" or part in _TEXT_PARTS]
    return f", but for {' and '.join(parts)}" if parts else ""


def _data(run: Run, config: Config) -> str:
    """Source, prompt and splits with their fingerprints."""
    splits = files.read_json(run.data)["splits"]
    lines = [
        f"- {name}: {split['rows']:,} rows, fingerprint `{split['fingerprint']}`" for name, split in splits.items()
    ]
    sources = [f"- `{part.name}` ({part.source}), weight {part.weight:g}" for part in config.data.parts]
    source = f"Source `{config.data.source}`, asked as `{config.data.prompt}`."
    return "\n".join(["## Data", "", source, *sources, "", *lines])


def _scores(run: Run) -> str:
    rows = [
        "| " + " | ".join([*path.parts[-4:-2], *_cells(files.read_json(path))]) + " |"
        for path in sorted(run.folder.glob("eval/*/*/after/scores.json"))
    ]
    head = ["| data | split | metric | value | 95 % interval | n |", "|---|---|---|---|---|---|"]
    return "\n".join(["## Scores", "", *head, *rows]) if rows else ""


def _cells(scores: dict[str, Any]) -> list[str]:
    found, unit = scores["metrics"][scores["metric"]], scores["unit"]
    return [scores["metric"], number(found["value"], unit), span(found["interval"], unit), str(scores["n"])]


def _loading(config: Config) -> str:
    kind, model = _CLASSES[config.model.family], config.model
    revision = f', revision="{model.revision}"' if model.revision else ""
    lines = [f"from transformers import {kind}", ""]
    if isinstance(config.adapter, Lora):
        lines[1:] = ["from peft import PeftModel", "", f'base = {kind}.from_pretrained("{_base(config)}"{revision})']
        lines.append('model = PeftModel.from_pretrained(base, "FOLDER OF THIS FILE")')
    else:
        lines.append(f'model = {kind}.from_pretrained("FOLDER OF THIS FILE")')
    return "\n".join(["## Loading", "", "```python", *lines, "```"])
