"""The Python API: what the commands do, as functions.

    import ftlib

    config = "configs/digits.yaml"
    ftlib.stage(config)
    ftlib.prepare(config)
    run = ftlib.train(config, overrides={"seed": 1})
    for scores in ftlib.evaluate(run, splits=["test"]):
        print(scores["metric"], scores["value"], scores["interval"])

A config is the path of a YAML file, or a mapping of the same form. Overrides map dotted keys to values, such as
`{"training.learning_rate": 1e-4}`. A run is a `Run`, a run folder or a run's name. Store and runs folder are found as
by the commands: `FTLIB_STORE` and `FTLIB_RUNS` in the environment or in jobs/site.env.

Functions print nothing; messages go to the standard logger `ftlib`, and `logging.basicConfig(level="INFO")` shows them.
Whatever a user can fix raises `UserError`, which says what is wrong and what to do. Every call can be repeated after an
interruption, and resumes or returns what exists.

Signal handlers are not installed: a signal ends the process as it ends any Python program, and the next call resumes
from the last checkpoint. In Slurm jobs use the command `ftlib train`, which saves a checkpoint before it is preempted.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, TypeVar

from ftlib.config.loader import Experiment, Overrides, load_experiment, read_raw_config
from ftlib.core import log, permissions
from ftlib.core.environment import prefer_expandable_segments
from ftlib.core.paths import Site, find_site
from ftlib.core.registry import register_model, register_source, register_task
from ftlib.core.user_errors import as_user_errors
from ftlib.errors import TrainingDiverged, UserError
from ftlib.hub.offline import offline
from ftlib.runs import run as runs_run
from ftlib.runs.run import Run

if TYPE_CHECKING:
    from ftlib.data.dataset import PreparedDataset
    from ftlib.memory.search import MemoryPlan
    from ftlib.slurm.status import RunStatus
    from ftlib.slurm.submit import SubmittedRuns
    from ftlib.staging import StagedFiles
    from ftlib.training.timing import StepTiming

__all__ = [
    "Run",
    "TrainingDiverged",
    "UserError",
    "cancel",
    "evaluate",
    "export",
    "load_config",
    "merge",
    "plan",
    "predict",
    "prepare",
    "register_model",
    "register_source",
    "register_task",
    "report",
    "score",
    "stage",
    "status",
    "submit",
    "time_steps",
    "train",
]

ConfigLike = str | Path | Mapping[str, Any] | Experiment
"""The path of a YAML file, its content as a mapping, or what `load_config` returned."""

RunLike = Run | str | Path
"""A run, its folder or its name."""

Split = Literal["train", "valid", "test"]
Stage = Literal["evaluate", "report"]
P = ParamSpec("P")
R = TypeVar("R")


def _public(function: Callable[P, R]) -> Callable[P, R]:
    """Set the umask and turn errors that a user can fix into UserErrors, as the commands do."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        umask = permissions.read_umask()
        try:
            permissions.limit_umask()
            with as_user_errors(function.__name__):
                return function(*args, **kwargs)
        finally:
            os.umask(umask)

    return call


@_public
def load_config(config: str | Path | Mapping[str, Any], overrides: Overrides | None = None) -> Experiment:
    """Read and check a config.

    Returns:
        `config`, the checked fields, and `identity`, the id of its run. stage, prepare, plan, train and evaluate
        accept it as a config, too.

    Raises:
        UserError: every fault in the config, one a line, with file and line.
    """
    return load_experiment(_source(config), overrides or {}, find_site())


@_public
def stage(config: ConfigLike, overrides: Overrides | None = None) -> StagedFiles:
    """Bring a config's model, processor and datasets into the store, like `ftlib stage`, which may download them.

    Returns:
        The folders of the model and of each dataset.

    Raises:
        UserError: not on the hub, no access, no space, or torch is missing and needed to convert the model.
    """
    from ftlib import staging

    site = find_site()
    return staging.stage(_find_experiment(config, overrides, site), site)


@_public
@offline()
def prepare(config: ConfigLike, overrides: Overrides | None = None, *, again: bool = False) -> PreparedDataset:
    """Check a dataset (every row, every image) and split it, like `ftlib prepare`, unless that has been done.

    Args:
        again: read the data as they are now; runs that exist keep the rows that they were made from.

    Returns:
        `rows(split)` of train, valid and test; `folder` in the store; `metadata`, such as what was left out.

    Raises:
        UserError: every faulty row or image, impossible splits, or no space.
    """
    from ftlib import preparation
    from ftlib.runs.pinning import require_pinned_code

    site = find_site()
    experiment = _find_experiment(config, overrides, site)
    return preparation.prepare(experiment, site, again, lambda run: require_pinned_code(run, "prepare")).dataset


