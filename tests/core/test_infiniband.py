"""InfiniBand that NCCL could not use: devices in a made-up /sys, libraries and providers that lack."""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path

import pytest

from ftlib import doctor
from ftlib.core import infiniband
from ftlib.training import distributed

LIBC = "libc.so.6"
"""A library that every machine has."""


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The root of a machine with an active device and everything that it needs, and another that is down."""
    for name, state in (("mlx5_0", "4: ACTIVE\n"), ("mlx5_1", "1: DOWN\n")):
        port = tmp_path / "sys/class/infiniband" / name / "ports" / "1"
        port.mkdir(parents=True)
        (port / "state").write_text(state)
    (tmp_path / "etc/libibverbs.d").mkdir(parents=True)
    (tmp_path / "etc/libibverbs.d/mlx5.driver").write_text("driver mlx5\n")
    (tmp_path / "dev/infiniband").mkdir(parents=True)
    (tmp_path / "dev/infiniband/uverbs0").touch()
    for name in ("NCCL_IB_DISABLE", "NCCL_NET"):
        monkeypatch.delenv(name, raising=False)
    find = infiniband.find_obstacle
    monkeypatch.setattr(infiniband, "find_obstacle", lambda root, library=LIBC: find(root, library))
    return tmp_path


def no_provider(root: Path) -> None:
    (root / "etc/libibverbs.d/mlx5.driver").unlink()


def no_node(root: Path) -> None:
    (root / "dev/infiniband/uverbs0").unlink()


def test_devices_that_work(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert infiniband.active_devices(machine) == ["mlx5_0"] and infiniband.find_obstacle(machine) is None
    monkeypatch.setattr(resource, "getrlimit", lambda what: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    found = list(doctor.infiniband(machine))
    assert [one.check for one in found] == ["InfiniBand", "memlock"] and not any(one.remedy for one in found)
    monkeypatch.setattr(resource, "getrlimit", lambda what: (8 << 20, 8 << 20))
    assert "memlock" in list(doctor.infiniband(machine))[1].remedy
    assert not list(doctor.infiniband(machine / "empty")), "no device, no line"


@pytest.mark.parametrize(("change", "fault"), [(no_provider, "no provider"), (no_node, "uverbs")])
def test_devices_that_nccl_cannot_use(
    machine: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[Path], None],
    fault: str,
) -> None:
    change(machine)
    first, *_ = doctor.infiniband(machine)
    assert fault in first.state and "ibverbs-providers" in first.remedy and not first.fatal
    distributed.warn_of_sockets(machine)
    assert not capsys.readouterr().err, "one node needs no network"
    monkeypatch.setenv("SLURM_STEP_NUM_NODES", "2")
    distributed.warn_of_sockets(machine)
    told = capsys.readouterr().err
    assert "NCCL uses TCP sockets between the nodes" in told and fault in told and "mlx5_0" in told
    monkeypatch.setenv("SLURM_PROCID", "1")
    distributed.warn_of_sockets(machine)
    assert not capsys.readouterr().err, "only the first rank warns"


def test_settings_and_missing_libraries(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "not installed" in (infiniband.find_obstacle(machine, "libftlib-lacks-this.so.1") or "")
    monkeypatch.setenv("NCCL_NET", "Socket")
    assert infiniband.find_obstacle(machine) == "NCCL_NET=Socket is set"
    monkeypatch.setenv("NCCL_IB_DISABLE", "1")
    assert infiniband.find_obstacle(machine) == "NCCL_IB_DISABLE=1 is set"
