"""What the config's `job` and `sweep` may hold: sbatch's options, and the sweep's shape for editors."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

WORD = r"^\S+$"
MEMORY = r"^[0-9]+[KMGT]?$"
DURATION = r"^([0-9]+-)?[0-9]{1,3}(:[0-5][0-9]){0,2}$"
Word = Annotated[str, Field(pattern=WORD)]
Memory = Annotated[str, Field(pattern=MEMORY)]
Duration = Annotated[str, Field(pattern=DURATION)]
SbatchOption = Literal[
    "begin", "bb", "comment", "contiguous", "core-spec", "cpu-freq", "deadline", "distribution",
    "exclusive", "extra-node-info", "gpu-bind", "gpu-freq", "gres-flags", "hint", "licenses", "mem-bind", "mincpus",
    "network", "nice", "nodelist", "oversubscribe", "prefer", "priority", "profile", "reservation", "switches",
    "thread-spec", "threads-per-core", "tmp", "use-min-nodes", "wckey",
]  # fmt: skip
"""Options of sbatch (its manual, 22.05 to 24.11) that change neither what a job runs nor how ftlib follows it."""

SWEEP_SCHEMA: dict[str, Any] = {
    "description": "dotted key: [values] for every combination; list: [points]; random: {count, seed, draw}",
    "type": ["object", "null"],
    "properties": {
        "list": {"type": "array", "items": {"type": "object"}},
        "random": {
            "type": "object",
            "properties": {"count": {"type": "integer"}, "seed": {"type": "integer"}, "draw": {"type": "object"}},
            "required": ["count", "draw"],
            "additionalProperties": False,
        },
    },
}
