"""Every user's mistake: exit 2, a plain message with its place, no traceback, nothing half-written."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from ftlib.data.dataset import SplitRows
from tests import needs
from tests.conftest import FULL, start_ftlib

Ftlib = Callable[..., tuple[int, str, str]]
WriteConfig = Callable[..., Path]


def refused(result: tuple[int, str, str], *messages: str) -> None:
    code, _, error = result
    assert code == 2, error
    assert "Traceback" not in error
    for message in messages:
        assert re.search(message, error), error


@pytest.mark.parametrize(
    ("replace", "message"),
    [
        (("seed: 3", "sed: 3"), r"config.yaml:3: sed: unknown key; did you mean seed\?"),
        (("seed: 3", "seed: three"), r"config.yaml:3: seed: must be a whole number, got 'three'"),
        (("seed: 3", "seed: [3"), r"config.yaml:\d+: not valid YAML"),
        (("max_steps: 12", "output_dir: x"), r"config.yaml:11: training.output_dir: ftlib sets this field itself"),
        (("max_steps: 12", "warmup_ratio: 0.1"), r"config.yaml:11: training.warmup_ratio: no longer exists"),
        (("max_steps: 12", "per_device_train_batch_size: -2"), r"duplicate key"),
        (("train_batch_size: 2", "train_batch_size: -2"), r"config.yaml:12: .*must be greater than 0, got -2"),
    ],
)
@pytest.mark.parametrize("command", ["stage", "prepare", "train", "evaluate", "submit"])
def test_configs(
    store: Path, write_config: WriteConfig, ftlib: Ftlib, command: str, replace: tuple[str, str], message: str
) -> None:
    refused(ftlib(command, write_config(replace=replace)), message)
    assert not [path for path in store.rglob("*") if path.is_file()]


def test_missing_files(store: Path, write_config: WriteConfig, ftlib: Ftlib, tmp_path: Path) -> None:
    refused(ftlib("train", tmp_path / "cnfig.yaml"), "no such config file")
    refused(
        ftlib("prepare", write_config(root=str(tmp_path / "nowhere"))), "nowhere/data.jsonl: no such file", "data.root"
    )
    refused(ftlib("train", write_config()), "is not prepared", "ftlib prepare CONFIG")
    refused(ftlib("evaluate", "nosuchrun"), "nosuchrun: no such run")
    refused(ftlib("evaluate", write_config()), "not trained yet")
    refused(ftlib("tarin", "x"), r"tarin: no such command", r"Did you mean train\?")


@pytest.fixture
def data(tmp_path: Path, shared: Path) -> Path:
    """A private copy of the data that a test may damage."""
    shutil.copytree(shared / "data", tmp_path / "data")
    return tmp_path / "data"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{not json", r"data.jsonl:61: not JSON"),
        ("[1]", r"data.jsonl:61: not a JSON object"),
        ('{"image": "images/0001.png", "prefix": ""}', r"data.jsonl:61: field suffix: is missing"),
        ('{"prefix": "", "suffix": "1"}', r"data.jsonl:61: field image: is missing"),
        ('{"image": "images/0001.png", "prefix": "", "suffix": " "}', r"data.jsonl:61: field suffix: is empty"),
        (
            '{"image": "images/0001.png", "prefix": "", "suffix": true}',
            r"data.jsonl:61: field suffix: must be text, got True",
        ),
        ('{"id": "0001", "image": "images/0001.png", "prefix": "", "suffix": "1"}', r"duplicate of '0001' in line 2"),
        (b'{"image": "\xff"}', r"data.jsonl:61: not UTF-8"),
        ('{"image": "images/none.png", "prefix": "", "suffix": "1"}', r"row \w+: .*none.png: no such image"),
        ('{"image": "../secret.png", "prefix": "", "suffix": "1"}', r"row \w+: .*is outside the data folder"),
        ('{"image": "images/../../x.png", "prefix": "", "suffix": "1"}', r"is outside the data folder"),
        ('{"image": "/etc/passwd", "prefix": "", "suffix": "1"}', r"is outside the data folder"),
    ],
)
def test_rows(
    store: Path, write_config: WriteConfig, ftlib: Ftlib, data: Path, line: str | bytes, message: str
) -> None:
    with (data / "data.jsonl").open("ab") as file:
        file.write((line.encode() if isinstance(line, str) else line) + b"\n")
    refused(ftlib("prepare", write_config(root=str(data))), message)
    assert not [path for path in store.rglob("*") if path.is_file()]


def test_an_empty_prefix_is_legal(store: Path, write_config: WriteConfig, ftlib: Ftlib, data: Path) -> None:
    rows = [{**json.loads(line), "prefix": ""} for line in (data / "data.jsonl").read_text().splitlines()]
    (data / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert ftlib("prepare", write_config(root=str(data)))[0] == 0


def bomb(path: Path) -> None:
    """A valid PNG header of 60,000 × 60,000 pixels with hardly any data."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:90]), "truncated or damaged image"),
        (lambda path: path.write_bytes(path.read_bytes()[:20]), "(truncated or damaged image|not an image)"),
        (lambda path: path.write_text("no picture"), "not an image of a supported format"),
        (lambda path: path.write_text(""), "not an image of a supported format"),
        (bomb, "pixels"),
        (lambda path: path.unlink(), "no such image"),
        (lambda path: (path.unlink(), path.mkdir()), "damaged"),
    ],
)
def test_images(
    store: Path, write_config: WriteConfig, ftlib: Ftlib, data: Path, damage: Callable[[Path], object], message: str
) -> None:
    damage(data / "images" / "0007.png")
    refused(ftlib("prepare", write_config(root=str(data))), f"row 0007: .*0007.png: .*{message}")
    refused(ftlib("prepare", write_config(root=str(data)), "--check"), "row 0007")
    assert not [path for path in store.rglob("*") if path.is_file()]


