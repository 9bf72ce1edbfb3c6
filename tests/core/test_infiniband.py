"""InfiniBand that NCCL could not use: devices in a made-up /sys, libraries and providers that lack."""

from __future__ import annotations

import os
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
    for name in ("NCCL_DEBUG", "NCCL_IB_DISABLE", "NCCL_NET"):
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
    connect(machine)
    assert not capsys.readouterr().err, "one node needs no network"
    monkeypatch.setenv("SLURM_STEP_NUM_NODES", "2")
    connect(machine)
    told = capsys.readouterr().err
    assert "NCCL uses TCP sockets between the nodes" in told and fault in told and "mlx5_0" in told
    monkeypatch.setenv("SLURM_PROCID", "1")
    connect(machine)
    assert not capsys.readouterr().err, "only the first rank warns"


def connect(machine: Path, log: str = "") -> None:
    """What ranks do first; NCCL writes its log where it is told to."""
    with distributed.warn_of_sockets(machine):
        if log:
            assert os.environ["NCCL_DEBUG"] == "INFO" and "INIT" in os.environ["NCCL_DEBUG_SUBSYS"]
            Path(os.environ["NCCL_DEBUG_FILE"]).write_text(log)


SOCKETS_2_19 = """\
n1:2744:2744 [0] NCCL INFO Bootstrap : Using ens7:10.128.0.32<0>
n1:2744:2744 [0] NCCL INFO NET/Plugin: Failed to find ncclNetPlugin_v7 symbol.
n1:2744:2744 [0] NCCL INFO cudaDriverVersion 12000
NCCL version 2.19.3+cuda12.3
n1:2744:2745 [0] NCCL INFO NET/IB : No device found.
n1:2744:2745 [0] NCCL INFO NET/Socket : Using [0]ens7:10.128.0.32<0>
n1:2744:2745 [0] NCCL INFO Using non-device net plugin version 0
n1:2744:2745 [0] NCCL INFO Using network Socket
"""
IB_2_19 = """\
n1:4607:4607 [0] NCCL INFO Bootstrap : Using enp220s0np0:11.1.128.136<0>
n1:4607:4607 [0] NCCL INFO cudaDriverVersion 12000
NCCL version 2.19.3+cuda12.3
n1:4607:4608 [0] NCCL INFO NET/IB : Using [0]mlx5_10:1/RoCE [1]mlx5_11:1/RoCE [RO]; OOB enp220s0np0:11.1.128.136<0>
n1:4607:4608 [0] NCCL INFO Using non-device net plugin version 0
n1:4607:4608 [0] NCCL INFO Using network IB
"""
PLUGIN_2_22 = "n1:5665:5733 [2] NCCL INFO Using network IBext_v8\n"
SOCKETS_WITH_GIN = """\
n1:2545:2546 [0] NCCL INFO Failed to initialize NET plugin IB
n1:2545:2546 [0] NCCL INFO NET/Socket : Using [0]enp3s0:192.168.1.2<0>
n1:2545:2546 [0] NCCL INFO Initialized NET plugin Socket
n1:2545:2546 [0] NCCL INFO Assigned NET plugin Socket to comm
n1:2545:2546 [0] NCCL INFO GIN/Plugin: Could not find: libnccl-gin.so
n1:2545:2546 [0] NCCL INFO Using network Socket
"""
"""Logs of NCCL with other hosts' names, and of RCCL, AMD's version of it."""


@pytest.mark.parametrize(
    ("log", "network"), [(SOCKETS_2_19, "Socket"), (IB_2_19, "IB"), (PLUGIN_2_22, "IBext_v8"),
                         (SOCKETS_WITH_GIN, "Socket"), ("NCCL version 2.28.3\n", None)]
)  # fmt: skip
def test_what_nccl_chose_counts(
    machine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], log: str, network: str | None
) -> None:
    """Nothing seems to lack here; then there is no provider, which a network plugin may not need."""
    assert infiniband.network_in_log(log) == network
    before = dict(os.environ)
    monkeypatch.setenv("SLURM_STEP_NUM_NODES", "2")
    for change, fault in ((lambda root: None, "NCCL_DEBUG=INFO shows why"), (no_provider, "no provider is listed")):
        change(machine)
        connect(machine, log)
        told = capsys.readouterr().err
        assert ("uses TCP sockets" in told and fault in told) == (
            network == "Socket" or (network is None and change is no_provider)
        )
    assert {**os.environ, "SLURM_STEP_NUM_NODES": ""} == {**before, "SLURM_STEP_NUM_NODES": ""}
    monkeypatch.setenv("NCCL_DEBUG", "WARN")
    connect(machine)
    assert "no provider" in capsys.readouterr().err and os.environ["NCCL_DEBUG"] == "WARN", "the user's setting stays"


def test_settings_and_missing_libraries(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "not installed" in (infiniband.find_obstacle(machine, "libftlib-lacks-this.so.1") or "")
    monkeypatch.setenv("NCCL_NET", "Socket")
    assert infiniband.find_obstacle(machine) == "NCCL_NET=Socket is set"
    monkeypatch.setenv("NCCL_IB_DISABLE", "1")
    assert infiniband.find_obstacle(machine) == "NCCL_IB_DISABLE=1 is set"
