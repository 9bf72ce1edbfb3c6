"""Train one run from its config to its result, going on from the last checkpoint if there is one."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from ftlib import console, disk, files, history, preemption, runs
from ftlib.config import Config
from ftlib.config_file import Experiment
from ftlib.data.prepared import Prepared, open_prepared
from ftlib.environment import describe_environment
from ftlib.errors import UserError
from ftlib.hub import find_model
from ftlib.models.adapters import count_parameters, prepare_for_training
from ftlib.models.families import FAMILIES, check_images
from ftlib.models.loading import load_weights
from ftlib.runs import Run
from ftlib.site import Site
from ftlib.training import arguments
from ftlib.training.batching import TrainingRows
from ftlib.training.checkpoints import load_trainable, restore_threads, space_needed
from ftlib.training.fitting import fit_rows
from ftlib.training.trainer import AnswerTrainer

_LESS_MEMORY = (
    "Halve training.per_device_train_batch_size and double training.gradient_accumulation_steps (it stays the same "
    "run), or set training.gradient_checkpointing: true."
)


def fit(experiment: Experiment, run: Run, site: Site) -> None:
    """Train a run whose folder this process owns.

    Raises:
        UserError: nothing staged or prepared, data changed under the run, storage full.
        Diverged: loss or gradient became NaN or infinite.
    """
    config = experiment.config
    prepared = open_prepared(config, site)
    _pin_data(run, prepared)
    checkpoint = runs.last_checkpoint(run.checkpoints())
    step = checkpoint[0] if checkpoint else 0
    runs.remove_checkpoints_after(run.checkpoints(), step)
    if checkpoint:
        restore_threads(checkpoint[1])
        console.say(f"going on from the checkpoint of step {step}")
    runs.rotate_checkpoints(run.checkpoints(), config.checkpoint.keep)
    files.cut_jsonl_log(run.metrics, keep=step)
    files.cut_jsonl_log(run.history)
    history.begin(run, "train", step=step)
    run.note_environment(describe_environment())
    started = time.monotonic()
    trainer = _trainer(experiment, run, prepared, site)
    total = _total_steps(trainer)
    _require_space(run, trainer, config, total - step)
    run.note("training", total=total)
    with console.progress("step", total, start=step) as update:
        trainer.on_step = lambda record, total: _log_step(run, record, update)
        with preemption.graceful():
            _train(trainer, checkpoint[1] if checkpoint else None)
    _publish(experiment, run, trainer)
    run.note("done", step=trainer.state.global_step, seconds=round(time.monotonic() - started, 1))


def _pin_data(run: Run, prepared: Prepared) -> None:
    """A run keeps the data that it began with."""
    if run.data.exists() and files.read_json(run.data) != prepared.facts:
        raise UserError(
            f"{run.folder}: the dataset has changed since this run began",
            "Put the old data back, or give the config another name or seed to begin a new run.",
        )
    files.write_json(run.data, prepared.facts)


def _trainer(experiment: Experiment, run: Run, prepared: Prepared, site: Site) -> AnswerTrainer:
    config = experiment.config
    folder = find_model(config.model, site)
    rows = _rows(config, run, prepared, folder)
    training_arguments = arguments.build(config, run.folder)
    set_seed(config.seed)
    weights = load_weights(folder, config.model.dtype, config.model.family)
    model = prepare_for_training(weights, config.adapter, config.model.base, config.model.family)
    trained, total = count_parameters(model)
    console.say(f"{trained:,} of {total:,} parameters train ({trained / total:.3%}) on {_device()}")
    return AnswerTrainer(config, model, rows, training_arguments, run.checkpoints())


def _rows(config: Config, run: Run, prepared: Prepared, folder: Path) -> TrainingRows:
    """The rows to learn from; what becomes of those that are too long is said and noted."""
    inputs = FAMILIES[config.model.family].load_inputs(folder, config)
    examples = prepared.rows("train")
    check_images(config.model.family, examples)
    fitted = fit_rows(examples, config.data.prompt, inputs, config.model.too_long)
    if fitted.sentence:
        console.say(fitted.sentence)
        run.note("too long", limit=fitted.limit, dropped=fitted.dropped, truncated=fitted.truncated)
    if config.training.get("dataloader_drop_last") and len(fitted.kept) < config.effective_batch:
        problem = f"{len(fitted.kept)} training rows do not fill one batch of {config.effective_batch}"
        raise UserError(f"training.dataloader_drop_last: {problem}")
    return TrainingRows(examples, prepared.root, config.data.prompt, inputs, fitted.kept)


def _device() -> str:
    """What training runs on, in words; a GPU that Slurm gave and torch does not see is worth a word."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    given = os.environ.get("SLURM_JOB_GPUS") or os.environ.get("SLURM_STEP_GPUS")
    return f"the CPU, although Slurm gave GPU {given}: torch sees none" if given else "the CPU"


def _total_steps(trainer: AnswerTrainer) -> int:
    return int(trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())[-1])


def _require_space(run: Run, trainer: AnswerTrainer, config: Config, steps: int) -> None:
    """Refuse to begin what the storage has no room for: checkpoints that are not there yet, and the result."""
    there = len(runs.list_checkpoints(run.checkpoints()))
    ahead = min(config.checkpoint.keep + 1 - there, -(-steps // config.checkpoint.steps))  # rounded up
    whole = run.result(config.adapter.method).name == "model"
    disk.require_space(run.folder, space_needed(trainer.model, trainer.args.optim.value, whole, ahead))


def _log_step(run: Run, record: dict[str, Any], update: console.Update) -> None:
    files.append_jsonl(run.metrics, record)
    update(record["step"], f"lr: {record['learning_rate']:.5f}   loss: {record['loss']:.4f}")


def _train(trainer: AnswerTrainer, checkpoint: Path | None) -> None:
    """Run the Trainer; a checkpoint of the last step (killed before the result was written) only needs its weights."""
    if checkpoint:
        state = files.read_json(checkpoint / "trainer_state.json")
        if state["global_step"] >= state["max_steps"]:
            load_trainable(trainer.model, checkpoint)
            trainer.state.global_step = state["global_step"]
            return
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except torch.OutOfMemoryError as error:
        raise UserError(f"out of GPU memory: {str(error).splitlines()[0]}", _LESS_MEMORY) from None


def _publish(experiment: Experiment, run: Run, trainer: AnswerTrainer) -> None:
    """Write the result, readable by plain transformers and peft, and the DONE marker."""
    method = experiment.config.adapter.method
    result = run.result(method)
    with files.publish_folder(result) as folder:
        if method == "full":
            trainer.model.save_pretrained(folder)
            trainer.train_dataset.inputs.save(folder)
        else:
            trainer.model.save_pretrained(folder, save_embedding_layers=False)  # "auto" would ask the hub
    facts = {"step": trainer.state.global_step, "result": result.name, "threads": torch.get_num_threads()}
    files.write_json(run.done, facts)
