"""The sections about the course of a training: what is saved and kept, when it has gone wrong, and its rounds."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from ftlib.config_base import Count, Name, Section, Split


class Best(Section):
    """The result is the checkpoint with the best `metric` on valid, not the last one.

    Valid is answered by generation, or for `metric: loss` its loss computed, every `every` steps and at the end of a
    round. After `patience` such evaluations in a row without a better one the round ends early.
    """

    metric: Name
    every: Count
    patience: Count | None = None


class Checkpoint(Section):
    """When to save what is needed to go on; a checkpoint is due when either interval has passed.

    The newest `keep` are kept, and the best.
    """

    steps: Count = 500
    minutes: Annotated[float, Field(gt=0)] = 15.0
    keep: Count = 2
    best: Best | None = None


class Batch(Section):
    """How the rows of an optimizer step (micro-batch × accumulation) are computed; the step stays the same.

    With `auto` training takes the largest micro-batch that fits the GPU, gradient checkpointing only where nothing
    fits without it, and halves the micro-batch when memory runs out all the same.
    """

    auto: bool = False


class Guard(Section):
    """When training has diverged: then it stops at once and starts again with another seed.

    A loss or gradient that is no finite number and a loss above `max_loss` always stop it. So does a loss that stays
    above `above` for `patience` steps in a row after the warm-up, or above `spike` times its running median.

    After `restarts` such restarts the run fails. Every restart multiplies the learning rate by `learning_rate_factor`.
    """

    max_loss: Annotated[float, Field(gt=0)] = 100.0
    above: Annotated[float, Field(gt=0)] | None = None
    spike: Annotated[float, Field(gt=1)] | None = None
    patience: Count = 3
    restarts: Annotated[int, Field(ge=0)] = 3
    learning_rate_factor: Annotated[float, Field(gt=0, le=1)] = 1.0


class Until(Section):
    """Converged: the rows of a split, answered by generation, reach `at_least` in `metric` (in the metric's unit).

    A metric of which lower is better, such as `loss`, reaches `at_most`.
    """

    split: Split = "train"
    metric: Name
    at_least: float | None = None
    at_most: float | None = None

    @model_validator(mode="after")
    def _one_bound(self) -> Until:
        if (self.at_least is None) == (self.at_most is None):
            raise ValueError("give at_least, or at_most for a metric of which lower is better")
        return self

    def reached(self, value: float | None) -> bool:
        """Whether a value of the metric is enough; an undefined one is not."""
        if value is None:
            return False
        return value >= self.at_least if self.at_least is not None else value <= (self.at_most or 0.0)


class Round(Section):
    """A training of its own, with a fresh schedule, from the weights of the round before it.

    A round with `until` is trained only while that is not reached yet; otherwise training is over.
    """

    learning_rate: Annotated[float, Field(gt=0)]
    until: Until | None = None
