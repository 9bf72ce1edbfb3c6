"""Train one run from its config to its result, going on from the last checkpoint if there is one."""

from __future__ import annotations

import gc
import itertools
import os
import shutil
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from ftlib import console, disk, files, history, preemption, runs
from ftlib.config import Config, Full
from ftlib.config_file import Experiment
from ftlib.data.prepared import Prepared, open_prepared
from ftlib.environment import describe_environment, other_versions
from ftlib.errors import Diverged, UserError
from ftlib.gpu_architectures import require_kernels
from ftlib.hub import find_model, model_hashes
from ftlib.models.adapters import count_parameters, master_weights
from ftlib.models.families import FAMILIES, check_images
from ftlib.models.loading import device
from ftlib.out_of_memory import SMALLER_MODEL, enough_memory
from ftlib.packages import require_packages
from ftlib.pinning import pin_base, pin_data
from ftlib.reporting.card import write_card
from ftlib.runs import Run
from ftlib.site import Site
from ftlib.training import arguments, legs, ranks
from ftlib.training.attempts import facts_of, goes_on, next_attempt, tell_ranks
from ftlib.training.batching import Draw, TrainingRows
from ftlib.training.checkpoints import load_trainable, restore_threads, signal_number, space_needed
from ftlib.training.compile_cache import KeptPrograms, kept_programs
from ftlib.training.compiling import few_programs
from ftlib.training.examiner import Examiner
from ftlib.training.fitting import Fitted, fit_rows, try_images
from ftlib.training.guards import require_finite
from ftlib.training.halving import Halving
from ftlib.training.legs import Leg, Place
from ftlib.training.precision import with_precision
from ftlib.training.sizing import note_halved, sized_to_gpu
from ftlib.training.trainer import AnswerTrainer
from ftlib.training.warm import find_start, trainable_model
from ftlib.training.workers import watched_workers

_LESS_MEMORY = (
    "Set batch.auto: true, or halve training.per_device_train_batch_size and double "
    "training.gradient_accumulation_steps (it stays the same run), or set training.gradient_checkpointing: true."
)


@dataclass(frozen=True)
class _Job:
    """What is the same in all attempts and rounds of a run.

    Attributes:
        base: the folder of the base model.
        start: the folder whose weights training begins with, if not the base's.
        programs: of torch.compile; None: they are not kept.
    """

    experiment: Experiment
    run: Run
    base: Path
    start: Path | None
    rows: TrainingRows
    examiner: Examiner
    halving: Halving
    programs: KeptPrograms | None

    @property
    def config(self) -> Config:
        return self.experiment.config


def fit(experiment: Experiment, run: Run, site: Site) -> None:
    """Train a run whose folder this process owns.

    Raises:
        UserError: a package that the config asks for is missing, nothing staged or prepared, data changed under the
            run, storage full.
        Diverged: so did every attempt that `guard.restarts` allows.
    """
    require_packages(experiment.config)
    require_kernels(torch, device().index)
    prepared = open_prepared(experiment.config, site, run)
    with ranks.joined(experiment.config.training.get("ddp_timeout", 1800)):
        _fit(experiment, run, prepared, site)


def _fit(experiment: Experiment, run: Run, prepared: Prepared, site: Site) -> None:
    config = experiment.config
    base = find_model(config.model, site)
    pin_base(run, model_hashes(base, site))
    if console.speaks():
        pin_data(run, prepared.facts, prepared.folder.name)
        files.cut_jsonl_log(run.history)
    ranks.wait()
    attempt = next_attempt(config, run)
    place = ranks.share(legs.find_place(run, attempt) if console.speaks() else Place(Leg(attempt)))
    recipe = experiment.named(run.folder.name).recipe
    facts = facts_of(config, place.leg) | ({"recipe": recipe} if recipe else {})
    history.begin(run, "train", step=place.step, **facts)
    earlier, environment = run.environments(), describe_environment()
    run.note_environment(environment)
    if place.checkpoint:
        console.say(f"going on from the checkpoint of step {place.step}")
        if earlier and (versions := other_versions(earlier[-1], environment)):
            console.say(f"with other versions than before, so that losses may differ a little: {versions}")
    started = time.monotonic()
    job = _job(sized_to_gpu(with_precision(experiment, run), run, site), run, prepared, base, site)
    while not _attempt(job, place):
        place = Place(Leg(next_attempt(config, run)))
        facts = facts_of(config, place.leg)
        run.note("restart", **facts)
        console.say("starting again: attempt {attempt}, seed {seed}, learning rate {learning_rate:g}".format(**facts))
    run.note("done", step=files.read_json(run.done)["step"], seconds=round(time.monotonic() - started, 1))


def _job(experiment: Experiment, run: Run, prepared: Prepared, base: Path, site: Site) -> _Job:
    config = experiment.config
    examiner = Examiner(config, run, prepared, base)
    examiner.require()
    start = find_start(config, run, site)
    halving = Halving(partial(note_halved, run))
    programs = kept_programs(run.programs)
    if programs:
        programs.load()
    job = _Job(experiment, run, base, start, _rows(config, run, prepared, base), examiner, halving, programs)
    if FAMILIES[config.model.family].images:
        _try_images(job, prepared)
    return job


