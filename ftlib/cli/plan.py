"""Estimate the GPU memory of a config by part, whether it fits, and the largest micro-batch that does.

Needs neither weights nor a GPU: a training step is simulated with the model's shapes, so config.json is enough. Row
lengths come from the prepared data; without it, assumed lengths are used and reported. The table is printed to stderr,
--json to stdout. Exit code 1 if the config does not fit.

With several GPUs (job.gpus on each of job.nodes, or --gpus and --nodes) the table shows what each of them needs if it
holds the whole model and if they share it (parallel.shard); the memory of a node while the model is loaded, and size
and time of a checkpoint.

With --time, some steps are trained on this machine's device instead, with the staged weights and the prepared data:
rows per second, hours, GPU-hours, and the requeues that job.time means. Nothing is saved.
"""

from __future__ import annotations

import importlib
import shlex
from dataclasses import asdict
from typing import TYPE_CHECKING

from ftlib import api
from ftlib.cli import arguments
from ftlib.core import imports, log
from ftlib.core.paths import find_site
from ftlib.core.text import format_gib
from ftlib.errors import EXIT_FAILURE, UserError
from ftlib.models.libraries import hide_unused_packages
from ftlib.slurm.jobspec import minutes_of

if TYPE_CHECKING:
    from ftlib.config.schema import Config
    from ftlib.memory.estimate import MemoryEstimate
    from ftlib.memory.search import MemoryPlan
    from ftlib.training.timing import StepTiming


def main(argv: list[str]) -> int:
    """`ftlib plan CONFIG [KEY=VALUE…] [--gpus N] [--nodes M] [--gpu 12GiB | --time] [--json]`"""
    command = arguments.make_parser("plan", __doc__)
    arguments.add_config_arguments(command)
    command.add_argument("--gpu", metavar="SIZE", help="memory of the GPU, such as 12GiB; default: this machine's")
    command.add_argument("--gpus", type=int, metavar="N", help="GPUs of each node, as job.gpus")
    command.add_argument("--nodes", type=int, metavar="M", help="nodes, as job.nodes")
    command.add_argument("--json", action="store_true", help="print the numbers to stdout, sizes in bytes")
    command.add_argument("--time", action="store_true", help="measure the time of a step on this machine's device")
    parsed = command.parse_intermixed_args(argv)
    for name in ("gpus", "nodes"):
        if (count := getattr(parsed, name)) is not None:
            parsed.overrides = [*parsed.overrides, f"job.{name}={count}"]
    if parsed.time and parsed.gpu:
        raise UserError("--time measures on this machine's device; --gpu is for the estimate of memory")
    site = find_site()
    experiment = arguments.load_from_arguments(parsed, site)  # once: it may be a pipe
    hide_unused_packages(experiment.config, site)
    with imports.quick_imports():
        importlib.import_module("ftlib.training.timing" if parsed.time else "ftlib.memory.search")  # for api
    if parsed.time:
        timing = api.time_steps(experiment)
        _show_timing(timing, experiment.config, ["plan", str(parsed.config), *parsed.overrides, "--time"])
        if parsed.json:
            log.print_json(timing.to_json())
        return 0
    plan = api.plan(experiment, gpu=parsed.gpu)
    _show(plan)
    if parsed.json:
        log.print_json(plan.to_json())
    return EXIT_FAILURE if plan.fits is False else 0


