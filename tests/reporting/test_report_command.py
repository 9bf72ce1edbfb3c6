"""`ftlib report` as a user calls it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from ftlib.runs import Run

Ftlib = Callable[..., tuple[int, str, str]]
HEAVY = {"torch", "transformers", "numpy", "matplotlib", "jinja2", "PIL", "sklearn", "peft"}
PROBE = f"""
import sys
from ftlib.__main__ import main
code = main(["report", "pets"])
sys.exit(code or sorted({HEAVY} & set(sys.modules)) or 0)
"""


def test_writes_into_the_run_folder_and_prints_where(finished: Run, ftlib: Ftlib) -> None:
    code, out, _ = ftlib("report", "pets")
    assert code == 0
    assert out.strip() == str(finished.report)
    assert finished.report.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


def test_writes_where_it_is_told(finished: Run, ftlib: Ftlib, tmp_path: Path) -> None:
    target = tmp_path / "new" / "page.html"
    code, out, _ = ftlib("report", finished.folder, "-o", target)
    assert (code, out.strip()) == (0, str(target))
    assert target.is_file()
    assert not finished.report.exists()


def test_unknown_run_is_the_users_mistake(finished: Run, ftlib: Ftlib) -> None:
    code, out, err = ftlib("report", "cats")
    assert (code, out) == (2, "")
    assert "no such run" in err
    assert "pets" in err


def test_needs_only_the_light_install(finished: Run) -> None:
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
