"""How far a run is and what befell it, in words."""

from __future__ import annotations

from collections import Counter
from typing import Any

from ftlib.reporting.collect import RunRecord

_TOLD = {"preempted": "preempted", "diverged": "diverged"}


def state(record: RunRecord) -> tuple[str, str]:
    """How far the run is: a word or two, and a sentence."""
    if record.done:
        return "finished", _finish(record.done, record.divergences)
    go_on = f"ftlib train {record.folder / 'config.yaml'}"
    if not record.starts:
        return "not started", f"train it with: {go_on}"
    logged = f"last logged step {record.metrics[-1]['step']:,}" if record.metrics else "no step logged yet"
    failed = record.divergences
    if len(failed) > record.config.guard.restarts:
        return "diverged", f"in every attempt ({len(failed)}), at last: {failed[-1]['reason']}; no result was written"
    again = f"diverged {_times(len(failed))}, now attempt {len(failed)}, " if failed else ""
    return "not finished yet", f"{again}{logged}; go on with: {go_on}"


def _finish(done: dict[str, Any], failed: list[dict[str, Any]]) -> str:
    parts = [f"{done['step']:,} steps"]
    if best := done.get("best"):
        value = "undefined" if best["value"] is None else f"{best['value']:.4g}"
        parts.append(f"the result is of step {best['step']:,}, {best['metric']} on valid {value}")
    if failed:
        parts.append(f"attempt {len(failed)}: training had diverged {_times(len(failed))} before")
    return "; ".join(parts)


def happened(record: RunRecord) -> str:
    """Starts, preemptions and divergences, counted; empty for a run that went through in one go."""
    counts = Counter(_TOLD[event["event"]] for event in record.history if event["event"] in _TOLD)
    told = [f"{word} {_times(number)}" for word, number in sorted(counts.items())]
    resumed = len(record.starts) - 1
    return ", ".join([f"resumed {_times(resumed)}", *told] if resumed > 0 else told)


def _times(number: int) -> str:
    return "once" if number == 1 else f"{number} times"
