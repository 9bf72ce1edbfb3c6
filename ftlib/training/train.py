"""Train a run: the loops over attempts (restarts after divergence) and phases (`rounds`), resuming, and the result.

The loop over steps is in `training/trainer.py`.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from transformers import set_seed

from ftlib.config.loader import Experiment
from ftlib.config.packages import require_packages
from ftlib.config.schema import Attention, Config, Full, Lora
from ftlib.core import files, hashes, jsonl, log, signals
from ftlib.core.environment import describe_environment, package_version, version_changes
from ftlib.core.gpu import gpu_memory_bytes, gpu_name, has_bfloat16, require_kernels
from ftlib.core.lease import acquire_lease
from ftlib.core.out_of_memory import SMALLER_MODEL_HINT, oom_as_user_error
from ftlib.core.paths import Site
from ftlib.core.registry import provider
from ftlib.core.wait import wait_until
from ftlib.data.dataset import PreparedDataset, open_prepared
from ftlib.data.example import ImageFile
from ftlib.errors import TrainingDiverged, UserError
from ftlib.hub.cache import find_model, model_hashes
from ftlib.hub.offline import offline
from ftlib.memory.estimate import MemoryEstimate, build_meta_model, estimate_step
from ftlib.memory.search import choose_sharding, longest_row
from ftlib.models import sharding
from ftlib.models.adapters import count_parameters, master_weights
from ftlib.models.lengths import ImageFolder, length_cache_path
from ftlib.models.loading import device
from ftlib.models.pissa import convert_saved_adapter
from ftlib.models.registry import family_of, validate_image_columns
from ftlib.runs import events
from ftlib.runs import run as runs
from ftlib.runs.model_card import write_card
from ftlib.runs.pinning import pin_base, pin_data
from ftlib.runs.run import Run
from ftlib.training import arguments, distributed, resume
from ftlib.training.arguments import learning_rate
from ftlib.training.checkpoints import (
    checkpoint_bytes,
    load_trainable_parameters,
    pending_signal_number,
    restore_threads,
)
from ftlib.training.compiling import CompileCache, limit_recompiles, open_compile_cache
from ftlib.training.data import (
    LengthFilterResult,
    MixtureSampler,
    SupervisedDataset,
    filter_by_length,
    images_of,
    validate_images,
)
from ftlib.training.divergence import require_finite
from ftlib.training.eval_callback import CheckpointEvaluator
from ftlib.training.initialize import resolve_init_weights, trainable_model
from ftlib.training.oom import MicroBatchSplitter, auto_batch_size, record_oom
from ftlib.training.resume import ResumePoint, TrainingPhase, divergences
from ftlib.training.trainer import ResumableTrainer
from ftlib.training.workers import explain_worker_death

_LESS_MEMORY_HINT = (
    "Set batch.auto: true, or halve training.per_device_train_batch_size and double "
    "training.gradient_accumulation_steps (the run ID stays the same), or set training.gradient_checkpointing: true."
)


@dataclass(frozen=True)
class _TrainingContext:
    """Objects that all attempts and phases of a run share.

    Attributes:
        base: the folder of the base model.
        init_weights: the folder of the initial weights, if they are not the base model's.
        mesh: the ranks that share a sharded model; None: each has all of it.
        compile_cache: the compile cache of torch.compile, if there is one.
    """

    experiment: Experiment
    run: Run
    base: Path
    init_weights: Path | None
    mesh: DeviceMesh | None
    rows: SupervisedDataset
    evaluator: CheckpointEvaluator
    splitter: MicroBatchSplitter
    compile_cache: CompileCache | None

    @property
    def config(self) -> Config:
        return self.experiment.config


def train_run(experiment: Experiment, run: Run, site: Site) -> None:
    """Train a run, or resume it, as the only process that writes to it; its history records the outcome.

    Raises:
        LeaseHeld: another process is at work on the run.
        UserError, TrainingDiverged: see `run_training`.
        Preempted: a signal came, if handlers are installed (`signals.install_handlers`); the run can be resumed.
    """
    seen = events.last_activity(run)
    with signals.raise_on_signal(), acquire_lease(run.folder), events.record_outcome(run, "train", seen):
        signals.notify_host("run", str(run.folder))
        run_training(experiment, run, site)


@offline()
def run_training(experiment: Experiment, run: Run, site: Site) -> None:
    """Train a run to its result, from its last checkpoint if there is one. This process must hold the run's lease.

    Raises:
        UserError: a required package is missing, the model is not staged, the data is not prepared or has changed since
            the run started, or the storage is full.
        TrainingDiverged: all attempts that `guard.restarts` allows have diverged.
    """
    require_packages(experiment.config)
    require_kernels(torch, device().index)
    prepared = open_prepared(experiment.config, site, run)
    with distributed.process_group(experiment.config.training.get("ddp_timeout", 1800)):
        _run_training(experiment, run, prepared, site)


def _run_training(experiment: Experiment, run: Run, prepared: PreparedDataset, site: Site) -> None:
    config = experiment.config
    base = find_model(config.model, site)
    pin_base(run, model_hashes(base, site))
    if log.is_main_process():
        pin_data(run, prepared.metadata, prepared.folder.name)
        jsonl.filter_jsonl_log(run.history)
    distributed.barrier()
    attempt = next_attempt(config, run)
    point = distributed.broadcast_object(
        resume.find_resume_point(run, attempt) if log.is_main_process() else ResumePoint(TrainingPhase(attempt))
    )
    recipe = experiment.run_name(run.folder.name).recipe
    facts = phase_metadata(config, point.phase) | ({"recipe": recipe} if recipe else {})
    events.record_start(run, "train", step=point.step, **facts)
    earlier, environment = run.environments(), describe_environment()
    run.log_environment(environment)
    if point.checkpoint:
        signals.mark_resumable()
        log.info(f"resuming from the checkpoint of step {point.step}")
        if earlier and (versions := version_changes(earlier[-1], environment)):
            log.warning(f"versions have changed, so losses may differ slightly: {versions}")
    started = time.monotonic()
    context = _make_context(auto_batch_size(with_precision(experiment, run), run, site), run, prepared, base, site)
    while not _train_attempt(context, point):
        point = ResumePoint(TrainingPhase(next_attempt(config, run)))
        facts = phase_metadata(config, point.phase)
        run.log_event("restart", **facts)
        log.warning("restarting: attempt {attempt}, seed {seed}, learning rate {learning_rate:g}".format(**facts))
    run.log_event("done", step=files.read_json(run.done_marker)["step"], seconds=round(time.monotonic() - started, 1))


class _Enough(Exception):
    """Ends a training that is only measured."""


@offline()
def collect_steps(experiment: Experiment, run: Run, site: Site, count: int) -> tuple[list[dict[str, Any]], int]:
    """Train the first steps of a run's first phase, without a checkpoint; see `training/timing.py`.

    Args:
        run: a folder that nobody else uses; it gets logs only.

    Returns:
        The records of at most `count` steps (see `ResumableTrainer`), and the steps of the whole phase.

    Raises:
        UserError: as for training.
    """
    require_packages(experiment.config)
    require_kernels(torch, device().index)
    prepared = open_prepared(experiment.config, site)
    base = find_model(experiment.config.model, site)
    context = _make_context(auto_batch_size(with_precision(experiment, run), run, site), run, prepared, base, site)
    trainer = _trainer(context, TrainingPhase())
    records: list[dict[str, Any]] = []

    def keep(record: dict[str, Any]) -> None:
        records.append(record)
        if len(records) == min(count, trainer.total_steps):
            raise _Enough  # before the last step's checkpoint

    trainer.on_step = keep
    with contextlib.suppress(_Enough), oom_as_user_error(_LESS_MEMORY_HINT), explain_worker_death(), limit_recompiles():
        trainer.train()
    return records, trainer.total_steps


def _make_context(
    experiment: Experiment, run: Run, prepared: PreparedDataset, base: Path, site: Site
) -> _TrainingContext:
    config = experiment.config
    evaluator = CheckpointEvaluator(config, run, prepared, base, site)
    evaluator.validate()
    init_weights = resolve_init_weights(config, run, site)
    splitter = MicroBatchSplitter(partial(record_oom, run))
    compile_cache = open_compile_cache(run.compile_cache)
    if compile_cache:
        compile_cache.load()
    context = _TrainingContext(
        experiment,
        run,
        base,
        init_weights,
        _sharding_mesh(config, run, base, site),
        _training_dataset(config, run, prepared, base, site),
        evaluator,
        splitter,
        compile_cache,
    )
    if config.model.entry.images:
        _validate_images_once(context, prepared, site)
    return context


def _sharding_mesh(config: Config, run: Run, base: Path, site: Site) -> DeviceMesh | None:
    """Decide whether the GPUs share the model, by `parallel.shard`; log the choice, and return the ranks that share it.

    All ranks must call it; rank 0 decides.

    Raises:
        UserError: sharding is not possible with this config or this version of torch.
    """
    world, nodes = log.rank_and_world_size()[1], int(os.environ.get("SLURM_STEP_NUM_NODES", 1))
    if world == 1:
        return None

    def estimate() -> tuple[torch.nn.Module, MemoryEstimate]:
        model = build_meta_model(base, config)
        rows, _ = longest_row(config, site, base, model, run)
        checkpointing = bool(config.training.get("gradient_checkpointing"))
        return model, estimate_step(model, config, rows, config.micro_batch_size, checkpointing)

    choice = distributed.broadcast_object(
        choose_sharding(config, estimate, gpu_memory_bytes(), world, nodes) if log.is_main_process() else None
    )
    assert choice is not None
    if choice.scope == "none":
        log.debug(f"every GPU holds the whole model: {choice.reason}")
        return None
    sharding.require_torch()
    run.log_event("parallel", shard=choice.scope, gpus=world, nodes=nodes, reason=choice.reason)
    log.info(f"the model is sharded over {choice.shards} of {world} GPUs: {choice.reason}")
    return sharding.make_mesh(device(), choice.scope, nodes)


def _validate_images_once(context: _TrainingContext, prepared: PreparedDataset, site: Site) -> None:
    """Check all images of training and evaluation before the first step of a run; other ranks wait.

    Images that an earlier run has opened in the same way are not opened again while their files stay unchanged.
    """
    if log.is_main_process() and not _was_logged(context.run, "images tried"):
        rows = itertools.chain.from_iterable(prepared.rows(split) for split in ["train", *context.evaluator.splits])
        images = images_of(rows)
        record = _record_of_images(context, images, prepared.root, site)
        if record is None or not record.exists():
            validate_images(images, prepared.root, context.rows.processor, context.rows.max_pixels)
            if record:
                hashes.write_record(record, {"images": len(images)}, site)
        context.run.log_event("images tried", count=len(images))
    wait_until(lambda: _was_logged(context.run, "images tried"), poll=2)


def _record_of_images(context: _TrainingContext, images: Iterable[ImageFile], root: Path, site: Site) -> Path | None:
    """The file of the store that exists if these images have been opened as in this run; see `hashes.record_of`."""
    config = context.experiment.config
    plugin = provider("model", config.model.family, config.plugins)
    packages = {name: package_version(name) for name in ("ftlib", "transformers", "pillow", "torchvision")}
    model = [config.model.model_dump(mode="json"), plugin and plugin.identity, model_hashes(context.base, site)]
    how = ["images", sorted(images), context.rows.max_pixels, model, packages]
    return hashes.record_of(root, sorted({name for name, *_ in images}), how, site)


def _train_attempt(context: _TrainingContext, point: ResumePoint) -> bool:
    """Train an attempt from a resume point through its phases and publish the result; return False if it diverged."""
    point = distributed.broadcast_object(_discard_after(context, point) if log.is_main_process() else point)
    warn_world_size_changed(point)
    while True:
        trainer = _trainer(context, point.phase)
        try:
            point = _train_phase(context, trainer, point)
            over = not should_continue(context.evaluator, trainer, point)
            if over:
                _load_result_weights(context, trainer)
                require_finite(trainer.model)
        except TrainingDiverged as error:
            if log.is_main_process():
                _log_divergence(context, trainer, str(error))
            distributed.barrier()
            return False
        if over:
            weights = _gather_result(context, trainer)
            if log.is_main_process():
                _publish(context, trainer, point, weights)
            distributed.barrier()
            return True
        point = point.next_phase()
        del trainer


def _discard_after(context: _TrainingContext, point: ResumePoint) -> ResumePoint:
    """Remove everything after a resume point; if the best checkpoint is lost, return the start of the attempt."""
    attempt = point.phase.attempt
    resume.discard_after(context.run, point)
    best = context.evaluator.best_checkpoint(attempt)
    if best and not files.is_complete(runs.checkpoint_folder(context.run.checkpoint_root(attempt), best["step"]), True):
        log.warning(
            f"the best checkpoint, of step {best['step']}, is damaged or missing; attempt {attempt} starts again"
        )
        point = ResumePoint(TrainingPhase(attempt))
        resume.discard_after(context.run, point)
    return point


def _log_divergence(context: _TrainingContext, trainer: ResumableTrainer, reason: str) -> None:
    """Log the divergence and delete the attempt's checkpoints. The event ends the attempt: no start resumes it."""
    phase = trainer.phase
    step = phase.offset + trainer.state.global_step
    context.run.log_event("diverged", step=step, **phase_metadata(context.config, phase), reason=reason)
    log.warning(f"training diverged at step {step} of attempt {phase.attempt}: {reason}")
    shutil.rmtree(trainer.checkpoints, ignore_errors=True)


