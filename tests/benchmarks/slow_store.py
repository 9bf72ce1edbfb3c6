"""Rows/s of training data in shuffled order from a file system on which every operation waits, as over a network.

Run: `python -m tests.benchmarks.slow_store`, in a Python with mfusepy and on a machine with FUSE 3. Prints a table on
stderr and JSON on stdout. The file system is a view of a folder by FUSE, mounted anew, with nothing in the page cache,
for each figure; each lookup of a name, open, and read of up to 128 KiB waits for a number of milliseconds.
`FTLIB_PEER=/path/to/another/checkout` measures that checkout too, in turns. Medians of three rounds.

Files are JPEGs of 640 × 480. The rows are decoded and encoded for 224 pixels; `cpu` is the CPU time of all processes.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROWS = 160
MICRO_BATCH = 8
WAITS = (0, 1, 5)
WORKERS = (0, 2)
ROUNDS = 3


def main() -> int:
    """Measure and print."""
    from ftlib.core import log
    from tests.benchmarks.loading import make_photo
    from tests.conftest import REPOSITORY

    log.configure()
    codes = {"this": str(REPOSITORY)} | ({"peer": os.environ["FTLIB_PEER"]} if "FTLIB_PEER" in os.environ else {})
    found: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        files, mount = Path(folder) / "files", Path(folder) / "mount"
        files.mkdir()
        mount.mkdir()
        make_photo(640, 480).save(files / "0.jpg", quality=90)
        for number in range(1, ROWS):
            shutil.copy(files / "0.jpg", files / f"{number}.jpg")
        for _ in range(ROUNDS):
            for name, code in codes.items():
                environment = {**os.environ, "PYTHONPATH": os.pathsep.join([code, os.environ.get("PYTHONPATH", "")])}
                command = [sys.executable, "-W", "ignore", __file__, "measure", folder]
                done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, cwd=folder)
                for case, facts in json.loads(done.stdout).items():
                    found.setdefault(f"{name}, {case}", []).append(facts)
                    log.info(f"{name}, {case}: {facts}")
    medians = {
        case: {key: statistics.median(one[key] for one in each) for key in each[0]} for case, each in found.items()
    }
    rows = [[case, *[f"{value:.3g}" for value in each.values()]] for case, each in medians.items()]
    log.info(log.format_table(["case", *next(iter(medians.values()))], rows))
    print(json.dumps({"load": os.getloadavg(), **medians}, indent=1))
    return 0


def measure(folder: Path) -> dict[str, dict[str, float]]:
    """Case → what was measured."""
    found = {}
    for wait in WAITS:
        for workers in WORKERS:
            with mounted(folder / "files", folder / "mount", wait / 1000):
                found[f"{wait} ms, {workers} workers"] = read(folder / "mount", workers)
    return found


@contextlib.contextmanager
def mounted(files: Path, mount: Path, wait: float) -> Iterator[None]:
    """The files at another place, where each operation waits for some seconds."""
    server = subprocess.Popen([sys.executable, __file__, "serve", str(files), str(mount), str(wait)])
    try:
        while not mount.is_mount():
            time.sleep(0.05)
        yield
    finally:
        subprocess.run(["fusermount3", "-u", str(mount)], check=True)
        server.wait()


def serve(files: str, mount: str, wait: float) -> None:
    """Answer the kernel's requests until the file system is unmounted."""
    import mfusepy

    class Slow(mfusepy.Operations):  # type: ignore[misc]
        use_ns = True

        def getattr(self, path: str, fh: int | None = None) -> dict[str, Any]:
            time.sleep(wait)
            try:
                stat = os.lstat(files + path)
            except OSError as error:
                raise mfusepy.FuseOSError(error.errno) from None
            return {name: getattr(stat, name) for name in ("st_mode", "st_nlink", "st_size", "st_uid", "st_gid")}

        def open(self, path: str, flags: int) -> int:
            time.sleep(wait)
            return os.open(files + path, os.O_RDONLY)

        def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
            time.sleep(wait)
            return os.pread(fh, size, offset)

        def release(self, path: str, fh: int) -> None:
            os.close(fh)

    mfusepy.FUSE(Slow(), mount, foreground=True, ro=True)


def read(folder: Path, workers: int) -> dict[str, float]:
    """Rows per second of one epoch, after the workers have started with the first batch, and CPU milliseconds a row."""
    import hashlib

    import torch

    from ftlib.data.example import Example
    from ftlib.models.paligemma import PaliGemmaInputProcessor
    from ftlib.models.tiny import tiny_processor
    from ftlib.training.data import GlobalBatchSampler, MixtureSampler, SupervisedDataset

    torch.set_num_threads(1)
    processor = PaliGemmaInputProcessor(tiny_processor(224, 14))
    digest = hashlib.sha256((folder / "0.jpg").read_bytes()).hexdigest()
    rows = [Example(str(row), f"{row}.jpg", "what?", "a dog", digest=digest) for row in range(ROWS)]
    sampler = MixtureSampler([ROWS], [1.0], 0)
    dataset = SupervisedDataset(rows, folder, "{prefix}", processor, range(ROWS), sampler)
    batches = GlobalBatchSampler(sampler, 2 * MICRO_BATCH, MICRO_BATCH, seed=0, drop_last=False)
    loader: Any = torch.utils.data.DataLoader(
        dataset, batch_sampler=batches, collate_fn=processor.collate, num_workers=workers
    )
    iterator = iter(loader)
    next(iterator)
    before, cpu = time.monotonic(), sum(os.times()[:4])
    count = sum(len(batch["input_ids"]) for batch in iterator)
    seconds = time.monotonic() - before
    del iterator, loader
    return {
        "rows/s": count / seconds,
        "ms/row": 1000 * seconds / count,
        "cpu ms/row": 1000 * (sum(os.times()[:4]) - cpu) / count,
    }


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        serve(sys.argv[2], sys.argv[3], float(sys.argv[4]))
    elif sys.argv[1:2] == ["measure"]:
        print(json.dumps(measure(Path(sys.argv[2]))))
    else:
        sys.exit(main())
