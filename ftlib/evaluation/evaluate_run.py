"""Evaluate a run on datasets and splits, before and after training: scores out, with what is written beside them."""

from __future__ import annotations

import contextlib
import importlib.util
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from ftlib.config.loader import Experiment, load_experiment
from ftlib.config.schema import CHAT, Config, Evaluation, Lora
from ftlib.core import files, log
from ftlib.core.paths import Site
from ftlib.core.signals import notify_host
from ftlib.data.dataset import open_prepared
from ftlib.data.splits import SPLITS
from ftlib.errors import UserError
from ftlib.evaluation import model
from ftlib.evaluation.compare import compare_before_after, differences_before_after
from ftlib.evaluation.evaluate import EvaluationRequest, evaluate_split, fit_threshold
from ftlib.hub.cache import find_model, model_hashes
from ftlib.metrics.comparability import answer_settings, differing_settings, settings_folder
from ftlib.runs import events
from ftlib.runs.model_card import write_card
from ftlib.runs.pinning import pin_base, verify_data_unchanged
from ftlib.runs.run import Run, create_run, require_evaluable

Split = Literal["train", "valid", "test"]


def evaluate_run(
    experiment: Experiment,
    run: Run,
    site: Site,
    splits: Sequence[Split] = (),
    data: Sequence[Path] = (),
    before: bool = False,
) -> list[dict[str, Any]]:
    """Evaluate a run; existing predictions and scores are reused.

    Args:
        splits: instead of `evaluation.splits`.
        data: configs of other datasets to ask instead of the run's own, each with its own prompt.
        before: only the base model, which needs no trained run.

    Returns:
        For each model, dataset and split: when (before or after training), data, split, and the content of
        scores.json; after training also `change`, a comparison with the base model; `other_settings`, if they are not
        those of the run's config. In the first rank only.

    Raises:
        UserError: not trained yet, other data or another base model than the run's, or a dataset of another task.
    """
    if wrong := [split for split in splits if split not in SPLITS]:
        raise UserError(f"splits: must be of {', '.join(SPLITS)}, got {wrong[0]!r}")
    own = experiment.config
    whens = ["before"] if before else ["before", "after"] if own.evaluation.before else ["after"]
    if not before:
        require_evaluable(experiment, run, site)
    if not run.config_file.is_file():
        _create_folder(experiment, run, site)

    def evaluate() -> list[dict[str, Any]]:
        return [
            scores for when in whens for scores in _results(own, run, site, when, splits or own.evaluation.splits, data)
        ]

    # Without torch this ends here unless everything has been evaluated already: not as a failure of the run.
    finished = None if importlib.util.find_spec("torch") else evaluate()
    with events.record_outcome(run, "evaluate", events.last_activity(run)):
        notify_host("run", str(run.folder))
        events.record_start(run, "evaluate")
        started = time.monotonic()
        results = evaluate() if finished is None else finished
        run.log_event("evaluated", seconds=round(time.monotonic() - started, 1))
    if run.done_marker.exists() and log.is_main_process():
        write_card(run, own)
    return results if log.is_main_process() else []


def _create_folder(experiment: Experiment, run: Run, site: Site) -> None:
    """Create the folder of a run that is not trained, for the scores of its base model.

    Raises:
        UserError: data or model are missing; then nothing is created.
    """
    open_prepared(experiment.config, site, run)
    find_model(experiment.config.model, site)
    create_run(experiment, site)