def _trainer(context: _TrainingContext, phase: TrainingPhase) -> ResumableTrainer:
    config = context.config
    gc.collect()  # the model of the previous phase
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    training_arguments = arguments.build_training_arguments(config, context.run.folder, phase)
    set_seed(training_arguments.seed)
    whole = context.mesh is None or config.whole_load_reason is not None
    # With PiSSA ranks communicate while they load.
    turns = context.mesh is not None and whole and not (isinstance(config.adapter, Lora) and config.adapter.pissa)
    checkpoints = context.run.checkpoint_root(phase.attempt)
    with oom_as_user_error(), distributed.in_turns(turns):
        mesh = None if whole else context.mesh
        model = trainable_model(config, context.run, context.base, context.init_weights, mesh)
        trained, total = count_parameters(model)
        log.info(f"{trained:,} of {total:,} parameters are trained ({trained / total:.3%}) on {_describe_device()}")
        trainer = ResumableTrainer(config, model, context.rows, training_arguments, checkpoints, phase, context.mesh)
    context.splitter.reset()
    trainer.splitter = context.splitter
    return trainer


def _training_dataset(
    config: Config, run: Run, prepared: PreparedDataset, folder: Path, site: Site
) -> SupervisedDataset:
    """Return the training rows; rows that are too long are reported and logged."""
    processor = family_of(config.model).load_processor(folder, config)
    if processor.warning:
        log.warning(processor.warning)
    examples = prepared.rows("train")
    validate_image_columns(config.model, examples)
    cache = length_cache_path(prepared, "train", config, folder, site)
    templates, max_pixels = config.data.templates, config.data.max_pixels
    images = ImageFolder(prepared.root, max_pixels)
    filtered = filter_by_length(examples, templates, processor, config.model.too_long, cache=cache, images=images)
    if filtered.summary:
        log.warning(filtered.summary)
        _log_length_filter(run, filtered)
    sampler = MixtureSampler(prepared.counts("train", filtered.indices), config.data.weights, config.seed)
    if config.training.get("dataloader_drop_last") and len(sampler) < config.effective_batch_size:
        problem = f"{len(sampler)} training rows do not fill one batch of {config.effective_batch_size}"
        raise UserError(f"training.dataloader_drop_last: {problem}")
    return SupervisedDataset(
        examples, prepared.root, templates, processor, filtered.indices, sampler, max_pixels, cache
    )


