"""How far a run is and what befell it, in words."""

from __future__ import annotations

from collections import Counter

from ftlib.reporting.collect import RunRecord

_TOLD = {"preempted": "preempted", "diverged": "diverged"}


def state(record: RunRecord) -> tuple[str, str]:
    """How far the run is: a word or two, and a sentence."""
    if record.done:
        return "finished", f"{record.done['step']:,} steps"
    go_on = f"ftlib train {record.folder / 'config.yaml'}"
    if not record.starts:
        return "not started", f"train it with: {go_on}"
    logged = f"last logged step {record.metrics[-1]['step']:,}" if record.metrics else "no step logged yet"
    last = record.history[-1]
    if last["event"] == "diverged":
        return "diverged", f"{last.get('reason', '')}; {logged}; no result was written"
    return "not finished yet", f"{logged}; go on with: {go_on}"


def happened(record: RunRecord) -> str:
    """Starts, preemptions and divergences, counted; empty for a run that went through in one go."""
    counts = Counter(_TOLD[event["event"]] for event in record.history if event["event"] in _TOLD)
    told = [f"{word} {_times(number)}" for word, number in sorted(counts.items())]
    resumed = len(record.starts) - 1
    return ", ".join([f"resumed {_times(resumed)}", *told] if resumed > 0 else told)


def _times(number: int) -> str:
    return "once" if number == 1 else f"{number} times"
