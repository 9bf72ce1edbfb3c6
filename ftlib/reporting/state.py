"""How far a run is and what befell it, in words."""

from __future__ import annotations

from collections import Counter
from typing import Any

from ftlib.reporting.collect import RunRecord

_AT_WORK = ("queued", "running", "evaluating")
_TOLD = {"preempted": "preempted", "diverged": "diverged"}


def state(record: RunRecord) -> tuple[str, str]:
    """How far the run is: a word or two, as `ftlib status` says them, and a sentence."""
    word, reason = record.standing.state, record.standing.reason
    go_on = f"ftlib train {record.folder / 'config.yaml'}"
    if record.done:
        parts = [*_finish(record.done, record.divergences), reason]
    elif word == "not started":
        parts = [reason, f"train it with: {go_on}"]
    elif word == "diverged":
        parts = [reason, "no result was written"]
    else:
        step = record.metrics[-1]["step"] if record.metrics else None
        logged = "no step logged yet" if step is None else f"last logged step {step:,}"
        parts = [reason, logged, *([] if word in _AT_WORK else [f"go on with: {go_on}"])]
    return word, "; ".join(filter(None, parts))


def _finish(done: dict[str, Any], failed: list[dict[str, Any]]) -> list[str]:
    parts = [f"{done['step']:,} steps"]
    if best := done.get("best"):
        value = "undefined" if best["value"] is None else f"{best['value']:.4g}"
        parts.append(f"the result is of step {best['step']:,}, {best['metric']} on valid {value}")
    if failed:
        parts.append(f"attempt {len(failed)}: training had diverged {_times(len(failed))} before")
    return parts


def happened(*records: RunRecord) -> str:
    """Starts, preemptions and divergences, counted; empty for runs that went through in one go."""
    events = [event["event"] for record in records for event in record.history]
    counts = Counter(_TOLD[event] for event in events if event in _TOLD)
    told = [f"{word} {_times(number)}" for word, number in sorted(counts.items())]
    resumed = sum(max(0, len(record.starts) - 1) for record in records)
    return ", ".join([f"resumed {_times(resumed)}", *told] if resumed > 0 else told)


def _times(number: int) -> str:
    return "once" if number == 1 else f"{number} times"
