"""How long `ftlib prepare` takes, with all its checks, and how fast prepared rows are read.

Run: `python -m tests.benchmarks.preparing [ROWS…]`, by default 10,000, 100,000 and 1,000,000 instructions and 440,000
questions over 80,000 small JPEGs made on the spot (`images`). Prints a line of JSON for each.

Seconds are wall-clock and CPU seconds of the whole command, imports included; memory is the peak of its resident set.
Rows are read at random, by one process, with warm caches and after the kernel was told to drop what it has of the
files. `FTLIB_PEER=/path/to/another/checkout` measures that checkout's ftlib, too, in the same run.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from PIL import Image

from ftlib.core import log
from tests.conftest import REPOSITORY

TEXT = """
name: texts
task: instruct
model: {family: causal, base: ftlib/tiny-neox}
adapter: {method: full}
data: {source: instructions, root: ROOT, prompt: alpaca}
"""
IMAGES = """
name: images
task: vqa
model: {family: paligemma, base: ftlib/tiny-paligemma}
adapter: {method: full}
data: {source: jsonl, root: ROOT}
"""
QUESTIONS, PICTURES = 440_000, 80_000
READ = 50_000

READER = """
import json, os, random, sys, time
from pathlib import Path
folder = Path(sys.argv[1])
from ftlib.data import dataset
found = dataset.PreparedDataset(folder, folder, {})
rows = found.rows("train")
places = [random.Random(0).randrange(len(rows)) for _ in range(int(sys.argv[2]))]
def rate():
    start = time.perf_counter()
    for place in places:
        rows[place]
    return len(places) / (time.perf_counter() - start)
for file in folder.rglob("*"):
    if file.is_file():
        handle = os.open(file, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)
cold = rate()
print(json.dumps({"cold": round(cold), "warm": round(rate())}))
"""


def main() -> int:
    """Measure and print."""
    wanted = sys.argv[1:] or ["10000", "100000", "1000000", "images"]
    codes = [code for code in (str(REPOSITORY), os.environ.get("FTLIB_PEER", "")) if code]
    for what in wanted:
        with tempfile.TemporaryDirectory() as temporary:
            root = Path(temporary) / "data"
            root.mkdir()
            log.info(f"making data: {what}")
            if what == "images":
                make_questions(root)
            else:
                make_instructions(root, int(what))
            config = Path(temporary) / "config.yaml"
            config.write_text((IMAGES if what == "images" else TEXT).replace("ROOT", str(root)))
            for number, code in enumerate(codes):
                found = measure(config, Path(temporary) / f"store-{number}", code)
                print(json.dumps({"data": what, "code": "this" if number == 0 else "peer", **found}), flush=True)
    return 0


def make_instructions(root: Path, count: int) -> None:
    """Records of some 150 characters, all of them different."""
    with (root / "data.jsonl").open("w") as file:
        for number in range(count):
            record = {
                "instruction": f"What is {number} plus {number * 7 % 1000}? Answer in words, and say how you found it.",
                "input": "",
                "output": f"It is {number + number * 7 % 1000}, since one adds them.",
            }
            file.write(json.dumps(record) + "\n")


def make_questions(root: Path) -> None:
    """Questions with ten answers each, several about each picture."""
    draw = random.Random(0)
    for number in range(PICTURES):
        pixels = Image.frombytes("RGB", (8, 8), draw.randbytes(192))
        pixels.resize((64, 48)).save(root / f"{number}.jpg", quality=80)
    with (root / "data.jsonl").open("w") as file:
        for number in range(QUESTIONS):
            answers = [str(number % 7)] * 10
            record = {"id": number, "image": f"{number % PICTURES}.jpg", "prefix": f"how many of {number}?"}
            file.write(json.dumps({**record, "suffix": answers[0], "references": answers}) + "\n")


def measure(config: Path, store: Path, code: str) -> dict[str, Any]:
    """Prepare twice, then read rows."""
    environment = {**os.environ, "PYTHONPATH": code, "FTLIB_STORE": str(store)}
    found: dict[str, Any] = {}
    for name in ("first", "second"):
        start = time.perf_counter()
        command = [sys.executable, "-m", "ftlib", "prepare", str(config)]
        with (store.parent / "output").open("w+") as output:
            started = subprocess.Popen(command, env=environment, cwd=store.parent, stdout=output)
            _, status, used = os.wait4(started.pid, 0)
            if status:
                raise SystemExit(f"{code}: ftlib prepare failed")
            output.seek(0)
            folder = output.read().strip()
        cpu, mb = used.ru_utime + used.ru_stime, used.ru_maxrss // 1024
        found[name] = {"seconds": round(time.perf_counter() - start, 1), "cpu": round(cpu, 1), "mb": mb}
    reader = [sys.executable, "-c", READER, folder, str(READ)]
    read = subprocess.run(reader, env=environment, cwd=store.parent, capture_output=True, text=True, check=True)
    return {**found, "rows_per_second": json.loads(read.stdout)}


if __name__ == "__main__":
    sys.exit(main())