def _try_images(job: _Job, prepared: Prepared) -> None:
    """Once in a run's life, before its first step: all images that it will look at. One process does, the rest wait."""
    while not _noted(job.run, "images tried"):
        if console.speaks():
            _try_all_images(job, prepared)
        else:
            time.sleep(2)


def _try_all_images(job: _Job, prepared: Prepared) -> None:
    rows = itertools.chain.from_iterable(prepared.rows(split) for split in ["train", *job.examiner.splits])
    job.run.note("images tried", count=try_images(rows, prepared.root, job.rows.inputs))


def _attempt(job: _Job, place: Place) -> bool:
    """Train an attempt from a place in it through its rounds and publish the result; False if it diverged."""
    place = ranks.share(_cut_off(job, place) if console.speaks() else place)
    tell_ranks(place)
    while True:
        trainer = _trainer(job, place.leg)
        try:
            place = _train(job, trainer, place)
            over = not goes_on(job.examiner, trainer, place)
            if over:
                _take_result(job, trainer)
                require_finite(trainer.model)
        except Diverged as error:
            if console.speaks():
                _note_divergence(job, trainer, str(error))
            ranks.wait()
            return False
        if over:
            if console.speaks():
                _publish(job, trainer, place)
            ranks.wait()
            return True
        place = place.next_round()
        del trainer


def _cut_off(job: _Job, place: Place) -> Place:
    """Remove what lies beyond a place; an attempt without its best checkpoint begins anew."""
    attempt = place.leg.attempt
    legs.cut_off(job.run, place)
    best = job.examiner.best(attempt)
    if best and not files.is_complete(runs.checkpoint_folder(job.run.checkpoints(attempt), best["step"]), True):
        console.say(f"the best checkpoint, of step {best['step']}, is damaged or gone; attempt {attempt} begins anew")
        place = Place(Leg(attempt))
        legs.cut_off(job.run, place)
    return place


def _note_divergence(job: _Job, trainer: AnswerTrainer, reason: str) -> None:
    """The line in the history decides; from then on nothing can go on from this attempt's checkpoints."""
    leg = trainer.leg
    step = leg.offset + trainer.state.global_step
    job.run.note("diverged", step=step, **facts_of(job.config, leg), reason=reason)
    console.say(f"training diverged at step {step} of attempt {leg.attempt}: {reason}")
    shutil.rmtree(trainer.checkpoints, ignore_errors=True)


def _trainer(job: _Job, leg: Leg) -> AnswerTrainer:
    config = job.config
    gc.collect()  # the model of the leg before this one
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    training_arguments = arguments.build(config, job.run.folder, leg)
    set_seed(training_arguments.seed)
    with enough_memory():
        model = trainable_model(config, job.base, job.start)
        trained, total = count_parameters(model)
        console.say(f"{trained:,} of {total:,} parameters train ({trained / total:.3%}) on {_device()}")
        trainer = AnswerTrainer(config, model, job.rows, training_arguments, job.run.checkpoints(leg.attempt), leg)
    job.halving.begin_leg()
    trainer.halving = job.halving
    return trainer


def _rows(config: Config, run: Run, prepared: Prepared, folder: Path) -> TrainingRows:
    """The rows to learn from; what becomes of those that are too long is said and noted."""
    inputs = FAMILIES[config.model.family].load_inputs(folder, config)
    if inputs.remark:
        console.say(inputs.remark)
    examples = prepared.rows("train")
    check_images(config.model.family, examples)
    fitted = fit_rows(examples, config.data.templates, inputs, config.model.too_long)
    if fitted.sentence:
        console.say(fitted.sentence)
        _note_too_long(run, fitted)
    draw = Draw(prepared.counts("train", fitted.kept), config.data.weights, config.seed)
    if config.training.get("dataloader_drop_last") and len(draw) < config.effective_batch:
        problem = f"{len(draw)} training rows do not fill one batch of {config.effective_batch}"
        raise UserError(f"training.dataloader_drop_last: {problem}")
    return TrainingRows(examples, prepared.root, config.data.templates, inputs, fitted.kept, draw)


def _note_too_long(run: Run, fitted: Fitted) -> None:
    """Once in a run's life: its rows stay the same."""
    if not _noted(run, "too long"):
        facts = {name: getattr(fitted, name) for name in ("limit", "dropped", "truncated", "unanswered")}
        run.note("too long", **facts, rows=list(fitted.named))


def _noted(run: Run, event: str) -> bool:
    return any(line["event"] == event for line in files.read_jsonl_log(run.history))