def _show(plan: MemoryPlan) -> None:
    from ftlib.memory.estimate import is_known_optimizer

    optimizer = str(plan.config.training.get("optim", "adamw_torch_fused"))
    origin = "the longest of the prepared data" if plan.found else "assumed; `ftlib prepare` makes them exact"
    log.info(f"rows of {plan.rows.tokens:,} tokens, {plan.rows.answer:,} of them answer ({origin})")
    log.info(f"forward and backward pass of such a row: {plan.flops / 1e12:.3g} TFLOP")
    if plan.config.job.world_size > 1:
        gpus = f"{plan.config.job.world_size} GPUs"
        shared = f"the model is sharded over {plan.sharding.shards} of {gpus}"
        held = f"each of {gpus} holds the whole model"
        log.info(f"{held if plan.sharding.shards == 1 else shared}: {plan.sharding.reason}")
        if plan.evaluation is not None:
            gathered = "evaluation during training gathers the whole model on each GPU"
            log.info(f"{gathered}: {format_gib(plan.evaluation)} without activations")
        reason = plan.config.whole_load_reason if plan.sharding.shards > 1 else None
        why = f", all of it in turns ({reason})" if reason else ""
        log.info(f"a node needs {format_gib(plan.host.loading)} of its own memory to load the model{why}")
        if plan.host.gathering:
            log.info(f"the first node needs {format_gib(plan.host.gathering)} to write a checkpoint or the result")
        took = f"about {max(1, round(plan.host.write_seconds)):,} s to write at 1 GiB/s (assumed)"
        log.info(f"a checkpoint takes {format_gib(plan.host.checkpoint)}, {took}")
    log.info(f"micro-batch {plan.config.micro_batch_size} of {plan.config.effective_batch_size} rows a step, in GiB:\n")
    log.result(_table(plan) + "\n")
    if not is_known_optimizer(optimizer):
        log.warning(f"training.optim: {optimizer}: assuming a state as large as Adam's")
    _show_loading(plan)
    if plan.capacity is None:
        log.info("no GPU here: set its memory, as in --gpu 24GiB, to see what fits")
        return
    verdict = "fits" if plan.fits else "does not fit"
    most = max(plan.estimate.total, plan.evaluation or 0)
    log.result(f"as configured it needs {format_gib(most)}: {verdict} into {format_gib(plan.capacity)}")
    if plan.evaluation is not None and plan.evaluation > plan.capacity:
        remedy = "remove evaluation.loss, checkpoint.best and rounds.until; ftlib evaluate scores the result"
        log.warning(f"the whole model does not fit for evaluation during training: {remedy}")
    for checkpointing in (False, True):
        log.result(_largest_batch_size(plan, checkpointing))


def _table(plan: MemoryPlan) -> str:
    """Parts of the memory of each GPU, with and without gradient checkpointing, and for each way to share the model."""
    several = plan.config.job.world_size > 1
    columns: dict[str, MemoryEstimate] = {}
    for shards, needs in plan.scopes.items():
        held = ("whole" if shards == 1 else f"over {shards}") + ", " if several else ""
        columns |= {f"{held}without": needs[False], f"{held}with gradient checkpointing": needs[True]}
    if several:
        columns = {name.replace("with gradient", "with"): need for name, need in columns.items()}
    figures = [asdict(need) | {"together": need.total} for need in columns.values()]
    rows = [[part, *(f"{column[part] / 2**30:.2f}" for column in figures)] for part in figures[0]]
    return log.format_table(["part", *columns], rows)


def _show_loading(plan: MemoryPlan) -> None:
    from ftlib.memory.loading import FAST_GPU_FLOPS

    if plan.loading is None:
        return
    cost = f"{1000 * plan.loading.row_seconds:.1f} ms of CPU time a row (measured here, {plan.loading.timed} rows)"
    speed = f"{plan.loading.rows_per_second:.1f} rows/s of a GPU at {FAST_GPU_FLOPS / 1e12:.0f} TFLOP/s (assumed: H100)"
    cores = plan.loading.cores
    log.info(f"data loading: {cost}; the {speed} need {cores} {'core' if cores == 1 else 'cores'} for each GPU")
    job, chosen = plan.config.job, plan.config.training.get("dataloader_num_workers")
    workers = job.cpus - 1 if chosen is None else chosen
    if job.gpus and workers < cores:
        remedy = f"Set job.cpus: {cores + 1}" if chosen is None else f"Set training.dataloader_num_workers: {cores}"
        log.warning(f"with {workers} to load data, such a GPU would wait for it. {remedy}, or make images smaller.")


def _show_timing(timing: StepTiming, config: Config, command: list[str]) -> None:
    speed = f"{timing.rows_per_second:.3g} rows/s ({timing.step_seconds:.3g} s a step of {timing.step_rows} rows"
    log.result(f"measured on {timing.device}: {speed}, median of {timing.measured})")
    log.result(timing.forecast.describe(60.0 * minutes_of(config.job.time)))
    if timing.on_wrong_device:
        log.warning("job.gpus: jobs get a GPU, and this was measured on the CPU: these are not the hours of a job.")
        log.warning(f"On a GPU: {shlex.join(['sbatch', '--gres=gpu:1', 'jobs/ftlib.sbatch', *command])}")
    elif timing.gpus > 1:
        log.warning(f"measured on one GPU: {timing.gpus} are assumed to be {timing.gpus} times as fast")


def _largest_batch_size(plan: MemoryPlan, checkpointing: bool) -> str:

    how = "with gradient checkpointing" if checkpointing else "without gradient checkpointing"
    cut = plan.largest[checkpointing]
    if cut is None:
        return f"{how}: not even a micro-batch of 1 fits"
    accumulation = plan.config.rows_per_gpu // cut.micro_batch
    sizes = f"per_device_train_batch_size: {cut.micro_batch}, gradient_accumulation_steps: {accumulation}"
    return f"{how}: at most {sizes} ({format_gib(cut.estimate.total)})"