def test_pictures_that_are_replaced_after_they_were_prepared(
    store: Path, write_config: WriteConfig, ftlib: Ftlib, data: Path
) -> None:
    """Two that are exchanged have the same names and sizes as before, and the labels of each other."""
    config = write_config(FULL, root=str(data))
    assert ftlib("prepare", config)[0] == 0
    learned = SplitRows(next(store.glob("prepared/*/train")))[:2]
    one, other = (data / row.image for row in learned)
    contents = one.read_bytes(), other.read_bytes()
    one.write_bytes(contents[1])
    other.write_bytes(contents[0])
    told = "the file has changed since the dataset was prepared"
    refused(ftlib("train", config), f"row {learned[0].id}: .*{one.name}: {told}", "--again")
    one.write_bytes(contents[0])
    other.write_bytes(contents[1])
    assert ftlib("train", config)[0] == 0
    asked = data / SplitRows(next(store.glob("prepared/*/valid")))[0].image
    asked.write_bytes(contents[0])
    refused(ftlib("evaluate", config), f"{asked.name}: {told}")


def test_all_faulty_rows_are_listed(store: Path, write_config: WriteConfig, ftlib: Ftlib, data: Path) -> None:
    for number in range(30):
        (data / "images" / f"{number:04d}.png").unlink()
    code, _, error = ftlib("prepare", write_config(root=str(data)))
    assert code == 2
    assert error.count("no such image") == 20 and "… and 10 more" in error


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("processor_config.json", "no PaliGemma processor can be read from it"),
        ("tokenizer.json", "processor and model do not belong together"),
        ("config.json", "config.json is missing"),
        ("model.safetensors", "the model cannot be loaded"),
    ],
)
def test_incomplete_models(
    store: Path, write_config: WriteConfig, ftlib: Ftlib, shared: Path, tmp_path: Path, missing: str, message: str
) -> None:
    shutil.copytree(shared / "model", tmp_path / "model")
    (tmp_path / "model" / missing).unlink()
    config = write_config(base=str(tmp_path / "model"))
    assert ftlib("prepare", config)[0] == 0
    refused(ftlib("train", config), message)
    refused(ftlib("evaluate", config, "--before"), message)
    assert not list((store / "runs").rglob("owner.*"))


