"""The gates again, on the lowest transformers that setup.cfg allows; `make test` lays it beside the environment."""

from __future__ import annotations

import os
import re
import subprocess
import sys

from tests import needs
from tests.conftest import REPOSITORY

LOWEST = os.environ.get("FTLIB_LOWEST_TRANSFORMERS", "")


def test_gates_hold_on_the_lowest_supported_transformers() -> None:
    if not LOWEST:
        needs.lack("lowest")
    bound = re.search(r"transformers>=([\d.]+),", (REPOSITORY / "setup.cfg").read_text())
    assert bound
    environment = {**os.environ, "PYTHONPATH": LOWEST}
    version = [sys.executable, "-c", "import transformers; print(transformers.__version__)"]
    found = subprocess.run(version, env=environment, capture_output=True, text=True, check=True).stdout
    assert found.startswith(bound[1] + ".")
    gates = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-m",
        "gates",
        "-p",
        "no:cacheprovider",
        "tests/memory",
        "tests/models",
        "tests/training",
    ]
    done = subprocess.run(gates, env=environment, capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stdout[-5000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) >= 25
