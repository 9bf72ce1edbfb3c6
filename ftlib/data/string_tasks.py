"""String tasks as instructions with an input: a dataset of text that needs no download.

`reverse`, `next` (every letter becomes the next one of the alphabet) and `count` (the letters) of random
words. No word occurs twice, so held-out rows ask about words that were never seen: what is learned is the task.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

from ftlib.data.examples import write_records

ROWS = 6000
LETTERS = "abcdefghijklmnop"
SHORTEST, LONGEST = 3, 6
SEED = 0

TASKS: dict[str, Callable[[str], str]] = {
    "reverse": lambda word: word[::-1],
    "next": lambda word: "".join(chr(ord(letter) + 1) for letter in word),
    "count": lambda word: str(len(word)),
}


def make_string_tasks(folder: Path) -> None:
    """Write `data.jsonl` into a folder, as instructions with input and output."""
    write_records(folder / "data.jsonl", _records(random.Random(SEED)))


def _records(draw: random.Random) -> Iterator[dict[str, str]]:
    seen: set[str] = set()
    names = list(TASKS)
    while len(seen) < ROWS:
        word = "".join(draw.choices(LETTERS, k=draw.randint(SHORTEST, LONGEST)))
        if word in seen:
            continue
        name = names[len(seen) % len(names)]
        seen.add(word)
        yield {"id": f"{len(seen):04d}", "instruction": name, "input": word, "output": TASKS[name](word)}
