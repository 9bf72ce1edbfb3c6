"""Record what the programs of this machine's Slurm answer to the client: python -m tests.cluster.record

Submits small jobs as the ordinary user, asks about them through `ftlib.slurm.client`, and writes questions and answers
to tests/slurm/recorded/VERSION.json, which tests/slurm/test_versions.py replays. Needs root and the test cluster.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from ftlib.slurm.client import Slurm
from tests.slurm.test_versions import LIMITED, ask, recorded

USER = "ftuser"
JOBS = {
    "done": "--gres=gpu:1 --mem=200 --wrap 'sleep 2'",
    "failed": "--wrap 'exit 75'",
    "memory": "--mem=100 --wrap \"exec python3 -c 'import time; x = bytearray(10**9); time.sleep(9)'\"",
    "cancelled": "--wrap 'sleep 300'",
    "requeued": "--wrap 'sleep 300'",
    "array": "--array=0-3%1 --wrap 'sleep 300'",
    "later": "--begin=now+1hour --wrap true",
    "impossible": "--time=2-0 --wrap true",
    "a|b": "--hold --wrap true",
}
"""Name → options of sbatch."""


def main() -> None:
    os.environ["LOGNAME"] = USER  # the client asks about its user's jobs
    version = _root("sinfo", "--version").split()[1].rpartition(".")[0]
    _root("sacctmgr", "-i", "add", "qos", "limited")
    try:
        _root("sacctmgr", "-i", "modify", "qos", "limited", "set", *LIMITED["qos"])
        _root("sacctmgr", "-i", "modify", "user", USER, "set", "qos+=limited", *LIMITED["user"])
        numbers = {name: _submit(name, options) for name, options in JOBS.items()}
        time.sleep(5)
        _as_user("scancel", numbers["cancelled"])
        _root("scontrol", "requeue", numbers["requeued"])
        time.sleep(35)
        answers: list[tuple[list[str], str]] = []

        def record(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
            done = subprocess.run(["runuser", "-u", USER, "--", *command], capture_output=True, text=True)
            lines = done.stdout.splitlines(keepends=True)
            if list(command[1:]) == ["show", "config"]:  # the rest names this machine
                lines = [line for line in lines if line.startswith(("AccountingStorageEnforce", "MaxArraySize"))]
            answers.append((list(command), "".join(lines)))
            return done

        ask(Slurm(record), numbers)
    finally:
        _root("scancel", "--user", USER)
        unset = [option.partition("=")[0] for option in LIMITED["user"]]
        _root("sacctmgr", "-i", "modify", "user", USER, "set", "qos-=limited", *_cleared(unset))
        _root("sacctmgr", "-i", "delete", "qos", "limited")
    path = recorded(version)
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"jobs": numbers, "answers": answers}, indent=1) + "\n")
    print(path)


def _cleared(options: Sequence[str]) -> list[str]:
    """Return what takes limits back."""
    return [f"{name}=gres/gpu=-1,mem=-1" if name == "MaxTRESPerJob" else f"{name}=-1" for name in options]


def _submit(name: str, options: str) -> str:
    command = f"cd /tmp && sbatch --parsable --output=/dev/null --job-name='{name}' {options}"
    return _as_user("bash", "-c", command).strip()


def _as_user(*command: str) -> str:
    return _root("runuser", "-u", USER, "--", *command)


def _root(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path("/"))
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: {done.stderr or done.stdout}")
    return done.stdout


if __name__ == "__main__":
    main()
