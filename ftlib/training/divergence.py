"""Divergence detection: checks the loss of every step, and the weights before they are saved."""

from __future__ import annotations

import math
from collections import Counter, deque
from statistics import median

import torch

from ftlib.config.schema import Guard
from ftlib.errors import TrainingDiverged
from ftlib.models import sharding
from ftlib.training import distributed

WINDOW = 50
"""Number of recent losses in the running median."""

MIN_WINDOW = 20
"""Number of losses that the running median needs at least."""


MAX_SKIPPED_STEPS = 25
"""Skipped steps in a row that count as divergence: the loss scale starts at 65,536 and is then at 1/512."""


def require_finite(model: torch.nn.Module) -> None:
    """Reject weights that contain NaN or infinity, so that they are not saved: no loss covers the last update.

    All ranks must call it.

    Raises:
        TrainingDiverged: some trainable parameters are not finite, on any rank.
    """
    trained = {name: sharding.local_part(one.detach()) for name, one in model.named_parameters() if one.requires_grad}
    trained = {name: one for name, one in trained.items() if one.numel()}
    ends = [torch.stack(one.aminmax()).float() for one in trained.values()] or [torch.zeros(2)]  # NaN if any is
    finite = torch.stack(ends).cpu().isfinite().all(dim=1).tolist()
    wrong = [name for name, fine in zip(trained, finite, strict=False) if not fine]
    if (most := distributed.all_reduce_max(len(wrong))[0]) > 0:  # of a sharded model, ranks see different parts
        shown = f", such as {wrong[0]}" if wrong else ""
        raise TrainingDiverged(f"NaN or infinity in the weights of {most} of {len(trained)} parameters{shown}")


class DivergenceDetector:
    """Checks the losses of one phase; `train.next_attempt` decides whether training restarts or fails.

    Args:
        rule: the limits.
        warmup: number of first steps in which the loss may be above `rule.above`.
        steps: number of steps of the phase; if there are fewer than MAX_SKIPPED_STEPS, skipping all is divergence.
    """

    def __init__(self, rule: Guard, warmup: int, steps: int) -> None:
        self.rule = rule
        self.warmup = warmup
        self._recent: deque[float] = deque(maxlen=WINDOW)
        self._streaks: Counter[str] = Counter()
        self._skipped = 0
        self._too_many_skipped = min(MAX_SKIPPED_STEPS, steps)

    def check(self, step: int, loss: float, gradient_norm: float = 0.0, skipped: bool = False) -> str | None:
        """Return why training has diverged at this step; None if it has not.

        Call it once for every step, in order. A loss above the spike limit does not enter the running median.

        Args:
            step: counted from 1 within the phase.
            gradient_norm: pass 0 with fp16, where an infinite gradient only makes the scaler skip the step.
            skipped: whether the scaler skipped the step.
        """
        if not (math.isfinite(loss) and math.isfinite(gradient_norm)):
            return f"loss {loss}, gradient norm {gradient_norm}"
        self._skipped = self._skipped + 1 if skipped else 0
        if self._skipped == MAX_SKIPPED_STEPS:
            return f"{MAX_SKIPPED_STEPS} steps in a row skipped: their fp16 gradients are not finite at any loss scale"
        if self._skipped == self._too_many_skipped:
            return (
                f"all {self._skipped} steps skipped: fp16 needs up to {MAX_SKIPPED_STEPS} steps to find a loss scale; "
                "nothing was trained"
            )
        if loss > self.rule.max_loss:
            return f"loss {loss:.4g} is above {self.rule.max_loss:g}"
        limits = self._limits(step)
        for name, limit in limits.items():
            self._streaks[name] = self._streaks[name] + 1 if loss > limit else 0
            if self._streaks[name] >= self.rule.patience:
                return f"loss {loss:.4g}, {self._streaks[name]} steps in a row above {name} ({limit:.4g})"
        if loss <= limits.get("spike", math.inf):
            self._recent.append(loss)
        return None

    def _limits(self, step: int) -> dict[str, float]:
        """Return rule name → limit of the loss at this step."""
        limits = {}
        if self.rule.above is not None and step > self.warmup:
            limits["above"] = self.rule.above
        if self.rule.spike is not None and len(self._recent) >= MIN_WINDOW:
            limits["spike"] = self.rule.spike * median(self._recent)
        return limits
