"""Files that several processes read: the same rows, in the same order, and the same words, as one after the other."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ftlib.config.schema import Data
from ftlib.data import scan
from ftlib.data.scan import ScannedDataset, scan_source
from ftlib.data.sources import json_stream
from ftlib.errors import EXIT_REQUEUE, UserError
from ftlib.tasks.registry import load_task
from tests.limits import time_limit

STRETCH = 700
CHAT = [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}] * 2


@pytest.fixture(autouse=True)
def short_stretches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_stream, "CHUNK_BYTES", STRETCH)


def with_cores(cores: int, monkeypatch: pytest.MonkeyPatch, data: Data, folder: Path, task: str) -> Any:
    """What reading gives, or says; and by how many processes."""
    asked: list[Any] = []
    submit = scan.ProcessPoolExecutor.submit
    with monkeypatch.context() as patch:
        patch.setattr(os, "sched_getaffinity", lambda process: set(range(cores)))
        patch.setattr(
            scan.ProcessPoolExecutor, "submit", lambda *all, **named: asked.append(all) or submit(*all, **named)
        )
        try:
            found: Any = scan_source(data, folder / f"{cores}.arrow", load_task(task))
        except UserError as error:
            found = str(error)
    assert (len(asked) > 2) == (cores > 1)
    return found


def record(number: int) -> dict[str, Any]:
    return {"instruction": f"add {number}", "output": f"{number + 1} é 答", "input": "", "origin": f"o{number % 7}"}


def text_of(records: list[Any]) -> str:
    return "".join((each if isinstance(each, str) else json.dumps(each, ensure_ascii=False)) + "\n" for each in records)


def alike(one: ScannedDataset, other: ScannedDataset) -> None:
    assert list(one.rows) == list(other.rows)
    assert [batch.schema for batch in one.rows.batches] == [one.rows.batches[0].schema] * len(one.rows.batches)
    for field in dataclasses.fields(ScannedDataset):
        first, second = getattr(one, field.name), getattr(other, field.name)
        if field.name == "keys":
            pairs = [(getattr(first, key.name), getattr(second, key.name)) for key in dataclasses.fields(first)]
            assert all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in pairs)
        elif isinstance(first, np.ndarray):
            assert np.array_equal(first, second) and first.dtype == second.dtype, field.name
        elif field.name != "path":
            assert first == second, field.name


def test_rows_faults_and_counts_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(0)
    records: list[Any] = [record(number) | {"id": f"r{number}"} for number in range(60)]
    records += [record(number) for number in range(60, 90)] + [record(61), record(61)]
    records += [{"messages": CHAT, "split": "validation"}, {"messages": CHAT[:2], "split": "Test"}]
    records += ["{broken", "", '"text"', json.dumps({"instruction": "no answer"}), "  ", record(3) | {"output": ""}]
    records += [{"messages": [*CHAT[:2], CHAT[0], CHAT[1] | {"weight": 0}], "id": "chat"}]
    draw.shuffle(records)
    root = tmp_path / "data"
    root.mkdir()
    (root / "data.jsonl").write_bytes(b"\xef\xbb\xbf" + text_of(records).removesuffix("\n").encode())
    data = Data(source="instructions", root=str(root), prompt="chat", on_bad="skip")
    one, many = (with_cores(cores, monkeypatch, data, tmp_path, "instruct") for cores in (1, 3))
    alike(one, many)
    assert one.invalid.count == 4 and one.unlearned == 1 and len(one.part_names) == 3
    broken = next(number for number, each in enumerate(records, 1) if each == "{broken")
    assert any(f"data.jsonl:{broken}: " in shown for shown in many.invalid.shown)


def test_a_mixture_with_files_of_splits_and_one_of_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("train", "valid"):
        rows = [record(number) | {"id": number} for number in range(30 if name == "train" else 4)]
        (tmp_path / f"{name}.jsonl").write_text(text_of(rows))
    texts = Data(source="instructions", root=str(tmp_path), files={"train": "train.jsonl", "valid": "valid.jsonl"})
    alike(*(with_cores(cores, monkeypatch, texts, tmp_path, "instruct") for cores in (1, 2)))
    pictures = [
        {"image": f"{number}.png", "prefix": "q", "suffix": f"{number % 3}", "part": "test"} for number in range(40)
    ]
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "data.jsonl").write_text(text_of(pictures))
    parts = [{"name": name, "source": "jsonl", "root": str(tmp_path / name)} for name in ("a", "b")]
    mixture = Data(source="mixture", root=str(tmp_path), parts=parts)
    one, many = (with_cores(cores, monkeypatch, mixture, tmp_path, "classify") for cores in (1, 4))
    alike(one, many)
    assert one.sizes == {"a": 40, "b": 40} and one.rows[41].image == "b/1.png"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda rows: rows[50].update(id="r3"), "data.jsonl:51: field id: duplicate of 'r3' in line 4"),
        (lambda rows: rows[3].update(id="r50") or rows[3].pop("origin"),
         "data.jsonl:51: field id: duplicate of 'r50' in line 4"),
        (lambda rows: [row.update(fold="train") for row in rows[:30]] + [row.update(fold="test") for row in rows[30:]],
         "field fold seems to hold the split of a row: 'train' (30), 'test' (30)"),
        (lambda rows: rows[59].update(split="nobody"), "unknown split names: 'nobody' (1)"),
    ],
)  # fmt: skip
def test_what_only_all_rows_together_tell(
    change: Any, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = [record(number) | {"id": f"r{number}"} for number in range(60)]
    change(records)
    (tmp_path / "data.jsonl").write_text(text_of(records))
    data = Data(source="instructions", root=str(tmp_path), prompt="{instruction} {input} {origin}")
    one, many = (with_cores(cores, monkeypatch, data, tmp_path, "instruct") for cores in (1, 2))
    assert one == many and words in one


def test_a_process_that_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data.jsonl").write_text(text_of([record(number) for number in range(60)]))
    monkeypatch.setattr(scan, "_scan", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    data = Data(source="instructions", root=str(tmp_path))
    said = with_cores(2, monkeypatch, data, tmp_path, "instruct")
    assert "a process that read rows was killed" in said and "memory" in said


SLOW = """
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background job ignores
from pathlib import Path
from ftlib.core import signals
from ftlib.config.schema import Data
from ftlib.data import scan
from ftlib.data.sources import json_stream
from ftlib.tasks.registry import load_task
from tests.limits import time_limit
json_stream.CHUNK_BYTES = 700
os.sched_getaffinity = lambda process: {0, 1}
read, folder, root = scan._scan, Path(sys.argv[1]), Path(sys.argv[2])
def wait(*arguments):
    (folder / str(os.getpid())).touch()
    while not (root / "go").exists():
        time.sleep(0.05)
    return read(*arguments)