def test_models_that_are_not_there(store: Path, write_config: WriteConfig, ftlib: Ftlib, tmp_path: Path) -> None:
    config = write_config(base="ftlib/tiny-paligemma")
    assert ftlib("prepare", config)[0] == 0
    refused(ftlib("train", config), "ftlib/tiny-paligemma is not in the store", "ftlib stage CONFIG")
    refused(
        ftlib("train", write_config(base="google/paligemma-3b-pt-224")),
        "is not in the store",
        "ftlib stage CONFIG",
    )
    refused(ftlib("train", write_config(base=str(tmp_path / "none"))), "no such folder")
    refused(ftlib("stage", write_config(base="ftlib/none")), "no such embedded model", "ftlib/tiny-paligemma")


def test_a_prompt_with_an_unknown_field(store: Path, write_config: WriteConfig, ftlib: Ftlib) -> None:
    told = "data.jsonl:1: field question: is missing, but data.prompt uses it; available: prefix"
    refused(ftlib("prepare", write_config(), "data.prompt=answer {question}"), told)


def test_a_run_that_another_living_process_owns(store: Path, write_config: WriteConfig, ftlib: Ftlib) -> None:
    config = write_config()
    assert ftlib("prepare", config)[0] == 0
    first = start_ftlib("train", config, "training.max_steps=100000")
    metrics = None
    while first.poll() is None and not metrics:
        metrics = list((store / "runs").glob("*/*/*/metrics.jsonl"))
        time.sleep(0.05)
    try:
        refused(
            ftlib("train", config, "training.max_steps=100000"),
            rf"another process is working on it: process {first.pid}",
        )
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()


def test_a_store_that_is_a_file(
    tmp_path: Path, write_config: WriteConfig, ftlib: Ftlib, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FTLIB_STORE", str(tmp_path / "file"))
    refused(ftlib("prepare", write_config()), "file.*not writable", "FTLIB_STORE")
    refused(ftlib("train", write_config()), "not writable|is not prepared")


def in_small_store(size: str, script: str) -> subprocess.CompletedProcess[str]:
    """Run shell commands with a tmpfs of this size as the store, in a mount namespace of their own."""
    namespace = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--map-root-user", "--mount"]
    if subprocess.run([*namespace, "true"], capture_output=True).returncode:
        needs.lack("mount")
    mount = f'set -e; mkdir -p "$FTLIB_STORE"; mount -t tmpfs -o size={size} tmpfs "$FTLIB_STORE"; '
    script = mount + script.replace("ftlib ", f"'{sys.executable}' -m ftlib ")
    return subprocess.run([*namespace, "sh", "-c", script], capture_output=True, text=True)


FILL = """(cd "$FTLIB_STORE"; until ls runs/*/*/*/checkpoints/*/*/COMPLETE.json; do sleep 0.1; done > seen 2>&1
cat /dev/zero > filler 2> /dev/null || true) & """
"""Takes all the room as soon as there is a checkpoint."""


@pytest.mark.mount
@pytest.mark.parametrize(
    ("size", "before_training", "message"),
    [
        ("8k", "", "no space left"),
        ("12m", "", r"[1-9][\d.]* MB are needed and only [1-9][\d.]* MB are free"),
        ("60m", FILL, "no space left"),
    ],
)
def test_no_space_left(store: Path, write_config: WriteConfig, size: str, before_training: str, message: str) -> None:
    """8 kB do not even hold the prepared data, 12 MB no checkpoint; in 60 MB it gets tight while training."""
    config = write_config(FULL)
    train = f"{before_training}ftlib train {config} training.max_steps=1000"
    done = in_small_store(size, f"ftlib prepare {config}; {train}; echo unreachable")
    assert done.returncode == 2, done.stderr
    assert re.search(message, done.stderr) and "Traceback" not in done.stderr
    assert ("step: " in done.stderr) == bool(before_training)


@pytest.mark.mount
def test_a_read_only_store(store: Path, write_config: WriteConfig) -> None:
    config = write_config(FULL)
    script = f'ftlib prepare {config}; mount -o remount,ro "$FTLIB_STORE"; ftlib train {config}'
    done = in_small_store("50m", script)
    assert done.returncode == 2, done.stderr
    assert "not writable" in done.stderr and "Traceback" not in done.stderr


def test_debug_shows_the_traceback(store: Path, tmp_path: Path) -> None:
    process = start_ftlib("train", tmp_path / "none.yaml", "--debug")
    assert "Traceback" in process.communicate()[1]
