"""Warm start: training begins with the weights of a finished run instead of the base model's, or of fresh adapters.

Only weights are taken over; optimizer and schedule begin anew, so that this is also how a finished run is trained on.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel

from ftlib.config.loader import load_experiment
from ftlib.config.schema import Attention, Config, Lora
from ftlib.core import files, log
from ftlib.core.paths import Site
from ftlib.errors import UserError
from ftlib.models.adapters import prepare_for_training
from ftlib.models.attention import validate_trainable
from ftlib.models.loading import load_adapter_weights, load_model, load_weights
from ftlib.models.paligemma import skip_image_token_count
from ftlib.models.registry import family_of
from ftlib.runs import run as runs
from ftlib.runs.pinning import verify_base_unchanged
from ftlib.runs.run import Run


def resolve_init_weights(config: Config, run: Run, site: Site) -> Path | None:
    """The folder whose weights `warm_start` names; their hash is noted in the run, and must stay.

    Raises:
        UserError: no such run, it is not finished, its result is of another kind, or its weights have changed.
    """
    if config.warm_start is None:
        return None
    before = files.read_json(run.warm_start) if run.warm_start.exists() else None
    if before and Path(before["folder"]).is_dir():
        folder = Path(before["folder"])
    else:
        folder = _weights_folder(config.warm_start, run, site)
    _check_kind(folder, isinstance(config.adapter, Lora))
    if isinstance(config.adapter, Lora):
        _check_base(folder, config, site)
        if run.base.exists():
            verify_base_unchanged(Run(folder.parent), files.read_json(run.base))
    found = [path for pattern in ("*.safetensors", "*.bin") for path in folder.glob(pattern)]
    weights = {path.name: files.file_sha256(path) for path in sorted(found)}
    noted = {"folder": str(folder), "sha256": files.json_sha256(weights)}
    if before and before["sha256"] != noted["sha256"]:
        problem = f"warm_start: the weights in {folder} have changed since this run began"
        raise UserError(problem, "Put the old ones back, or give the config another name or seed to begin a new run.")
    if log.is_main_process():
        files.write_json(run.warm_start, noted)
    return folder


def _weights_folder(text: str, run: Run, site: Site) -> Path:
    """A folder of weights as it is, or a run's result; by name this run itself, which may share it, is not meant."""
    folder = Path(text)
    if folder.is_absolute() and any((folder / name).is_file() for name in ("adapter_config.json", "config.json")):
        return folder
    others = [path.parent for path in (site.runs / text).glob("*/config.yaml") if path.parent != run.folder]
    other = Run(others[0]) if len(others) == 1 else runs.find_run(str(site.runs / text), site)
    if not other.done_marker.exists():
        raise UserError(f"warm_start: {other.folder}: not trained to its end yet", "Run `ftlib train` for it first.")
    return other.folder / str(files.read_json(other.done_marker)["result"])


def _check_base(folder: Path, config: Config, site: Site) -> None:
    """An adapter of equal shape over another base would be loaded without a word."""
    facts = files.read_json(folder / "adapter_config.json")
    trained_on = (facts.get("base_model_name_or_path"), facts.get("revision"))
    own = Run(folder.parent)
    if own.config_file.is_file() and own.done_marker.exists():  # which knows its base wherever the store lies by now
        model = load_experiment(own.config_file, [], site).config.model
        trained_on = (model.base, model.revision)
    if trained_on != (config.model.base, config.model.revision):
        name, revision = trained_on
        problem = f"warm_start: {folder} was trained over {name}{f' at {revision}' if revision else ''}"
        raise UserError(f"{problem}, not over this config's model.base and revision", "Begin from its own base.")


def _check_kind(folder: Path, wants_adapter: bool) -> None:
    is_adapter = (folder / "adapter_config.json").is_file()
    if wants_adapter and not is_adapter:
        remedy = "To train adapters on it, name it as model.base instead."
        raise UserError(f"warm_start: {folder} is a whole model, and adapter.method trains adapters", remedy)
    if is_adapter and not wants_adapter:
        remedy = "Merge it into its base first (`ftlib merge`), and name the merged model here."
        raise UserError(
            f"warm_start: {folder} is an adapter, and adapter.method trains the model's own weights", remedy
        )


def trainable_model(config: Config, base: Path, init_weights: Path | None) -> torch.nn.Module:
    """The model with its trainable parameters marked, holding the weights that training begins with.

    Args:
        base: the folder of the base model.
        init_weights: from `resolve_init_weights`.

    Raises:
        UserError: a folder's weights do not fit, or nothing would be trained.
    """
    model, adapter = config.model, config.adapter
    whole = init_weights if init_weights and not isinstance(adapter, Lora) else base
    weights = load_model(whole, model)
    validate_trainable(weights)
    skip_image_token_count(weights)
    trainable = prepare_for_training(weights, adapter, model.base, family_of(model), model.revision)
    if init_weights and isinstance(adapter, Lora):
        load_adapter_weights(trainable, init_weights)
    if init_weights and isinstance(adapter, Attention) and model.dtype != "float32":
        _restore_float32(trainable, load_weights(init_weights, "float32", family_of(model)))
    return trainable


def _restore_float32(model: torch.nn.Module, exact: PreTrainedModel) -> None:
    """Loading rounded the float32 weights to `model.dtype`."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(exact.get_parameter(name))
