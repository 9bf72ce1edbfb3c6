"""Ask a model every question of a split and score its answers.

RUN: the trained model, and the untrained one too if the config says `evaluation.before`. CONFIG --before: only the
untrained model. With --data, rows of other configs' datasets, each with its own prompt. What has been answered already
is not asked again.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftlib import command_line, console, history, runs
from ftlib.config import Config, Lora
from ftlib.config_data import CHAT
from ftlib.config_file import Experiment, load_experiment
from ftlib.data.moved import known_by_data
from ftlib.errors import UserError
from ftlib.hub import find_model, model_hashes
from ftlib.metrics.summary import number, span
from ftlib.pinning import pin_base, require_data
from ftlib.preemption import tell_host
from ftlib.reporting.card import write_card
from ftlib.runs import Run
from ftlib.site import Site, find_site
from ftlib.tasks import TASKS

if TYPE_CHECKING:
    from ftlib.evaluation.asked import Asked


def main(argv: list[str]) -> int:
    """`ftlib evaluate RUN|CONFIG [KEY=VALUE…] [--split S…] [--data CONFIG…] [--before] [--json]`"""
    parsed = _parser().parse_intermixed_args(argv)
    site = find_site()
    experiment, run = _target(parsed, site)
    whens = ["before"] if parsed.before else ["before", "after"] if experiment.config.evaluation.before else ["after"]
    if "after" in whens and not run.done.exists():
        remedy = "Run `ftlib train` first, or add --before for the base model."
        remedy = "\n".join(filter(None, [remedy, runs.recipe_notice(experiment, site)]))
        raise UserError(f"{run.folder}: not trained yet", remedy)
    results = _noted_results(experiment, run, site, parsed, whens)
    if run.done.exists() and console.speaks():
        write_card(run, experiment.config)
    if results:
        console.say(_table(results))
        for line in _remarks(results):
            console.say(line)
    if parsed.json and results:
        print(json.dumps(results, ensure_ascii=False, indent=1))
    return 0


def _parser() -> argparse.ArgumentParser:
    command = command_line.parser("evaluate", __doc__)
    command.add_argument(
        "--split", action="append", choices=["train", "valid", "test"], help="instead of evaluation.splits; repeatable"
    )
    command.add_argument(
        "--data", action="append", type=Path, metavar="CONFIG", help="instead of the run's own dataset; repeatable"
    )
    command.add_argument("--before", action="store_true", help="only the untrained base model")
    command.add_argument("--json", action="store_true", help="print all scores to stdout")
    command.add_argument("run", metavar="RUN|CONFIG", help="run folder or its name, or a config file")
    command.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help="set a field; of a RUN, one of evaluation")
    return command


def _target(parsed: argparse.Namespace, site: Site) -> tuple[Experiment, Run]:
    """A config names the run that it would train; a run brings its own config."""
    if parsed.run.endswith((".yaml", ".yml")):
        [experiment] = known_by_data([load_experiment(Path(parsed.run), parsed.overrides, site)], site)
        return experiment, runs.open_run(experiment, site)
    run = runs.find_run(parsed.run, site)
    if others := [text for text in parsed.overrides if not text.startswith("evaluation.")]:
        raise UserError(f"{others[0]}: of a run, only evaluation.… can be set", "Give its config instead of its name.")
    return load_experiment(run.config_file, parsed.overrides, site), run


def _noted_results(
    experiment: Experiment, run: Run, site: Site, parsed: argparse.Namespace, whens: Sequence[str]
) -> list[dict[str, Any]]:
    """All results; the run's history tells when they were asked for, and what became of that."""
    with history.endings(run, "evaluate", history.last_sign(run)):
        tell_host("run", str(run.folder))
        history.begin(run, "evaluate")
        started = time.monotonic()
        results = list(_results(experiment, run, site, parsed, whens))
        run.note("evaluated", seconds=round(time.monotonic() - started, 1))
    return results


