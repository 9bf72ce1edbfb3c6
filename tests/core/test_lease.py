"""One living owner of a folder."""

import json
import multiprocessing
import os
import socket
import subprocess
import sys
import time
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

from ftlib.core import lease
from ftlib.errors import UserError


def owner(folder: Path, **changes: object) -> None:
    content = {"host": "elsewhere", "pid": 1, "started": "1", "job": None, "token": "x", **changes}
    (folder / "owner.json").write_text(json.dumps(content))


def test_a_living_process_of_this_host_keeps_its_folder(tmp_path: Path) -> None:
    code = "import sys, time; from pathlib import Path; from ftlib.core.lease import acquire_lease\n"
    code += "with acquire_lease(Path(sys.argv[1])):\n print('mine', flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, text=True)
    assert holder.stdout and holder.stdout.readline() == "mine\n"
    with (
        pytest.raises(UserError, match=f"process {holder.pid} on {socket.gethostname()}"),
        lease.acquire_lease(tmp_path),
    ):
        pass
    holder.kill()
    holder.wait()
    with lease.acquire_lease(tmp_path):
        assert json.loads((tmp_path / "owner.json").read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_a_reused_process_number_is_not_the_owner(tmp_path: Path) -> None:
    owner(tmp_path, host=socket.gethostname(), pid=os.getpid(), started="1")
    with lease.acquire_lease(tmp_path):
        pass


def test_another_host_is_alive_while_its_heart_beats(tmp_path: Path) -> None:
    owner(tmp_path)
    with pytest.raises(UserError, match="process 1 on elsewhere"), lease.acquire_lease(tmp_path):
        pass
    past = time.time() - lease.STALE_SECONDS - 5
    os.utime(tmp_path / "owner.json", (past, past))
    with lease.acquire_lease(tmp_path):
        pass


def test_a_requeued_job_takes_over_from_itself_on_another_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    owner(tmp_path, job="77")
    monkeypatch.setenv("SLURM_JOB_ID", "78")
    with pytest.raises(UserError, match="Slurm job 77"), lease.acquire_lease(tmp_path):
        pass
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    with lease.acquire_lease(tmp_path):
        pass


def test_who_has_lost_the_folder_ends(tmp_path: Path) -> None:
    code = "import sys, time; from pathlib import Path; from ftlib.core import lease\nlease.HEARTBEAT_SECONDS = 0.1\n"
    code += "with lease.acquire_lease(Path(sys.argv[1])):\n print('mine', flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, text=True)
    assert holder.stdout and holder.stdout.readline() == "mine\n"
    owner(tmp_path, host="another-node")
    assert holder.wait(timeout=20) == 1
    assert json.loads((tmp_path / "owner.json").read_text())["host"] == "another-node"


def _race(folder: Path, results: "multiprocessing.Queue[bool]", over: Event) -> None:
    try:
        with lease.acquire_lease(folder):
            results.put(True)
            over.wait(30)  # on a busy machine some racers begin late
    except UserError:
        results.put(False)


def test_of_many_that_take_over_a_dead_owners_folder_one_gets_it(tmp_path: Path) -> None:
    for _ in range(3):
        owner(tmp_path, host=socket.gethostname(), pid=2**22 + 1)
        results: multiprocessing.Queue[bool] = multiprocessing.Queue()
        over = multiprocessing.Event()
        racers = [multiprocessing.Process(target=_race, args=(tmp_path, results, over)) for _ in range(8)]
        for racer in racers:
            racer.start()
        won = [results.get(timeout=30) for _ in racers]
        over.set()
        for racer in racers:
            racer.join()
        assert sum(won) == 1
        assert list(tmp_path.iterdir()) == []