scan._scan = wait
signals.install_handlers()
data = Data(source="instructions", root=sys.argv[2])
print(len(scan.scan_source(data, root / "rows.arrow", load_task("instruct")).rows))
"""


def reading(tmp_path: Path) -> tuple[subprocess.Popen[str], list[int]]:
    """A command and its two reading processes, at work until there is a file `go`."""
    (tmp_path / "data.jsonl").write_text(text_of([record(number) for number in range(60)]))
    (tmp_path / "pids").mkdir()
    command = [sys.executable, "-c", SLOW, str(tmp_path / "pids"), str(tmp_path)]
    started = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    until = time.monotonic() + 60
    while len(list((tmp_path / "pids").iterdir())) < 2:
        assert time.monotonic() < until and started.poll() is None
        time.sleep(0.05)
    return started, [int(path.name) for path in (tmp_path / "pids").iterdir()]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_process_outlives_the_command(how: signal.Signals, tmp_path: Path) -> None:
    command, pids = reading(tmp_path)
    command.send_signal(how)
    if how == signal.SIGINT:  # it waits for what its processes are reading
        (tmp_path / "go").touch()
    command.communicate(timeout=60)
    assert command.returncode == {signal.SIGTERM: EXIT_REQUEUE, signal.SIGINT: -signal.SIGINT}.get(how, -how)
    until = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < until
        time.sleep(0.05)


def test_signals_are_the_command_s(tmp_path: Path) -> None:
    """Slurm sends them to every process: a reading process that ended of one would look like one that was killed."""
    command, pids = reading(tmp_path)
    for pid in pids:
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            os.kill(pid, number)
    (tmp_path / "go").touch()
    output, _ = command.communicate(timeout=60)
    assert (command.returncode, output) == (0, "60\n")


def test_a_fault_in_the_first_chunk_ends_all_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many times: whether the processes are waited for in vain depends on the moment."""
    (tmp_path / "data").mkdir()
    records: list[Any] = [record(0), "{broken", *map(record, range(2, 90))]
    (tmp_path / "data" / "data.jsonl").write_text(text_of(records))
    data = Data(source="instructions", root=str(tmp_path / "data"), prompt="chat", on_bad="skip")
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1, 2})
    with time_limit():
        for _ in range(60):
            scan_source(data, tmp_path / "rows.arrow", load_task("instruct"))
