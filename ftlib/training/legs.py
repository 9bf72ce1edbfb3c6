"""A run's way to its result: attempts, each of one or more rounds; where a run that was ended goes on.

An attempt begins when the one before it has diverged; a round is a training with a schedule of its own. The place in
this is read from the run folder alone: `diverged` lines in history.jsonl count the attempts, a checkpoint knows its
round. Steps are counted through all rounds of an attempt.
"""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftlib import files, runs
from ftlib.runs import Run
from ftlib.training.checkpoints import read_facts


@dataclass(frozen=True)
class Leg:
    """One round of one attempt.

    Attributes:
        attempt, round: counted from 0.
        offset: steps of the rounds before it.
    """

    attempt: int = 0
    round: int = 0
    offset: int = 0

    def seed(self, seed: int) -> int:
        """The config's own seed for the very first leg; others draw theirs, so that no neighbour in a sweep has it."""
        if self.attempt == self.round == 0:
            return seed
        digest = hashlib.sha256(f"{seed} {self.attempt} {self.round}".encode()).digest()
        return int.from_bytes(digest[:4], "big")


@dataclass(frozen=True)
class Place:
    """Where training stands: in a leg, `step` steps into its attempt, with a checkpoint if `step` is not 0."""

    leg: Leg
    step: int = 0
    checkpoint: Path | None = None

    @property
    def begun(self) -> bool:
        """Whether the checkpoint is of this leg, not of the round before it."""
        return self.step > self.leg.offset

    def next_round(self) -> Place:
        """The round that begins with the weights of this place."""
        return Place(Leg(self.leg.attempt, self.leg.round + 1, self.step), self.step, self.checkpoint)


def find_place(run: Run, attempt: int) -> Place:
    """Where an attempt goes on: at its newest whole checkpoint, or at its beginning."""
    found = runs.last_checkpoint(run.checkpoints(attempt))
    if found is None:
        return Place(Leg(attempt))
    step, folder = found
    facts = read_facts(folder)
    return Place(Leg(attempt, facts["round"], facts["offset"]), step, folder)


def cut_off(run: Run, place: Place) -> None:
    """Remove what lies beyond a place, and the checkpoints of diverged attempts: nothing may go on from them."""
    attempt = place.leg.attempt
    for folder in (run.folder / "checkpoints").glob("attempt-*"):
        if folder != run.checkpoints(attempt):
            shutil.rmtree(folder, ignore_errors=True)
    runs.remove_checkpoints_after(run.checkpoints(attempt), place.step)
    files.cut_jsonl_log(run.metrics, lambda line: line["attempt"] < attempt or line["step"] <= place.step)


def divergences(run: Run) -> list[dict[str, Any]]:
    """The history's lines about attempts that diverged; as many attempts are used up."""
    return [line for line in files.read_jsonl_log(run.history) if line["event"] == "diverged"]


def logged(run: Run, attempt: int) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl about an attempt."""
    return [line for line in files.read_jsonl_log(run.metrics) if line["attempt"] == attempt]
