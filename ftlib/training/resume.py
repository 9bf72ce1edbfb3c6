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

from ftlib.core import jsonl
from ftlib.runs import run as runs
from ftlib.runs.run import Run
from ftlib.training.checkpoints import read_metadata


@dataclass(frozen=True)
class TrainingPhase:
    """One round of one attempt.

    Attributes:
        attempt, round: counted from 0.
        offset: steps of the rounds before it.
    """

    attempt: int = 0
    round: int = 0
    offset: int = 0

    def seed(self, seed: int) -> int:
        """The config's own seed for the first phase; others draw theirs, so that no neighbour in a sweep has it."""
        if self.attempt == self.round == 0:
            return seed
        digest = hashlib.sha256(f"{seed} {self.attempt} {self.round}".encode()).digest()
        return int.from_bytes(digest[:4], "big")


@dataclass(frozen=True)
class ResumePoint:
    """Where training stands: in a phase, `step` steps into its attempt, with a checkpoint if `step` is not 0."""

    phase: TrainingPhase
    step: int = 0
    checkpoint: Path | None = None

    @property
    def in_phase(self) -> bool:
        """Whether the checkpoint is of this phase, not of the round before it."""
        return self.step > self.phase.offset

    def next_phase(self) -> ResumePoint:
        """The round that begins with the weights of this place."""
        return ResumePoint(
            TrainingPhase(self.phase.attempt, self.phase.round + 1, self.step), self.step, self.checkpoint
        )


def find_resume_point(run: Run, attempt: int) -> ResumePoint:
    """Where an attempt goes on: at its newest whole checkpoint, or at its beginning."""
    found = runs.last_checkpoint(run.checkpoint_root(attempt))
    if found is None:
        return ResumePoint(TrainingPhase(attempt))
    step, folder = found
    facts = read_metadata(folder)
    return ResumePoint(TrainingPhase(attempt, facts["round"], facts["offset"]), step, folder)


def discard_after(run: Run, point: ResumePoint) -> None:
    """Remove what lies beyond a place, and the checkpoints of diverged attempts: nothing may go on from them."""
    attempt = point.phase.attempt
    for folder in (run.folder / "checkpoints").glob("attempt-*"):
        if folder != run.checkpoint_root(attempt):
            shutil.rmtree(folder, ignore_errors=True)
    runs.remove_checkpoints_after(run.checkpoint_root(attempt), point.step)
    jsonl.filter_jsonl_log(run.metrics, lambda line: line["attempt"] < attempt or line["step"] <= point.step)


def divergences(run: Run) -> list[dict[str, Any]]:
    """The history's lines about attempts that diverged; as many attempts are used up."""
    return [line for line in jsonl.read_jsonl_log(run.history) if line["event"] == "diverged"]


def logged_metrics(run: Run, attempt: int) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl about an attempt."""
    return [line for line in jsonl.read_jsonl_log(run.metrics) if line["attempt"] == attempt]
