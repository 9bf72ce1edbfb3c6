"""Initial weights, and warm start: training starts from a finished run instead of the base model or new adapters.

Only weights are loaded; optimizer and schedule start fresh. This is also the way to continue training a finished run.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel

from ftlib.config.loader import load_experiment
from ftlib.config.schema import Attention, Config, Lora
from ftlib.core import files, log
from ftlib.core.paths import Site
from ftlib.errors import UserError
from ftlib.models import sharded_loading
from ftlib.models.adapters import prepare_for_training
from ftlib.models.attention import validate_trainable
from ftlib.models.dropout import add_dropout
from ftlib.models.loading import load_adapter_weights, load_model, load_weights
from ftlib.models.paligemma import skip_image_token_count
from ftlib.models.pissa import apply_initial_factors, write_initial_factors
from ftlib.models.registry import family_of
from ftlib.runs.pinning import verify_base_unchanged
from ftlib.runs.run import Run
from ftlib.runs.warm_start import warm_start_folder
from ftlib.training import distributed


def resolve_init_weights(config: Config, run: Run, site: Site) -> Path | None:
    """Return the folder of the weights of `warm_start`; their hash is recorded in the run and must not change.

    Raises:
        UserError: no such run, it is not finished, its result is of the wrong kind, or its weights have changed.
    """
    if config.warm_start is None:
        return None
    before = files.read_json(run.warm_start) if run.warm_start.exists() else None
    if before and Path(before["folder"]).is_dir():
        folder = Path(before["folder"])
    else:
        folder = warm_start_folder(config.warm_start, run, site)
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
        raise UserError(problem, "Restore the old weights, or change the config's name or seed to start a new run.")
    if log.is_main_process():
        files.write_json(run.warm_start, noted)
    return folder


def _check_base(folder: Path, config: Config, site: Site) -> None:
    """Check that the weights have this config's base: an adapter of another base with equal shapes would load."""
    facts = files.read_json(folder / "adapter_config.json")
    trained_on = (facts.get("base_model_name_or_path"), facts.get("revision"))
    own = Run(folder.parent)
    if own.config_file.is_file() and own.done_marker.exists():  # its config is valid even if the store was moved
        model = load_experiment(own.config_file, [], site).config.model
        trained_on = (model.base, model.revision)
    if trained_on != (config.model.base, config.model.revision):
        name, revision = trained_on
        problem = f"warm_start: {folder} was trained over {name}{f' at {revision}' if revision else ''}"
        raise UserError(f"{problem}, not over this config's model.base and revision", "Set model.base to that base.")


def _check_kind(folder: Path, wants_adapter: bool) -> None:
    is_adapter = (folder / "adapter_config.json").is_file()
    if wants_adapter and not is_adapter:
        remedy = "To train adapters on it, set it as model.base instead."
        raise UserError(f"warm_start: {folder} is a whole model, and adapter.method trains adapters", remedy)
    if is_adapter and not wants_adapter:
        remedy = "Merge it into its base first (`ftlib merge`), and set warm_start to the merged model."
        raise UserError(
            f"warm_start: {folder} is an adapter, and adapter.method trains the model's own weights", remedy
        )


def trainable_model(
    config: Config, run: Run, base: Path, init_weights: Path | None, mesh: DeviceMesh | None = None
) -> torch.nn.Module:
    """Return the model with its initial weights; only trainable parameters have requires_grad. All ranks must call it.

    Args:
        base: the folder of the base model.
        init_weights: from `resolve_init_weights`.
        mesh: the ranks that share the model, each of which loads its part, for `sharding.shard`; None: load all of it.

    Raises:
        UserError: the weights do not match the model, no parameter would be trained, or PiSSA's initial factors are
            lost.
    """
    model, adapter = config.model, config.adapter
    whole = init_weights if init_weights and not isinstance(adapter, Lora) else base
    weights = load_model(whole, model, mesh)
    if mesh:
        sharded_loading.detach_parts(weights, "cpu" if isinstance(adapter, Lora) else "meta")
    validate_trainable(weights)
    skip_image_token_count(weights)
    if model.dropout:
        add_dropout(weights, model.dropout)
    trainable = prepare_for_training(weights, adapter, model.base, family_of(model), model.revision)
    if mesh and isinstance(adapter, Lora):
        sharded_loading.initialize_from_parts(trainable)
    if init_weights and isinstance(adapter, Lora):
        load_adapter_weights(trainable, init_weights)
    if init_weights and isinstance(adapter, Attention) and model.dtype != "float32":
        exact = load_weights(init_weights, "float32", family_of(model), mesh=mesh)
        if mesh:
            sharded_loading.replace_trained_parts(trainable, exact)
        else:
            _restore_float32(trainable, exact)
    if isinstance(adapter, Lora) and adapter.pissa:
        if log.is_main_process() and not files.is_complete(run.initial_factors, thorough=True):
            if any(run.folder.glob("checkpoints/*/*")):
                problem = f"{run.initial_factors}: the initial factors of this run are missing or damaged"
                raise UserError(f"{problem}, so it cannot resume", "Start it again: delete the run folder.")
            log.info(f"computing the initial factors ({adapter.init_lora_weights})")
            write_initial_factors(trainable, adapter.init_lora_weights, run.initial_factors)
        distributed.barrier()
        apply_initial_factors(trainable, run.initial_factors)
    return trainable


def _restore_float32(model: torch.nn.Module, exact: PreTrainedModel) -> None:
    """Copy the float32 weights into the model, because loading rounded them to `model.dtype`."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(exact.get_parameter(name))
