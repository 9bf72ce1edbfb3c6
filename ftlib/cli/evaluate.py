"""Generate predictions for the splits of a dataset and score them.

RUN: the fine-tuned model, and the base model too with `evaluation.before: true`. CONFIG --before: only the base model.
With --data, the datasets of other configs, each with its own prompt. Existing predictions are reused.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftlib.cli import arguments
from ftlib.config.loader import Experiment, load_experiment
from ftlib.config.schema import CHAT, Config, Lora
from ftlib.core import log
from ftlib.core.paths import Site, find_site
from ftlib.core.signals import notify_host
from ftlib.data.moved import match_existing_runs
from ftlib.errors import UserError
from ftlib.hub.cache import find_model, model_hashes
from ftlib.metrics.summary import format_interval, format_value
from ftlib.runs import events
from ftlib.runs import run as runs
from ftlib.runs.model_card import write_card
from ftlib.runs.pinning import pin_base, verify_data_unchanged
from ftlib.runs.run import Run
from ftlib.tasks.registry import task_of

if TYPE_CHECKING:
    from ftlib.evaluation.evaluate import EvaluationRequest


def main(argv: list[str]) -> int:
    """`ftlib evaluate RUN|CONFIG [KEY=VALUE…] [--split S…] [--data CONFIG…] [--before] [--json]`"""
    parsed = _parser().parse_intermixed_args(argv)
    site = find_site()
    experiment, run = _resolve_target(parsed, site)
    whens = ["before"] if parsed.before else ["before", "after"] if experiment.config.evaluation.before else ["after"]
    if "after" in whens and not run.done_marker.exists():
        remedy = "Run `ftlib train` first, or add --before for the base model."
        remedy = "\n".join(filter(None, [remedy, runs.recipe_notice(experiment, site)]))
        raise UserError(f"{run.folder}: not trained yet", remedy)
    results = _logged_results(experiment, run, site, parsed, whens)
    if run.done_marker.exists() and log.is_main_process():
        write_card(run, experiment.config)
    if results:
        log.info(_table(results, task_of(experiment.config).columns))
        for line in _remarks(results):
            log.info(line)
    if parsed.json and results:
        log.print_json(results)
    return 0


def _parser() -> argparse.ArgumentParser:
    command = arguments.make_parser("evaluate", __doc__)
    command.add_argument(
        "--split", action="append", choices=["train", "valid", "test"], help="instead of evaluation.splits; repeatable"
    )
    command.add_argument(
        "--data", action="append", type=Path, metavar="CONFIG", help="instead of the run's own dataset; repeatable"
    )
    command.add_argument("--before", action="store_true", help="only the base model")
    command.add_argument("--json", action="store_true", help="print all scores to stdout")
    command.add_argument("run", metavar="RUN|CONFIG", help="run folder or its name, or a config file")
    command.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help="set a field; of a RUN, one of evaluation")
    return command


def _resolve_target(parsed: argparse.Namespace, site: Site) -> tuple[Experiment, Run]:
    """Return config and run: the run of a config, or the config of a run."""
    if parsed.run.endswith((".yaml", ".yml")):
        [experiment] = match_existing_runs([load_experiment(Path(parsed.run), parsed.overrides, site)], site)
        return experiment, runs.create_run(experiment, site)
    run = runs.find_run(parsed.run, site)
    if others := [text for text in parsed.overrides if not text.startswith("evaluation.")]:
        raise UserError(f"{others[0]}: of a run, only evaluation.… can be set", "Use its config instead of its name.")
    return load_experiment(run.config_file, parsed.overrides, site), run


def _logged_results(
    experiment: Experiment, run: Run, site: Site, parsed: argparse.Namespace, whens: Sequence[str]
) -> list[dict[str, Any]]:
    """Return all results, and record the evaluation in the run's history."""
    with events.record_outcome(run, "evaluate", events.last_activity(run)):
        notify_host("run", str(run.folder))
        events.record_start(run, "evaluate")
        started = time.monotonic()
        results = list(_results(experiment, run, site, parsed, whens))
        run.log_event("evaluated", seconds=round(time.monotonic() - started, 1))
    return results


def _results(
    experiment: Experiment, run: Run, site: Site, parsed: argparse.Namespace, whens: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """Yield the scores of every model, dataset and split, with the change by training."""
    from ftlib.data.dataset import open_prepared
    from ftlib.evaluation.compare import compare_before_after
    from ftlib.evaluation.evaluate import evaluate_split, fit_threshold

    own = experiment.config
    for when in whens:
        first = _own_request(own, run, site, when)
        threshold = fit_threshold(first, run.evaluation_folder(own.data.source, "valid", when))
        for name, config in _datasets(own, parsed.data or [], site):
            prepared = first.prepared if config.data == own.data else open_prepared(config, site)
            request = replace(first, config=config, prepared=prepared)
            for split in parsed.split or own.evaluation.splits:
                folders = {each: run.evaluation_folder(name, split, each) for each in ("before", "after")}
                chosen_here = config is own and split == "valid"
                scores = evaluate_split(request, split, folders[when], None if chosen_here else threshold)
                if scores is None:
                    continue
                change = None
                if when == "after":
                    change = compare_before_after(config, request.prepared.labels, folders["before"], folders["after"])
                if change:
                    scores = {**scores, "change": change}
                yield {"when": when, "data": name, "split": split, **scores}


def _own_request(own: Config, run: Run, site: Site, when: str) -> EvaluationRequest:
    from ftlib.data.dataset import open_prepared
    from ftlib.evaluation import model
    from ftlib.evaluation.evaluate import EvaluationRequest

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


def _table(results: Sequence[dict[str, Any]], columns: Sequence[str]) -> str:
    headers = ["data", "split", "training", "metric", "value", "95 % interval", "n", "invalid"]
    rows = []
    for scores in results:
        for part, own in {"": scores, **scores.get("parts", {})}.items():
            place = [f"{scores['data']}{part and '/'}{part}", scores["split"], scores["when"]]
            rows += [[*place, *cells] for cells in _cells(own, columns)]
    return log.format_table(headers, rows)


def _cells(scores: dict[str, Any], columns: Sequence[str]) -> Iterator[list[str]]:
    """Yield a task's metrics, each with value, interval, n and number of invalid answers."""
    for name in [name for name in columns if name in scores["metrics"]]:
        found, unit = scores["metrics"][name], scores["unit"]
        shown = [format_value(found["value"], unit), format_interval(found["interval"], unit)]
        yield [name, *shown, str(scores["n"]), str(scores["invalid"])]


def _remarks(results: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Yield remarks about the scores."""
    for scores in results:
        where = f"{scores['data']} {scores['split']} {scores['when']}"
        yield from (f"{where}: {remark}" for remark in scores["remarks"])
        if change := scores.get("change"):
            yield f"{where}: {change['sentence']}"
