"""Has training diverged? Judged from the losses that are logged, step by step, and from the weights to be kept."""

from __future__ import annotations

import math
from collections import Counter, deque
from statistics import median

import torch

from ftlib.config.schema import Guard
from ftlib.errors import TrainingDiverged
from ftlib.training import distributed

WINDOW = 50
"""Of how many losses the running median is."""

MIN_WINDOW = 20
"""From how many losses on there is a running median."""


MAX_SKIPPED_STEPS = 25
"""So many skipped steps in a row are no search for a scale: from torch's first, 65,536, it is down at 1/512 by then."""


def require_finite(model: torch.nn.Module) -> None:
    """Refuse to keep weights with a NaN or an infinity in them: no loss has seen what the last update made of them.

    All ranks must call it.

    Raises:
        TrainingDiverged: some of the trainable parameters, on any rank.
    """
    trained = {name: one.detach() for name, one in model.named_parameters() if one.requires_grad and one.numel()}
    ends = torch.stack([torch.stack(one.aminmax()).float() for one in trained.values()]).cpu()  # NaN if any is
    wrong = [name for name, pair in zip(trained, ends.isfinite().all(dim=1), strict=True) if not pair]
    if any(distributed.all_reduce_max(len(wrong))):
        shown = f", such as {wrong[0]}" if wrong else ""
        raise TrainingDiverged(
            f"weights that are no finite numbers, in {len(wrong)} of {len(trained)} parameters{shown}"
        )


class DivergenceDetector:
    """Watches one phase of training; who reacts is `train.next_attempt`, which restarts it or gives up.

    Args:
        rule: what counts as diverged.
        warmup: steps in which the loss may still be above `rule.above`.
        steps: how many there are; if fewer than MAX_SKIPPED_STEPS, all of them skipped are a divergence.
    """

    def __init__(self, rule: Guard, warmup: int, steps: int) -> None:
        self.rule = rule
        self.warmup = warmup
        self._recent: deque[float] = deque(maxlen=WINDOW)
        self._streaks: Counter[str] = Counter()
        self._skipped = 0
        self._too_many_skipped = min(MAX_SKIPPED_STEPS, steps)

    def check(self, step: int, loss: float, gradient_norm: float = 0.0, skipped: bool = False) -> str | None:
        """What is wrong with a step, in words; None if training may go on.

        Every step must be shown once and in order. A loss that spikes does not enter the running median.

        Args:
            step: counted from 1 within the stretch.
            gradient_norm: 0 where it says nothing: with fp16 an infinite gradient only makes the scaler skip a step.
            skipped: whether it did.
        """
        if not (math.isfinite(loss) and math.isfinite(gradient_norm)):
            return f"loss {loss}, gradient norm {gradient_norm}"
        self._skipped = self._skipped + 1 if skipped else 0
        if self._skipped == MAX_SKIPPED_STEPS:
            return (
                f"{MAX_SKIPPED_STEPS} steps in a row skipped: with fp16 their gradients are not finite, "
                "however they are scaled"
            )
        if self._skipped == self._too_many_skipped:
            return (
                f"all {self._skipped} steps skipped: with fp16 a scale for the gradients is searched in the first "
                f"steps, up to {MAX_SKIPPED_STEPS} of them; nothing was trained"
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
        """Name of a rule → what the loss should not stay above at this step."""
        limits = {}
        if self.rule.above is not None and step > self.warmup:
            limits["above"] = self.rule.above
        if self.rule.spike is not None and len(self._recent) >= MIN_WINDOW:
            limits["spike"] = self.rule.spike * median(self._recent)
        return limits
