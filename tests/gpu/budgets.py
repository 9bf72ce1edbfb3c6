"""The checks of `checks.py` by name, and the seconds that each may take on an H100, imports included."""

from __future__ import annotations

TOGETHER = {
    "sdpa": 10,
    "agreement": 30,
    "resume": 40,
    "sharding": 40,
    "numbers": 45,
    "out_of_memory": 30,
    "synchronisation": 10,
}
"""Checks of correctness, several of which run at the same time."""

ALONE = {
    "environment": 10,
    "words_without_memory": 10,
    "paligemma_224": 50,
    "paligemma_448": 45,
    "nf4": 20,
    "generation": 30,
    "neox": 35,
    "compile": 35,
}
"""Checks that measure, or need the whole GPU."""