@_public
@offline()
def plan(
    config: ConfigLike,
    overrides: Overrides | None = None,
    *,
    gpu: str | int | None = None,
) -> MemoryPlan:
    """Estimate the GPU memory of training a config, like `ftlib plan`; no weights and no GPU are needed.

    Args:
        gpu: memory of the GPU in bytes, or as text such as "24GiB"; default: of this machine's GPU, if there is one.

    Returns:
        `estimates` by part in bytes, without and with gradient checkpointing; `fits`; `largest` micro-batches.

    Raises:
        UserError: a fault in the config, a model that is not staged, or an invalid size.
    """
    from ftlib.core.gpu import gpu_memory_bytes
    from ftlib.memory.search import parse_size, plan_memory

    site = find_site()
    capacity = gpu_memory_bytes() if gpu is None else parse_size(gpu) if isinstance(gpu, str) else gpu
    return plan_memory(_load_experiment(config, overrides, site).config, site, capacity)


@_public
def time_steps(config: ConfigLike, overrides: Overrides | None = None, *, steps: int = 8) -> StepTiming:
    """Measure the time of a training step on this process's device, like `ftlib plan --time`. Nothing is saved.

    Args:
        steps: how many are measured, after two that are not.

    Returns:
        `device`, `step_seconds`, `rows_per_second`, and the `forecast` of the whole run.

    Raises:
        UserError: a fault in the config, nothing staged or prepared, or too little memory.
    """
    prefer_expandable_segments()
    from ftlib.training import timing

    site = find_site()
    return timing.time_steps(_load_experiment(config, overrides, site), site, steps)


@_public
@offline()
def train(config: ConfigLike, overrides: Overrides | None = None) -> Run:
    """Train a config, or resume its run, like `ftlib train`; a run that is done is returned at once.

    A run is always resumed with the version of ftlib that it was started with. The command starts that version in a
    process of its own; from Python this is not possible, so that such a run is refused.

    Returns:
        The run; its `folder` contains the result, in adapter/ or model/.

    Raises:
        UserError: a fault in the config, nothing staged or prepared, data or base model changed under the run, another
            process at work on it, or a run that was started with a different version of ftlib.
        TrainingDiverged: every attempt that `guard.restarts` allows has diverged.
    """
    from ftlib.runs.pinning import require_pinned_code

    site = find_site()
    experiment = _find_experiment(config, overrides, site)
    run = runs_run.create_run(experiment, site)
    if notice := runs_run.recipe_notice(experiment, site):
        log.warning(notice)
    if run.done_marker.exists():
        return run
    require_pinned_code(run, "train")
    prefer_expandable_segments()
    from ftlib.training.train import train_run

    train_run(experiment, run, site)
    return run


@_public
@offline()
def evaluate(
    run: RunLike | ConfigLike,
    overrides: Overrides | None = None,
    *,
    splits: Split | Sequence[Split] = (),
    data: str | Path | Sequence[str | Path] = (),
    before: bool = False,
) -> list[dict[str, Any]]:
    """Evaluate a run on splits and datasets, like `ftlib evaluate`; only rows without an answer are asked.

    Args:
        run: a run, or a config (a path that ends in .yaml or .yml, or a mapping), which names the run that it trains.
        overrides: of a run only keys of `evaluation`.
        splits: default: `evaluation.splits`.
        data: paths of other configs whose datasets are asked instead of the run's own.
        before: evaluate only the base model.

    Returns:
        The scores of each model, dataset and split, as `ftlib evaluate --json` prints them: `when` ("before" or
        "after" training), `data`, `split`, `metric`, `value`, `interval` (95 %), `n`, `metrics`, `remarks` and others.

    Raises:
        UserError: no such run, not trained yet, other data or another base model than the run's.
    """
    from ftlib.data.moved import find_experiment, match_existing_runs

    site = find_site()
    if isinstance(run, Experiment):
        [experiment] = match_existing_runs([_load_experiment(run, overrides, site)], site)
        found = runs_run.update_run(experiment, site)
    else:
        target = str(run.folder) if isinstance(run, Run) else run if isinstance(run, Mapping) else str(run)
        experiment, found = find_experiment(target, overrides or {}, site)
    prefer_expandable_segments()
    from ftlib.evaluation.evaluate_run import evaluate_run

    chosen = [splits] if isinstance(splits, str) else splits
    configs = [data] if isinstance(data, (str, Path)) else data
    return evaluate_run(experiment, found, site, chosen, [Path(path) for path in configs], before)


