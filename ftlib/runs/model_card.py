"""The model card: README.md of a run's result. It contains no local paths."""

from __future__ import annotations

from typing import Any

from ftlib import __version__
from ftlib.config.identity import MASTER_WEIGHTS, describe_recipe
from ftlib.config.npz_checkpoints import describe_conversion
from ftlib.config.paths import hub_name, public_name
from ftlib.config.privacy import hidden_text
from ftlib.config.schema import Attention, Config, Lora
from ftlib.core import files, jsonl
from ftlib.core.log import escape_control_characters
from ftlib.metrics.formatting import format_interval, format_value
from ftlib.runs.events import recipe_of
from ftlib.runs.run import Run

_SHOWN_ARGUMENTS = (
    "num_train_epochs",
    "max_steps",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "optim",
    "weight_decay",
)


def write_card(run: Run, config: Config) -> None:
    """Write the card of a run's result, with the scores so far.

    It is not in the result's marker, so that it can be rewritten after each evaluation.
    """
    sections = (_front(config), _method(run, config), _data(run, config), _scores(run), _loading(config))
    files.write_text(
        run.result_folder(config.adapter.method) / "README.md",
        escape_control_characters("\n\n".join(filter(None, sections))) + "\n",
    )


def _front(config: Config) -> str:
    base = public_name(config.model.base)
    library = "peft" if isinstance(config.adapter, Lora) else "transformers"
    revision = f" at revision {config.model.revision}" if config.model.revision else ""
    head = [
        "---",
        *([f"base_model: {named}"] if (named := hub_name(config.model.base)) else []),
        f"library_name: {library}",
        f"pipeline_tag: {config.model.entry.pipeline_tag}",
    ]
    title = f"# {config.name}\n\n{base}{revision}, trained for the task `{config.task}` with ftlib {__version__}."
    if conversion := describe_conversion(config.model.base):
        title += f" The base is {conversion} by `ftlib stage`."
    return "\n".join([*head, "---", "", title])


def _method(run: Run, config: Config) -> str:
    facts: dict[str, Any] = {name: config.training[name] for name in _SHOWN_ARGUMENTS if name in config.training}
    facts |= {"rows a step": config.effective_batch_size, "loss averaged over": f"{config.loss.average}s"}
    facts |= _training_course(run, config)
    if config.loss.label_smoothing:
        facts["label smoothing"] = config.loss.label_smoothing
    lines = [f"- {name}: {value}" for name, value in facts.items()]
    recipe = recipe_of(jsonl.read_jsonl_log(run.history))
    trained = _describe_trained(config, recipe) + describe_recipe(config, recipe)
    return "\n".join(["## Training", "", trained, "", *lines])


def _training_course(run: Run, config: Config) -> dict[str, Any]:
    """Seed and learning rate of the successful attempt, and other facts about its weights."""
    history = jsonl.read_jsonl_log(run.history)
    told = [line for line in history if "learning_rate" in line]
    last = told[-1] if told else {"seed": config.seed}
    facts = {name: last[name] for name in ("learning_rate", "seed") if name in last}
    if last.get("attempt"):
        facts["attempts that diverged before"] = last["attempt"]
    if noted := [line for line in history if line["event"] == "precision"]:
        facts["precision"] = "{mode} on {gpu}".format(**noted[0])
    if run.warm_start.exists():
        facts["began with the weights of"] = f"another run, {files.read_json(run.warm_start)['sha256'][:16]}"
    if run.done_marker.exists() and (best := files.read_json(run.done_marker).get("best")):
        facts["chosen on valid"] = f"step {best['step']}, {best['metric']} {best['value']}"
    return facts


