"""What a process sets up before torch is imported."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from ftlib.core import environment, files
from ftlib.core.text import format_gib, format_size

NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
SEGMENTS = "expandable_segments:True"


@pytest.mark.parametrize(
    ("torch", "given", "expected"),
    [
        ("2.11.0+cu130", {}, {NAMES[0]: SEGMENTS}),
        ("2.6.0", {}, {NAMES[1]: SEGMENTS}),
        ("2.11.0", {NAMES[1]: "max_split_size_mb:128"}, {NAMES[1]: "max_split_size_mb:128"}),
        ("2.6.0", {NAMES[0]: ""}, {NAMES[0]: ""}),
        (None, {}, {}),
    ],
)
def test_segments_are_expandable_unless_the_user_says_otherwise(
    torch: str | None, given: dict[str, str], expected: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in NAMES:
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(environment, "package_version", lambda name: torch)
    environment.prefer_expandable_segments()
    assert {name: os.environ[name] for name in NAMES if name in os.environ} == expected


def test_one_name_of_this_host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As Slurm calls it: in records of a run's environment and in names of unfinished files, too."""
    monkeypatch.setenv("SLURMD_NODENAME", "node7")
    assert environment.host_name() == environment.describe_environment()["host"] == "node7"
    with files.atomic_directory(tmp_path / "x") as folder:
        assert folder.name.startswith("x.tmp-node7-")
    monkeypatch.delenv("SLURMD_NODENAME")
    assert environment.host_name() == socket.gethostname()


def test_sizes_in_words() -> None:
    assert [format_size(size) for size in (3_000_000, 999_999_999, 1_250_000_000)] == ["3.0 MB", "1000.0 MB", "1.2 GB"]
    assert [format_gib(5 << 28), format_gib(5 << 28, 1), format_gib(80 << 30, 0)] == ["1.25 GiB", "1.2 GiB", "80 GiB"]