@_public
@offline()
def predict(
    run: RunLike,
    questions: str | Mapping[str, Any] | Sequence[str | Mapping[str, Any]],
    *,
    max_new_tokens: int | None = None,
) -> list[dict[str, Any]]:
    """Ask a trained run questions, like `ftlib predict`.

    Args:
        run: a run, or the folder of a model or adapter.
        questions: one or several; each a prompt, or a mapping with `prompt` and, where needed, `image` (a path) or
            `context`.
        max_new_tokens: default: `evaluation.max_new_tokens`.

    Returns:
        For each question its `prompt` and `answer`, `mean_logprob` and `min_logprob` of the answer's tokens (natural
        logarithm), and `answer_tokens`, their number; if it has a context, also `answer with context` and so on.

    Raises:
        UserError: no such run, not trained yet, a faulty question, or an image that cannot be read.
    """
    if max_new_tokens is not None and max_new_tokens < 1:
        raise UserError(f"max_new_tokens: must be above 0, got {max_new_tokens}")
    prefer_expandable_segments()
    from ftlib.evaluation import predict as evaluation_predict

    several = [questions] if isinstance(questions, (str, Mapping)) else questions
    asked = evaluation_predict.as_queries(several)
    model, settings = evaluation_predict.open_finetuned(_run_text(run), max_new_tokens, find_site())
    return evaluation_predict.predict(model, settings, asked)


@_public
def score(
    task: str,
    references: str | Path | Sequence[str | Path],
    predictions: str | Path,
    *,
    against: str | Path | None = None,
    intervals: bool = True,
    choices: str | Path | None = None,
    positive: str | None = None,
    tokenize: str | None = None,
) -> dict[str, Any]:
    """Score a result file of a dataset's own format, like `ftlib score`; no model and no GPU is needed.

    Args:
        task: how the files are read and which metrics are computed: vqa, docvqa, gqa, caption, detect, refer, segment,
            classify or text.
        references: the files of the dataset's release.
        predictions: the result file.
        against: a second result file to compare with the first.
        intervals: whether to compute confidence intervals.
        choices: gqa: valid and plausible answers by question.
        positive: classify: the label of precision and recall.
        tokenize: text: sacrebleu's tokenizer.

    Returns:
        What `ftlib score --json` prints: `metric`, `value`, `interval` (95 %), `n`, `metrics`, `remarks` and others;
        with `against` also the differences, second minus first, each with a paired test.

    Raises:
        UserError: no such task, an option of another task, or faulty files.
    """
    from ftlib.tasks.score_files import score_files

    files = [references] if isinstance(references, (str, Path)) else references
    options = {"choices": Path(choices) if choices else None, "positive": positive, "tokenize": tokenize}
    second = Path(against) if against else None
    return score_files(task, [Path(file) for file in files], Path(predictions), second, intervals, options)


@_public
@offline()
def merge(config: str | Path | Mapping[str, Any], overrides: Overrides | None = None) -> Path:
    """Merge fine-tuned models or adapters into one, like `ftlib merge`.

    Args:
        config: a merge config of ftlib (docs/merging.md) or of mergekit; for the latter, set `output` by an override.

    Returns:
        The folder of the result.

    Raises:
        UserError: a fault in the config, models that do not fit together, or no space.
    """
    from ftlib.merging.merge import merge as merge_models
    from ftlib.merging.mergekit import load_recipe

    site = find_site()
    return merge_models(load_recipe(_source(config), overrides or {}, site), site)


@_public
@offline()
def export(
    run: RunLike,
    output: str | Path,
    *,
    dtype: Literal["float32", "float16", "bfloat16"] | None = None,
) -> Path:
    """Write a run's result as a whole model, like `ftlib export`; transformers loads it without PEFT.

    Args:
        run: a run, or the folder of an adapter.
        output: folder of the model, which must not exist yet.
        dtype: of the weights; default: as the base is stored.

    Returns:
        The folder of the model.

    Raises:
        UserError: no such run, not trained yet, its base is not found or has changed, or no space.
    """
    from ftlib.merging.export import export as export_model

    return export_model(_run_text(run), Path(output), dtype, find_site())


