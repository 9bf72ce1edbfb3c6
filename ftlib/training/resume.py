"""Where a run resumes: its attempts, the phases of an attempt, and their checkpoints.

A new attempt starts when the previous one has diverged. An attempt has a phase for each entry of `rounds` (without
`rounds`, one), with a learning-rate schedule of its own. The resume point is read from the run folder alone:
`diverged` lines in history.jsonl count the attempts, and each checkpoint stores its round. Steps are counted through
all rounds of an attempt.
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
        offset: number of steps in the earlier rounds of the attempt.
    """

    attempt: int = 0
    round: int = 0
    offset: int = 0

    def seed(self, seed: int) -> int:
        """Return the config's seed for the first phase, a hash for others, so that no run of a sweep shares it."""
        if self.attempt == self.round == 0:
            return seed
        digest = hashlib.sha256(f"{seed} {self.attempt} {self.round}".encode()).digest()
        return int.from_bytes(digest[:4], "big")


@dataclass(frozen=True)
class ResumePoint:
    """Where training resumes: phase, steps since the start of the attempt, and a checkpoint if `step` is not 0."""

    phase: TrainingPhase
    step: int = 0
    checkpoint: Path | None = None

    @property
    def in_phase(self) -> bool:
        """Whether the checkpoint belongs to this phase, not to the previous one."""
        return self.step > self.phase.offset

    def next_phase(self) -> ResumePoint:
        """Return the start of the next round, which begins with the weights of this checkpoint."""
        return ResumePoint(
            TrainingPhase(self.phase.attempt, self.phase.round + 1, self.step), self.step, self.checkpoint
        )


def find_resume_point(run: Run, attempt: int) -> ResumePoint:
    """Return where an attempt resumes: its newest complete checkpoint, or its start."""
    found = runs.last_checkpoint(run.checkpoint_root(attempt))
    if found is None:
        return ResumePoint(TrainingPhase(attempt))
    step, folder = found
    facts = read_metadata(folder)
    return ResumePoint(TrainingPhase(attempt, facts["round"], facts["offset"]), step, folder)


def discard_after(run: Run, point: ResumePoint) -> None:
    """Remove checkpoints and logged metrics after a resume point, and the checkpoints of diverged attempts."""
    attempt = point.phase.attempt
    for folder in (run.folder / "checkpoints").glob("attempt-*"):
        if folder != run.checkpoint_root(attempt):
            shutil.rmtree(folder, ignore_errors=True)
    runs.remove_checkpoints_after(run.checkpoint_root(attempt), point.step)
    jsonl.filter_jsonl_log(run.metrics, lambda line: line["attempt"] < attempt or line["step"] <= point.step)


def divergences(run: Run) -> list[dict[str, Any]]:
    """Return the `diverged` events of history.jsonl, one for each diverged attempt."""
    return [line for line in jsonl.read_jsonl_log(run.history) if line["event"] == "diverged"]


def logged_metrics(run: Run, attempt: int) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl of an attempt."""
    return [line for line in jsonl.read_jsonl_log(run.metrics) if line["attempt"] == attempt]