def _results(
    experiment: Experiment, run: Run, site: Site, parsed: argparse.Namespace, whens: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """The scores of every model, dataset and split; those after training tell what it changed."""
    from ftlib.data.prepared import open_prepared
    from ftlib.evaluation.answers import evaluate_split, threshold_of
    from ftlib.evaluation.comparison import change_by_training

    own = experiment.config
    for when in whens:
        first = _own_rows(own, run, site, when)
        threshold = threshold_of(first, run.evaluation(own.data.source, "valid", when))
        for name, config in _datasets(own, parsed.data or [], site):
            prepared = first.prepared if config.data == own.data else open_prepared(config, site)
            asked = replace(first, config=config, prepared=prepared)
            for split in parsed.split or own.evaluation.splits:
                folders = {each: run.evaluation(name, split, each) for each in ("before", "after")}
                chosen_here = config is own and split == "valid"
                scores = evaluate_split(asked, split, folders[when], None if chosen_here else threshold)
                if scores is None:
                    continue
                change = None
                if when == "after":
                    change = change_by_training(config, asked.prepared.labels, folders["before"], folders["after"])
                if change:
                    scores = {**scores, "change": change}
                yield {"when": when, "data": name, "split": split, **scores}


def _own_rows(own: Config, run: Run, site: Site, when: str) -> Asked:
    from ftlib.data.prepared import open_prepared
    from ftlib.evaluation import subject
    from ftlib.evaluation.asked import Asked

    prepared, bare = open_prepared(own, site, run), own.evaluation.without_context
    require_data(run, prepared.facts)
    if when == "before" or isinstance(own.adapter, Lora):
        pin_base(run, model_hashes(find_model(own.model, site), site))
    if when == "before":
        return Asked(subject.untrained(own, site), own, prepared, shared=site.runs / ".before", without_context=bare)
    return Asked(subject.trained(own, run, site), own, prepared, prepared.rows("train"), without_context=bare)


def _datasets(own: Config, paths: Sequence[Path], site: Site) -> list[tuple[str, Config]]:
    """The run's own dataset, or those of other configs with their prompts, asked in this run's way."""
    asked: dict[str, Config] = {}
    for path in paths:
        other = load_experiment(path, [], site).config
        if other.task != own.task:
            raise UserError(f"{path}: its task is {other.task}, this run's is {own.task}")
        if (other.data.prompt == CHAT) != (own.data.prompt == CHAT):
            problem = f"{path}: its data.prompt is {other.data.prompt!r}, this run's is {own.data.prompt!r}"
            raise UserError(problem, "Only chat is asked by the model's chat template; set data.prompt alike.")
        of_the_run = other.name == own.data.source
        if other.name in asked or (of_the_run and other.data != own.data):
            problem = f"{path}: results on another dataset lie under the name {other.name} already"
            raise UserError(problem, "Give this config another name.")
        asked[other.name] = own if of_the_run else own.model_copy(update={"data": other.data})
    return list(asked.items()) or [(own.data.source, own)]


def _table(results: Sequence[dict[str, Any]]) -> str:
    headers = ["data", "split", "training", "metric", "value", "95 % interval", "n", "invalid"]
    rows = []
    for scores in results:
        columns = TASKS[scores["settings"]["task"]].columns
        for part, own in {"": scores, **scores.get("parts", {})}.items():
            place = [f"{scores['data']}{part and '/'}{part}", scores["split"], scores["when"]]
            rows += [[*place, *cells] for cells in _cells(own, columns)]
    return console.table(headers, rows)


def _cells(scores: dict[str, Any], columns: Sequence[str]) -> Iterator[list[str]]:
    """A task's metrics, each with its value, interval, n and number of invalid answers."""
    for name in [name for name in columns if name in scores["metrics"]]:
        found, unit = scores["metrics"][name], scores["unit"]
        shown = [number(found["value"], unit), span(found["interval"], unit)]
        yield [name, *shown, str(scores["n"]), str(scores["invalid"])]


def _remarks(results: Sequence[dict[str, Any]]) -> Iterator[str]:
    """What must be said beside the numbers."""
    for scores in results:
        where = f"{scores['data']} {scores['split']} {scores['when']}"
        yield from (f"{where}: {remark}" for remark in scores["remarks"])
        if change := scores.get("change"):
            yield f"{where}: {change['sentence']}"