@_public
def report(
    runs: RunLike | Sequence[RunLike],
    output: str | Path | None = None,
    *,
    templates: str | Path | None = None,
    images: bool = True,
) -> Path:
    """Write a self-contained HTML page about a run, or one that compares several, like `ftlib report`.

    Args:
        runs: a name stands for all its runs.
        output: an .html file, or an existing folder; default: report.html in the run folder; of several runs, in the
            folder of the first one's name.
        templates: a folder of jinja2 templates that replace ftlib's of the same name.
        images: whether the page contains images of the data.

    Returns:
        The page; beside it are its numbers as .md and .csv.

    Raises:
        UserError: no such run, a damaged file in it, or an output that is no HTML file.
    """
    from ftlib.reports.report import read_run_records, write_report

    site = find_site()
    records = read_run_records(_find_runs(runs, site, "report"), site, images)
    return write_report(records, Path(output) if output else None, Path(templates) if templates else None)


@_public
def submit(
    config: str | Path | Mapping[str, Any],
    overrides: Overrides | None = None,
    *,
    executor: Literal["slurm", "local"] = "slurm",
    then: Stage | Sequence[Stage] = (),
    retry: bool = False,
    replace: bool = False,
    dry_run: bool = False,
) -> SubmittedRuns:
    """Submit a config's run, or every run of its sweep, like `ftlib submit`; only runs that are missing are sent.

    Args:
        executor: slurm, or local: processes in the background of this machine.
        then: evaluate in jobs of their own, each when its training is done; report when all have ended.
        retry: also runs that failed; they resume from what is saved.
        replace: delete what there is of these runs and start anew.
        dry_run: submit nothing; `preview` of the result is what would be submitted.

    Returns:
        `runs`, ids of `jobs`, `folder` of their output; no runs if none is missing.

    Raises:
        UserError: a fault in the config, Slurm does not answer or takes no more jobs, or a run that is to be replaced
            is at work.
    """
    from ftlib.slurm.submit import SubmitOptions, submit

    if executor not in ("slurm", "local"):
        raise UserError(f"executor: must be slurm or local, got {executor!r}", "In this process: ftlib.train(config)")
    stages = [then] if isinstance(then, str) else then
    if wrong := [stage for stage in stages if stage not in ("evaluate", "report")]:
        raise UserError(f"then: must be evaluate, report or both, got {wrong[0]!r}")
    if retry and replace:
        raise UserError("retry resumes runs and replace deletes them; give one of them")
    options = SubmitOptions(executor, stages, retry, replace, dry_run)
    return submit(read_raw_config(_source(config), overrides or {}), find_site(), options)


@_public
def status(runs: RunLike | Sequence[RunLike] = ()) -> list[RunStatus]:
    """The states of runs, like `ftlib status`: which are done, running or queued, and why others ended.

    Args:
        runs: default: all; a name stands for all its runs.

    Returns:
        For each run its `state`, `reason`, `step` of `total`, `loss`, `job` and others.

    Raises:
        UserError: no such run.
    """
    from ftlib.slurm.status import run_statuses

    site = find_site()
    return run_statuses(_find_runs(runs, site), site)


@_public
def cancel(runs: RunLike | Sequence[RunLike]) -> list[Run]:
    """Cancel runs that are queued or running, like `ftlib cancel`; they stay cancelled until they are submitted again.

    Args:
        runs: a name stands for all its runs.

    Returns:
        The runs that were queued or running.

    Raises:
        UserError: no such run, or Slurm does not answer.
    """
    from ftlib.slurm.cancel import cancel_runs

    site = find_site()
    return cancel_runs(_find_runs(runs, site, "cancel"), site)


def _source(config: str | Path | Mapping[str, Any]) -> Path | Mapping[str, Any]:
    return Path(config) if isinstance(config, (str, Path)) else config


def _load_experiment(config: ConfigLike, overrides: Overrides | None, site: Site) -> Experiment:
    if not isinstance(config, Experiment):
        return load_experiment(_source(config), overrides or {}, site)
    if overrides:
        raise UserError("overrides: this config has been loaded already", "Give the overrides to ftlib.load_config.")
    return config


def _find_experiment(config: ConfigLike, overrides: Overrides | None, site: Site) -> Experiment:
    """The experiment, under the name of an existing run that was started with the same data at another place."""
    from ftlib.data.moved import match_existing_runs

    return match_existing_runs([_load_experiment(config, overrides, site)], site)[0]


def _run_text(run: RunLike) -> str:
    return str(run.folder if isinstance(run, Run) else run)


def _find_runs(runs: RunLike | Sequence[RunLike], site: Site, needed_by: str = "") -> list[Run]:
    """The named runs; without a name all, unless a function needs names."""
    several = [runs] if isinstance(runs, (Run, str, Path)) else runs
    if needed_by and not several:
        raise UserError(f"{needed_by}: no runs are named")
    return runs_run.find_runs([_run_text(run) for run in several], site)
