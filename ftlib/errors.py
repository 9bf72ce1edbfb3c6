"""The user's mistakes, and the exit codes that the host script and Slurm see.

Raise `UserError` for anything that a user can fix. Of the commands `cli.main` alone catches it: it prints the message
without a traceback and exits with `EXIT_USER`.
"""

from __future__ import annotations

EXIT_USER = 2
"""The user's mistake: running the same again cannot help."""

EXIT_FAILURE = 1
"""A failure that is not the user's: a bug, a diverged model, a broken machine."""

EXIT_REQUEUE = 75
"""Everything is saved; the same command resumes (sysexits.h: EX_TEMPFAIL)."""

EXIT_RANK_LOST = 76
"""A task that ends because another one is gone: what became of that one is the reason, not this."""

EXIT_INTERRUPTED = 130
"""Ctrl-C, as shells report it (128 + SIGINT)."""


class UserError(Exception):
    """What is wrong (with file, line and field where there are any) and what to do about it.

    Attributes:
        problem: what is wrong.
        remedy: what to do; "" if the problem says it.
    """

    def __init__(self, problem: str, remedy: str = "") -> None:
        super().__init__(problem)
        self.problem = problem
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.problem}\n{self.remedy}" if self.remedy else self.problem


class RankLost(Exception):
    """Another task of this job, a rank, is gone or does not answer; what ended it stands in its own words."""


class TrainingDiverged(Exception):
    """Training has diverged; the model must not be published."""