def _results(
    own: Config, run: Run, site: Site, when: str, splits: Sequence[str], data: Sequence[Path]
) -> Iterator[dict[str, Any]]:
    """The scores of a model on every dataset and split; those after training tell what it changed."""
    first = _own_request(own, run, site, when)
    apart = _settings_folder(own, run, site)
    threshold = fit_threshold(first, _evaluation_folder(run, own, own.data.source, "valid", when, apart))
    for name, config in _datasets(own, data, site):
        prepared = first.prepared if config.data == own.data else open_prepared(config, site)
        request = replace(first, config=config, prepared=prepared)
        for split in splits:
            folders = {each: _evaluation_folder(run, own, name, split, each, apart) for each in ("before", "after")}
            chosen_here = config is own and split == "valid"
            scores = evaluate_split(request, split, folders[when], None if chosen_here else threshold)
            if scores is None:
                continue
            if when == "after":
                change = compare_before_after(config, request.prepared.labels, folders["before"], folders["after"])
                differences = differences_before_after(folders["before"], folders["after"])
                told = {"change": change, "incomparable": differences}
                scores = {**scores, **{name: value for name, value in told.items() if value}}
            if apart:
                changed = differing_settings(scores["settings"], _saved_evaluation(own, run, site))
                scores = {**scores, "other_settings": changed}
            yield {"when": when, "data": name, "split": split, **scores}


def _saved_evaluation(own: Config, run: Run, site: Site) -> Evaluation:
    """Return the evaluation settings in the run's folder, which may have been overridden for this call."""
    return load_experiment(run.config_file, [], site).config.evaluation if run.config_file.is_file() else own.evaluation


def _settings_folder(own: Config, run: Run, site: Site) -> str:
    """Return the folder for evaluations whose settings are not those of the run's config; "" if they are."""
    settings = answer_settings(own.evaluation)
    return settings_folder(settings) if settings != answer_settings(_saved_evaluation(own, run, site)) else ""


def _evaluation_folder(run: Run, own: Config, dataset: str, split: str, when: str, apart: str) -> Path:
    """Return the folder of an evaluation; one with other settings that is there is moved to a folder of its own."""
    folder = run.evaluation_folder(dataset, split, when, apart)
    if not apart and log.is_main_process() and files.is_complete(folder):
        settings = files.read_json(folder / "scores.json")["settings"]
        if differing_settings(settings, own.evaluation):
            kept = run.evaluation_folder(dataset, split, when, settings_folder(settings))
            kept.parent.mkdir(exist_ok=True)
            with contextlib.suppress(OSError):  # there is one already, or another process has moved it
                folder.rename(kept)
    return folder


def _own_request(own: Config, run: Run, site: Site, when: str) -> EvaluationRequest:
    prepared, bare = open_prepared(own, site, run), own.evaluation.without_context
    verify_data_unchanged(run, prepared.metadata)
    if when == "before" or isinstance(own.adapter, Lora):
        pin_base(run, model_hashes(find_model(own.model, site), site))
    if when == "before":
        return EvaluationRequest(
            model.base_model(own, site), own, prepared, shared=site.runs / ".before", without_context=bare
        )
    return EvaluationRequest(
        model.finetuned_model(own, run, site), own, prepared, prepared.rows("train"), without_context=bare
    )


def _datasets(own: Config, paths: Sequence[Path], site: Site) -> list[tuple[str, Config]]:
    """Return the run's dataset, or those of other configs with their prompts, with this run's evaluation settings."""
    request: dict[str, Config] = {}
    for path in paths:
        other = load_experiment(path, [], site).config
        if other.task != own.task:
            raise UserError(f"{path}: its task is {other.task}, this run's is {own.task}")
        if (other.data.prompt == CHAT) != (own.data.prompt == CHAT):
            problem = f"{path}: its data.prompt is {other.data.prompt!r}, this run's is {own.data.prompt!r}"
            raise UserError(problem, "Only chat uses the model's chat template; set the same data.prompt.")
        of_the_run = other.name == own.data.source
        if other.name in request or (of_the_run and other.data != own.data):
            problem = f"{path}: there are already results on another dataset with the name {other.name}"
            raise UserError(problem, "Give this config another name.")
        request[other.name] = own if of_the_run else own.model_copy(update={"data": other.data})
    return list(request.items()) or [(own.data.source, own)]
