"""Store and temporary folder: speed, clock, kind."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from ftlib import doctor


def found(check: str) -> tuple[str, str]:
    return next((one.state, one.remedy) for one in [*doctor.roots(), *doctor.local_temporary()] if one.check == check)


def test_speed_and_clock(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state, _ = found("store speed")
    assert state.endswith(" MB/s written")
    assert found("store clock") == ("agrees with this machine's", "")
    assert not [path for path in store.rglob(".*") if path.is_file()]
    monkeypatch.setattr(doctor, "_SLOW", 1e15)
    assert "save less often" in found("store speed")[1]


def test_a_full_quota_is_a_finding(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file without content can still be made."""

    def full(handle: int) -> None:
        if os.fstat(handle).st_size > 1 << 20:
            raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(os, "fsync", full)
    (last,) = [one for one in doctor.roots() if one.fatal]
    assert last.check == "store" and "no space left" in last.state and last.remedy


def test_a_clock_that_is_off(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = time.time
    monkeypatch.setattr(doctor.time, "time", lambda: real() + 90)
    state, remedy = found("store clock")
    assert state.startswith(("the storage is -90 s", "the storage is -89 s")) and "set the clocks" in remedy


@pytest.mark.parametrize(
    ("mounts", "free", "remedy"),
    [
        ("/dev/sda1 / ext4 rw 0 0\n", 10e9, ""),
        ("/dev/sda1 / ext4 rw 0 0\n", 1e9, "little room"),
        ("/dev/sda1 / ext4 rw 0 0\ntmpfs /a\\040b tmpfs rw 0 0\n", 1e9, "in memory and small"),
        ("/dev/sda1 / ext4 rw 0 0\nhost:/x /a\\040b nfs4 rw 0 0\n", 1e13, "on the network"),
        ("/dev/sda1 / ext4 rw 0 0\nhost:/x /a nfs4 rw 0 0\n", 1e13, ""),
    ],
)
def test_the_temporary_folder(monkeypatch: pytest.MonkeyPatch, mounts: str, free: float, remedy: str) -> None:
    monkeypatch.setattr(doctor.tempfile, "gettempdir", lambda: "/a b/tmp")
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: SimpleNamespace(free=free))
    monkeypatch.setattr(doctor.Path, "read_text", lambda path: mounts)
    (one,) = doctor.local_temporary()
    assert remedy in one.remedy and bool(one.remedy) is bool(remedy)
