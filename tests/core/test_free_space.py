"""Is there room? On a small file system of our own where this machine lets us make one."""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from ftlib.core import files
from ftlib.errors import UserError
from tests import needs


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder], capture_output=True)
    if made.returncode:
        needs.lack("mount")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.mount
def test_what_fits_and_what_does_not(small: Path) -> None:
    files.require_space(small / "not" / "there yet", 7_000_000)
    with pytest.raises(UserError, match=r"9\.0 MB are needed and only 8\.4 MB are free") as caught:
        files.require_space(small / "not" / "there yet", 9_000_000)
    assert "nothing has been written yet" in caught.value.remedy
    assert not list(small.iterdir())


@pytest.mark.mount
def test_a_limit_that_free_space_does_not_show(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a quota: the system call meets it."""
    usage = type("Usage", (), {"free": 10**12})
    monkeypatch.setattr("shutil.disk_usage", lambda place: usage)
    files.require_space(small, 7_000_000)
    with pytest.raises(UserError, match="a quota leaves less"):
        files.require_space(small, 9_000_000)
    assert not list(small.iterdir())


def test_where_nothing_can_be_reserved_free_space_has_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files.ctypes, "CDLL", lambda *arguments, **options: object())
    files.require_space(tmp_path, 1000)
    free = os.statvfs(tmp_path)
    with pytest.raises(UserError, match="are free"):
        files.require_space(tmp_path, 2 * free.f_blocks * free.f_frsize)
    assert ctypes is files.ctypes


@pytest.mark.mount
def test_nothing_needs_no_room(small: Path) -> None:
    (small / "full").write_bytes(b"x" * 8 * 1024 * 1024)
    files.require_space(small, 0)