def _device() -> str:
    """What training runs on, in words; a GPU that Slurm gave and torch does not see is worth a word."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    given = os.environ.get("SLURM_JOB_GPUS") or os.environ.get("SLURM_STEP_GPUS")
    return f"the CPU, although Slurm gave GPU {given}: torch sees none" if given else "the CPU"


def _require_space(job: _Job, trainer: AnswerTrainer, steps: int) -> None:
    """Refuse to begin what the storage has no room for: checkpoints that are not there yet, and the result."""
    config = job.config
    kept = config.checkpoint.keep + bool(config.checkpoint.best) + 1  # a new one is whole before an old one goes
    missing = kept - len(runs.list_checkpoints(trainer.checkpoints))
    ahead = min(missing, -(-steps // config.checkpoint.steps))  # rounded up
    whole = job.run.result(config.adapter.method).name == "model"
    saved = getattr(torch, config.model.dtype) if isinstance(config.adapter, Full) else None
    disk.require_space(job.run.folder, space_needed(trainer.model, trainer.args.optim.value, whole, ahead, saved))


def _log_step(run: Run, record: dict[str, Any], update: console.Update) -> None:
    if console.speaks():
        files.append_jsonl(run.metrics, record)
    update(record["step"], f"lr: {record['learning_rate']:.5f}   loss: {record['loss']:.4f}")


def _train(job: _Job, trainer: AnswerTrainer, place: Place) -> Place:
    """Train a leg from a place in it, or from the weights of the round before it, to its end; returns that."""
    if place.checkpoint:
        restore_threads(place.checkpoint)
        load_trainable(trainer.model, place.checkpoint)
    if place.checkpoint and place.begun and _is_over(job, trainer, place):
        return place
    for line in ranks.share(legs.logged(job.run, place.leg.attempt)):
        if line["round"] == place.leg.round and "loss" in line:
            trainer.watch.fault(line["step"] - place.leg.offset, line["loss"], skipped=line.get("skipped", False))
    trainer.on_checkpoint = lambda reached: _on_checkpoint(job, trainer, reached)
    total = place.leg.offset + trainer.total_steps
    if console.speaks():
        _require_space(job, trainer, total - place.step)
    job.run.note("training", total=total)
    with console.progress("step", total, start=place.step) as update, preemption.graceful():
        trainer.on_step = lambda record: _log_step(job.run, record, update)
        enough = enough_memory(SMALLER_MODEL if job.config.batch.auto else _LESS_MEMORY)
        with enough, watched_workers(), few_programs():
            trainer.train(resume_from_checkpoint=str(place.checkpoint) if place.begun else None)
    return trainer.reached


def _is_over(job: _Job, trainer: AnswerTrainer, place: Place) -> bool:
    """Whether the checkpoint that a leg goes on from is its last; what was to be asked there and was not is asked."""
    trainer.state.global_step = place.step - place.leg.offset
    last = trainer.state.global_step >= trainer.total_steps
    return job.examiner.round_over(trainer, place, last) or last


def _on_checkpoint(job: _Job, trainer: AnswerTrainer, place: Place) -> bool:
    """Whether the round is to end at a checkpoint; after a signal everything else is left to the next start."""
    best = job.examiner.best(place.leg.attempt)
    if console.speaks():
        runs.rotate_checkpoints(trainer.checkpoints, job.config.checkpoint.keep, best["step"] if best else None)
        if job.programs:
            job.programs.save()
    if any(ranks.highest(signal_number())):
        return False
    return job.examiner.round_over(trainer, place, trainer.state.global_step >= trainer.state.max_steps)


def _take_result(job: _Job, trainer: AnswerTrainer) -> None:
    """Let the model have the weights that are published: the best checkpoint's, if a best one is wanted.

    Master weights of `full` are rounded to the model's type, as those of `attention` are when they are loaded.
    """
    if best := ranks.share(job.examiner.best(trainer.leg.attempt)):
        load_trainable(trainer.model, runs.checkpoint_folder(trainer.checkpoints, best["step"]))
    if isinstance(job.config.adapter, Full):
        for parameter in master_weights(trainer.model, job.config.adapter):
            parameter.data = parameter.data.to(getattr(torch, job.config.model.dtype))


def _publish(job: _Job, trainer: AnswerTrainer, place: Place) -> None:
    """Write the result, readable by plain transformers and peft, and the DONE marker."""
    method = job.config.adapter.method
    result = job.run.result(method)
    facts = {"step": place.step, "result": result.name, "threads": torch.get_num_threads()}
    if best := job.examiner.best(place.leg.attempt):
        facts["best"] = {name: best[name] for name in ("step", "metric", "value")}
    with files.publish_folder(result) as folder:
        if result.name == "model":
            trainer.model.save_pretrained(folder)
            trainer.train_dataset.inputs.save(folder)
        else:
            trainer.model.save_pretrained(folder, save_embedding_layers=False)  # "auto" would ask the hub
        (folder / "README.md").unlink(missing_ok=True)  # peft's
    write_card(job.run, job.config)
    files.write_json(job.run.done, facts)
    if job.programs:
        job.programs.forget()