def _describe_trained(config: Config, recipe: int) -> str:
    adapter, model = config.adapter, config.model
    if isinstance(adapter, Lora):
        kind = {"lora": "LoRA", "dora": "DoRA"}[adapter.method]
        over = f" over {model.quantization} weights" if model.quantization != "none" else ""
        how = f"rank {adapter.r}, alpha {adapter.alpha:g}, dropout {adapter.dropout:g}{', rsLoRA' * adapter.rslora}"
        how += f", LoRA+ {adapter.loraplus_lr_ratio:g}" if adapter.loraplus_lr_ratio != 1 else ""
        how += f", init {adapter.init_lora_weights}, saved as rank {2 * adapter.r}" if adapter.pissa else ""
        fully = f", and all weights of the {adapter.modules_to_save[0]}" if adapter.modules_to_save else ""
        return f"{kind}{over} ({how}) on {', '.join(adapter.targets)}{fully}{_frozen(config)}."
    if isinstance(adapter, Attention):
        return f"The language model's attention weights in float32; everything else frozen in {model.dtype}."
    exact = MASTER_WEIGHTS.affects(config) and recipe >= MASTER_WEIGHTS.recipe
    how = f", trained in float32 and saved in {model.dtype}" if exact else f" in {model.dtype}"
    return f"All weights{how}{_frozen(config)}."


def _frozen(config: Config) -> str:
    assert not isinstance(config.adapter, Attention)
    parts = [part for part in config.adapter.freeze if part in config.model.entry.parts]  # vision is there by default
    return f", but for {' and '.join(parts)}" if parts else ""


def _data(run: Run, config: Config) -> str:
    """Source, prompt and splits with their fingerprints."""
    splits = files.read_json(run.data)["splits"]
    lines = [
        f"- {name}: {split['rows']:,} rows, fingerprint `{split['fingerprint']}`" for name, split in splits.items()
    ]
    sources = [f"- `{part.name}` ({part.source}), weight {part.weight:g}" for part in config.data.parts]
    prompt = config.data.prompt if config.privacy.text else hidden_text(config.data.prompt)
    source = f"Source `{config.data.source}`, asked as `{prompt}`."
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
    return [
        scores["metric"],
        format_value(found["value"], unit),
        format_interval(found["interval"], unit),
        str(scores["n"]),
    ]


def _loading(config: Config) -> str:
    kind, model = config.model.entry.model_class, config.model
    revision = f', revision="{model.revision}"' if model.revision else ""
    base = hub_name(model.base) or f"FOLDER OF {public_name(model.base)}"
    processor, name = ("AutoProcessor", "processor") if model.entry.images else ("AutoTokenizer", "tokenizer")
    transformers = f"from transformers import {', '.join(sorted([processor, kind]))}"
    pillow = ", use_fast=False" if model.entry.auto_processor else ""  # the pixels of training, also with torchvision
    whole = [
        transformers,
        "",
        f'model = {kind}.from_pretrained("FOLDER")',
        f'{name} = {processor}.from_pretrained("FOLDER"{pillow})',
    ]
    images = (
        [f"Call the processor with `{model.image_arguments}`, as in training.", ""] if model.image_arguments else []
    )
    if not isinstance(config.adapter, Lora):
        return "\n".join(["## Loading", "", *images, "FOLDER is the folder of this file.", "", *_python(whole)])
    adapted = [
        "from peft import PeftModel",
        transformers,
        "",
        f'base = {kind}.from_pretrained("{base}"{revision})',
        'model = PeftModel.from_pretrained(base, "FOLDER")',
        f'{name} = {processor}.from_pretrained("{base}"{revision}{pillow})',
    ]
    exported = f"Or as a whole model, without PEFT; FOLDER is what `ftlib export {config.name} -o FOLDER` has written:"
    lines = [
        "## Loading",
        "",
        *images,
        "With PEFT; FOLDER is the folder of this file:",
        "",
        *_python(adapted),
        "",
        exported,
        "",
    ]
    return "\n".join([*lines, *_python(whole)])


def _python(lines: list[str]) -> list[str]:
    return ["```python", *lines, "```"]
