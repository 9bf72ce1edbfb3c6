"""What the history tells of attempts and rounds, and what follows from it: another attempt, another round, or none."""

from __future__ import annotations

from typing import Any

from ftlib import console, files
from ftlib.config import Config
from ftlib.errors import Diverged
from ftlib.runs import Run
from ftlib.training import ranks
from ftlib.training.arguments import learning_rate
from ftlib.training.examiner import Examiner
from ftlib.training.legs import Leg, Place, divergences
from ftlib.training.trainer import AnswerTrainer


def facts_of(config: Config, leg: Leg) -> dict[str, Any]:
    """What the history tells of a leg."""
    facts = {"seed": leg.seed(config.seed), "learning_rate": learning_rate(config, leg)}
    return {"attempt": leg.attempt, "round": leg.round, **facts}


def next_attempt(config: Config, run: Run) -> int:
    """The number of the first attempt that has not diverged.

    Raises:
        Diverged: there may be no further one.
    """
    failed = ranks.share(divergences(run))  # all ranks begin the same attempt, or none does
    if len(failed) <= config.guard.restarts:
        return len(failed)
    tried = [
        f"  attempt {line['attempt']} (seed {line['seed']}, learning rate {line['learning_rate']:g}): "
        f"step {line['step']}: {line['reason']}"
        for line in failed
    ]
    remedy = "Try a lower learning rate, a longer warm-up or a larger effective batch."
    raise Diverged("\n".join(["training diverged in every attempt; no result was written.", *tried, remedy]))


def goes_on(examiner: Examiner, trainer: AnswerTrainer, place: Place) -> bool:
    """Whether another round follows; it is asked whether training has converged, and the history told."""
    config, run, number = examiner.config, examiner.run, place.leg.round
    rounds = config.rounds
    if not rounds:
        return False
    follows = number + 1 < len(rounds)
    until = rounds[number + follows].until
    found: dict[str, Any] = {}
    if until:
        value = examiner.value(trainer, place, until.split, until.metric)
        found = {"split": until.split, "metric": until.metric, "converged": until.reached(value), "value": value}
    told = [line for line in files.read_jsonl_log(run.history) if line["event"] == "round"]
    if (place.leg.attempt, number) not in [(line["attempt"], line["round"]) for line in told]:
        run.note("round", step=place.step, **facts_of(config, place.leg), **found)
    return follows and not found.get("converged", False)


def tell_ranks(place: Place) -> None:
    """Say so if a checkpoint was written by another number of processes."""
    written_by = len(list(place.checkpoint.glob("rng_state*"))) if place.checkpoint else 0
    if place.checkpoint and written_by != console.ranks()[1]:
        console.say(
            f"the checkpoint is of {written_by} processes, now there are {console.ranks()[1]}: the same batches,"
        )
        console.say("but random states, which dropout depends on, begin anew")