def _log_length_filter(run: Run, filtered: LengthFilterResult) -> None:
    """Log the too long rows, once per run: they stay the same."""
    if not _was_logged(run, "too long"):
        facts = {name: getattr(filtered, name) for name in ("limit", "dropped", "truncated", "unanswered")}
        run.log_event("too long", **facts, rows=list(filtered.messages))


def _was_logged(run: Run, event: str) -> bool:
    return any(line["event"] == event for line in jsonl.read_jsonl_log(run.history))


def _describe_device() -> str:
    """Return the device for messages, with a hint if torch does not see the GPU that Slurm allocated."""
    if name := gpu_name():
        return name
    given = os.environ.get("SLURM_JOB_GPUS") or os.environ.get("SLURM_STEP_GPUS")
    return f"the CPU (Slurm allocated GPU {given}, but torch cannot see it)" if given else "the CPU"


def _require_space(context: _TrainingContext, trainer: ResumableTrainer, steps: int) -> None:
    """Check that there is space for the checkpoints that are still to be written and for the result."""
    config = context.config
    kept = config.checkpoint.keep + bool(config.checkpoint.best) + 1  # the oldest is removed after a new one is written
    missing = kept - len(runs.list_checkpoints(trainer.checkpoints))
    ahead = min(missing, -(-steps // config.checkpoint.steps))  # rounded up
    whole = context.run.result_folder(config.adapter.method).name == "model"
    saved = getattr(torch, config.model.dtype) if isinstance(config.adapter, Full) else None
    size = partial(checkpoint_bytes, trainer.model, trainer.args.optim.value, whole, saved=saved)
    # The result of sharded weights is gathered in a file before it is written.
    files.require_space(context.run.folder, size(ahead) + (size(0) if sharding.trains_shards(trainer.model) else 0))


def _log_step(run: Run, record: dict[str, Any], update: log.ProgressUpdate) -> None:
    if log.is_main_process():
        jsonl.append_jsonl(run.metrics, record)
    update(record["step"], f"lr: {record['learning_rate']:.5f}   loss: {record['loss']:.4f}")


def _train_phase(context: _TrainingContext, trainer: ResumableTrainer, point: ResumePoint) -> ResumePoint:
    """Train a phase to its end, from a checkpoint in it or from the previous phase's weights; return its last point."""
    if point.checkpoint:
        restore_threads(point.checkpoint)
        load_trainable_parameters(trainer.model, point.checkpoint)
    if point.checkpoint and point.in_phase and _phase_finished(context, trainer, point):
        return point
    for line in distributed.broadcast_object(resume.logged_metrics(context.run, point.phase.attempt)):
        if line["round"] == point.phase.round and "loss" in line:
            trainer.detector.check(line["step"] - point.phase.offset, line["loss"], skipped=line.get("skipped", False))
    trainer.on_checkpoint = lambda reached: _on_checkpoint(context, trainer, reached)
    total = point.phase.offset + trainer.total_steps
    if log.is_main_process():
        _require_space(context, trainer, total - point.step)
    tokens = context.rows.mean_tokens()
    context.run.log_event("training", total=total, rows=context.config.effective_batch_size, tokens=tokens)
    with log.progress("step", total, start=point.step) as update, signals.defer_signals():
        trainer.on_step = lambda record: _log_step(context.run, record, update)
        oom_hint = SMALLER_MODEL_HINT if context.config.batch.auto else _LESS_MEMORY_HINT
        with oom_as_user_error(oom_hint), explain_worker_death(), limit_recompiles():
            trainer.train(resume_from_checkpoint=str(point.checkpoint) if point.in_phase else None)
    return trainer.last_point


def _phase_finished(context: _TrainingContext, trainer: ResumableTrainer, point: ResumePoint) -> bool:
    """Return whether a phase ended at this checkpoint; runs an evaluation that was due there and is missing."""
    trainer.state.global_step = point.step - point.phase.offset
    last = trainer.state.global_step >= trainer.total_steps
    return context.evaluator.should_stop_early(trainer, point, last) or last


def _on_checkpoint(context: _TrainingContext, trainer: ResumableTrainer, point: ResumePoint) -> bool:
    """Rotate checkpoints, evaluate if due, and return whether the phase ends here. After a signal, only rotate."""
    best = context.evaluator.best_checkpoint(point.phase.attempt)
    if log.is_main_process():
        runs.rotate_checkpoints(trainer.checkpoints, context.config.checkpoint.keep, best["step"] if best else None)
        if context.compile_cache:
            context.compile_cache.save()
    if any(distributed.all_reduce_max(pending_signal_number())):
        return False
    return context.evaluator.should_stop_early(trainer, point, trainer.state.global_step >= trainer.state.max_steps)


def _load_result_weights(context: _TrainingContext, trainer: ResumableTrainer) -> None:
    """Load the weights that are published: the best checkpoint's with `checkpoint.best`, else the last ones.

    Master weights of `full` and of `modules_to_save` are rounded to the model's dtype; those of `attention` are rounded
    when they are loaded, sharded ones when they are gathered.
    """
    if best := distributed.broadcast_object(context.evaluator.best_checkpoint(trainer.phase.attempt)):
        load_trainable_parameters(trainer.model, runs.checkpoint_folder(trainer.checkpoints, best["step"]))
    if not isinstance(context.config.adapter, Attention) and not sharding.trains_shards(trainer.model):
        for parameter in master_weights(trainer.model, context.config.adapter):
            parameter.data = parameter.data.to(getattr(torch, context.config.model.dtype))


def _gather_result(context: _TrainingContext, trainer: ResumableTrainer) -> dict[str, Tensor] | None:
    """Return the whole weights of a sharded model for rank 0 to publish, in a file that is mapped into memory.

    None if `save_pretrained` needs none.

    All ranks must call it.
    """
    if not sharding.trains_shards(trainer.model):
        return None
    config = context.config
    masters = isinstance(config.adapter, Full) and config.adapter.master_weights
    dtype = getattr(torch, config.model.dtype) if masters else None
    file = context.run.folder / "gathered.safetensors" if log.is_main_process() else None
    with files.storage_errors(context.run.folder):
        return sharding.gather_weights(trainer.model, file, dtype)


def _publish(
    context: _TrainingContext, trainer: ResumableTrainer, point: ResumePoint, weights: dict[str, Tensor] | None
) -> None:
    """Write the result, which transformers and peft can load, and the DONE marker.

    Args:
        weights: from `_gather_result`.
    """
    method = context.config.adapter.method
    result = context.run.result_folder(method)
    facts = {"step": point.step, "result": result.name, "threads": torch.get_num_threads()}
    if best := context.evaluator.best_checkpoint(point.phase.attempt):
        facts["best"] = {name: best[name] for name in ("step", "metric", "value")}
    with files.atomic_directory(result) as folder:
        if result.name == "model":
            trainer.model.save_pretrained(folder, state_dict=weights)
            trainer.train_dataset.processor.save(folder)
        else:
            trainer.model.save_pretrained(folder, save_embedding_layers=False)  # "auto" would access the hub
            if isinstance(context.config.adapter, Lora) and context.config.adapter.pissa:
                convert_saved_adapter(folder, context.run.initial_factors)
            if context.config.model.resize != "processor":
                trainer.train_dataset.processor.save_image_processor(folder)
        (folder / "README.md").unlink(missing_ok=True)  # written by peft
    write_card(context.run, context.config)
    files.write_json(context.run.done_marker, facts)
    shutil.rmtree(context.run.initial_factors, ignore_errors=True)
    if context.compile_cache:
        context.compile_cache.clear()


# Decisions from the event log: which attempt is next, and whether another round follows.


def phase_metadata(config: Config, phase: TrainingPhase) -> dict[str, Any]:
    """Return the fields that describe a phase in the event log."""
    facts = {"seed": phase.seed(config.seed), "learning_rate": learning_rate(config, phase)}
    return {"attempt": phase.attempt, "round": phase.round, **facts}


def next_attempt(config: Config, run: Run) -> int:
    """Return the number of the first attempt that has not diverged.

    Raises:
        TrainingDiverged: `guard.restarts` allows no further attempt.
    """
    failed = distributed.broadcast_object(divergences(run))  # all ranks must agree
    if len(failed) <= config.guard.restarts:
        return len(failed)
    tried = [
        f"  attempt {line['attempt']} (seed {line['seed']}, learning rate {line['learning_rate']:g}): "
        f"step {line['step']}: {line['reason']}"
        for line in failed
    ]
    remedy = "Try a lower learning rate, a longer warm-up or a larger effective batch."
    raise TrainingDiverged("\n".join(["training diverged in every attempt; no result was written.", *tried, remedy]))


def should_continue(evaluator: CheckpointEvaluator, trainer: ResumableTrainer, point: ResumePoint) -> bool:
    """Return whether another round follows; evaluates the convergence criterion and logs the end of the round."""
    config, run, number = evaluator.config, evaluator.run, point.phase.round
    rounds = config.rounds
    if not rounds:
        return False
    follows = number + 1 < len(rounds)
    until = rounds[number + follows].until
    found: dict[str, Any] = {}
    if until:
        value = evaluator.value(trainer, point, until.split, until.metric)
        found = {"split": until.split, "metric": until.metric, "converged": until.is_reached(value), "value": value}
    logged = [line for line in jsonl.read_jsonl_log(run.history) if line["event"] == "round"]
    if (point.phase.attempt, number) not in [(line["attempt"], line["round"]) for line in logged]:
        run.log_event("round", step=point.step, **phase_metadata(config, point.phase), **found)
    return follows and not found.get("converged", False)


def warn_world_size_changed(point: ResumePoint) -> None:
    """Warn if the checkpoint was written by a different number of processes."""
    written_by = len(list(point.checkpoint.glob("rng_state*"))) if point.checkpoint else 0
    world_size = log.rank_and_world_size()[1]
    if point.checkpoint and written_by != world_size:
        log.warning(
            f"the checkpoint was written by {written_by} processes, now there are {world_size}: the batches are"
        )
        log.warning("the same, but RNG states are not restored, so dropout masks differ")


# `training.precision: auto`: bf16 or fp16, chosen by the GPU of the run's first start.


def with_precision(experiment: Experiment, run: Run) -> Experiment:
    """Replace `training.precision: auto` by `bf16` or `fp16` and log the choice.

    All ranks must call it; rank 0's GPU decides.

    Raises:
        UserError: there is no GPU, the run started in the other precision, or model.dtype needs another one.
    """
    config = experiment.config
    if "precision" not in config.training:
        return experiment
    mode = distributed.broadcast_object(_mode(config, run) if log.is_main_process() else "")
    training = {name: value for name, value in config.training.items() if name != "precision"}
    return replace(experiment, config=config.model_copy(update={"training": {**training, mode: True}}))


def _mode(config: Config, run: Run) -> str:
    name = gpu_name()
    if name is None:
        raise UserError("training.precision: auto needs a GPU, and torch sees none", "Remove it to train on a CPU.")
    mode = "bf16" if has_bfloat16() else "fp16"
    noted = [line for line in jsonl.read_jsonl_log(run.history) if line["event"] == "precision"]
    if noted and noted[0]["mode"] != mode:
        began = f"this run started in {noted[0]['mode']} on {noted[0]['gpu']}"
        remedy = f"Resume it on such a GPU (job.gpu_type), or set training.{mode}: true, which is a different run."
        raise UserError(f"training.precision: {began}, but {name} would resume in {mode}", remedy)
    if mode == "fp16" and config.model.dtype == "bfloat16":
        problem = f"model.dtype: bfloat16 weights need bf16, but training.precision: auto is fp16 on {name}"
        raise UserError(problem, "Set model.dtype: float32, which works with both, or request an Ampere or newer GPU.")
    if not noted:
        run.log_event("precision", mode=mode, gpu=name)
    scaled = ", with loss scaling" if mode == "fp16" else ""
    log.info(f"training.precision: {mode} on {name}{scaled}")
    return mode
