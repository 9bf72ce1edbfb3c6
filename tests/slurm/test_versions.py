"""The client reads the output of Slurm 22.05 and of 24.11 alike, as tests/cluster/record.py recorded it."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from ftlib.runs.usage import Allocation
from ftlib.slurm.client import Job, JobLimit, NodeKind, Slurm
from ftlib.slurm.pending import pending_remedy

VERSIONS = ("22.05", "24.11")
LIMITED = {
    "qos": ("MaxWall=00:10:00", "MaxTRESPerJob=gres/gpu=1,mem=4G", "MaxTRESPerUser=cpu=2", "MaxSubmitJobsPerUser=5"),
    "user": ("MaxWall=1-00:00:00", "MaxTRESPerJob=gres/gpu=2,mem=8G", "MaxSubmitJobs=20"),
}
"""Limits of the QOS `limited`, and of the user's association."""


def recorded(version: str) -> Path:
    """The file of a version's answers."""
    return Path(__file__).parent / "recorded" / f"{version}.json"


def ask(slurm: Slurm, numbers: Mapping[str, str]) -> dict[str, Any]:
    """Everything that the client can tell of the recorded jobs and the cluster."""
    array = numbers["array"]
    ids = {**numbers, **{f"array {index}": f"{array}_{index}" for index in range(4)}}
    del ids["array"]
    found = slurm.jobs(ids.values())
    own = slurm.jobs(ids.values(), own=True)
    return {
        "jobs": {name: found.get(number) for name, number in ids.items()},
        "own": {name: own.get(number) for name, number in ids.items()},
        "names": slurm.find_by_name(list(numbers), 0.0),
        "allocations": slurm.allocations(ids.values()),
        "partitions": slurm.partitions(),
        "room": [slurm.remaining_submit_quota("tests", "low", qos) for qos in (None, "limited")],
        "limits": [slurm.job_limits("tests", "low", qos, "N/A") for qos in (None, "limited")],
        "array size": slurm.max_array_size(),
        "has jobs": slurm.has_jobs(),
    }


def _key(command: Sequence[str]) -> tuple[str, ...]:
    """A command without its day, which depends on the time zone."""
    return tuple(word for before, word in zip(["", *command], command, strict=False) if before != "-S")


def replay(version: str, enforced: str) -> tuple[dict[str, Any], dict[str, str]]:
    """What the client makes of a version's answers, and the numbers of the jobs."""
    stored = json.loads(recorded(version).read_text())
    answers = {_key(command): text for command, text in stored["answers"]}

    def run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
        text = re.sub(r"(?m)^(AccountingStorageEnforce +=) .*", rf"\1 {enforced}", answers[_key(command)])
        return subprocess.CompletedProcess(command, 0, text, "")

    return ask(Slurm(run), stored["jobs"]), stored["jobs"]


@pytest.fixture(autouse=True)
def as_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOGNAME", "ftuser")


@pytest.mark.parametrize("version", VERSIONS)
def test_states_of_jobs(version: str) -> None:
    found, numbers = replay(version, "associations,limits,qos")
    told: dict[str, Job] = found["jobs"]
    assert found["own"] == told and found["names"] == numbers and found["has jobs"]
    assert {name: [one.state for one in job.attempts] for name, job in told.items()} == {
        "done": ["COMPLETED"],
        "failed": ["FAILED"],
        "memory": ["OUT_OF_MEMORY"],
        "cancelled": ["CANCELLED"],
        "requeued": ["REQUEUED", "RUNNING"],
        **{name: ["PENDING"] for name in ("later", "impossible", "a|b", "array 1", "array 2", "array 3")},
        "array 0": ["RUNNING"],
    }
    last = {name: job.last_attempt for name, job in told.items()}
    waiting = {name: one.reason for name, one in last.items() if one.state == "PENDING"}
    assert waiting == {
        "later": "BeginTime",
        "impossible": "PartitionTimeLimit",
        "a|b": "JobHeldUser",
        **dict.fromkeys(("array 1", "array 2", "array 3"), "JobArrayTaskLimit"),
    }
    assert pending_remedy(waiting["impossible"]) and pending_remedy(waiting["a|b"])
    assert (last["done"].exit_code, last["failed"].exit_code, last["requeued"].exit_code) == (0, 75, None)
    assert last["cancelled"].by.isdigit() and last["cancelled"].node in ("n1", "n2") and last["later"].node == ""
    assert last["done"].seconds >= 2 and told["requeued"].attempts[0].seconds >= 3


@pytest.mark.parametrize("version", VERSIONS)
def test_allocations(version: str) -> None:
    found, numbers = replay(version, "none")
    named = {number: name for name, number in numbers.items()}
    starts: dict[str, list[Allocation]] = {}
    for one in found["allocations"]:
        starts.setdefault(named.get(one.job.partition("_")[0], ""), []).append(one)
    assert {name: len(own) for name, own in starts.items()} == {
        "done": 1, "failed": 1, "memory": 1, "cancelled": 1, "requeued": 2, "array": 1}  # fmt: skip
    (done,) = starts["done"]
    assert (done.gpus, done.cpus) == (1, 1) and done.cpu_seconds is not None and done.seconds >= 2
    first, second = starts["requeued"]
    assert first.end <= second.start and second.queued > 10 and second.cpu_seconds is None and first.gpus is None


@pytest.mark.parametrize("version", VERSIONS)
def test_partitions_and_limits(version: str) -> None:
    found, _ = replay(version, "associations,limits,qos")
    partitions, nodes = found["partitions"]
    for name, default in (("low", "YES"), ("high", "NO")):
        facts = {key: partitions[name].get(key) for key in ("Default", "State", "MaxTime", "MaxNodes", "TotalNodes")}
        assert facts == {
            "Default": default, "State": "UP", "MaxTime": "1-00:00:00", "MaxNodes": "UNLIMITED", "TotalNodes": "2"
        }  # fmt: skip
        for key in ("AllowAccounts", "AllowQos", "AllowGroups"):
            assert partitions[name][key] == "ALL"
        assert {partitions[name][key] for key in ("MaxMemPerNode", "MaxCPUsPerNode")} == {"UNLIMITED"}
        assert nodes[name] == [NodeKind(4, 12000.0, 2)]
    assert found["array size"] == 1001
    plain, limited = ({(one.limit, one.resource): one for one in limits} for limits in found["limits"])
    own = "your association with account tests"
    assert plain == {
        ("MaxWall", "time"): JobLimit(own, "MaxWall", "time", "1-00:00:00"),
        ("MaxTRESPerJob", "gres/gpu"): JobLimit(own, "MaxTRESPerJob", "gres/gpu", "2"),
        ("MaxTRESPerJob", "mem"): JobLimit(own, "MaxTRESPerJob", "mem", "8G"),
    }
    assert limited == {
        ("MaxWall", "time"): JobLimit("QOS limited", "MaxWall", "time", "00:10:00"),
        ("MaxTRESPerJob", "gres/gpu"): JobLimit("QOS limited", "MaxTRESPerJob", "gres/gpu", "1"),
        ("MaxTRESPerJob", "mem"): JobLimit("QOS limited", "MaxTRESPerJob", "mem", "4G"),
        ("MaxTRESPerUser", "cpu"): JobLimit("QOS limited", "MaxTRESPerUser", "cpu", "2"),
    }
    assert found["room"] == [12, 5], "eight wait or run"


@pytest.mark.parametrize("version", VERSIONS)
def test_without_enforcement_there_are_no_limits(version: str) -> None:
    found, _ = replay(version, "associations")
    assert found["limits"] == [[], []] and found["room"] == [None, None]
