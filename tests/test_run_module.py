"""`run_module.py`: modules come from the package's own place, never from the working folder, in every Python."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ftlib import run_module
from tests import isolation
from tests.conftest import REPOSITORY

PROBE = """
import csv, json, multiprocessing, os, signal, sys, uuid
import ftlib
if __name__ == "__main__":
    if sys.version_info >= (3, 11):  # what libraries start: Python 3.10 knows no PYTHONSAFEPATH
        process = multiprocessing.get_context("spawn").Process(target=os.getcwd)
        process.start()
        process.join()
        assert process.exitcode == 0
    print(json.dumps([ftlib.__file__, os.getcwd(), sys.argv, sys.path]))
    sys.exit(75)
"""
HOSTILE = "import sys; sys.exit('a module of the working folder ran')\n"
NAMES = ("csv.py", "json.py", "uuid.py", "runpy.py", "pathlib.py", "signal.py", "pickle.py", "ftlib/__init__.py")


def pythons() -> list[str]:
    """This Python, and the others of this machine that work (a version manager's may be an empty promise)."""
    names = (f"python3.{minor}" for minor in range(10, 15))
    others = [program for name in names if (program := isolation.program_of_machine(name))]
    return [
        sys.executable,
        *(each for each in others if not subprocess.run([each, "-V"], capture_output=True).returncode),
    ]


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A package called ftlib with a probe in it; and a working folder, `here`, with modules that must not run."""
    folder = tmp_path / "a clone" / "ftlib"
    folder.mkdir(parents=True)
    shutil.copy(REPOSITORY / "ftlib" / "run_module.py", folder)
    (folder / "__init__.py").write_text("")
    (folder / "probe.py").write_text(PROBE)
    (tmp_path / "here" / "ftlib").mkdir(parents=True)
    for name in NAMES:
        (tmp_path / "here" / name).write_text(HOSTILE)
    return folder


@pytest.mark.parametrize("safe", ["", "1"])
def test_the_working_folder_is_no_place_for_modules(package: Path, tmp_path: Path, safe: str) -> None:
    environment = {**os.environ, "PYTHONSAFEPATH": safe, "PYTHONPATH": str(package.parent)}
    for python in pythons():
        command = [python, str(package / "run_module.py"), "-u", "-m", "ftlib.probe", "-m", "x y"]
        done = subprocess.run(command, cwd=tmp_path / "here", env=environment, capture_output=True, text=True)
        assert done.returncode == 75, f"{python}: {done.stderr}"
        file, folder, arguments, path = json.loads(done.stdout)
        assert Path(file) == package / "__init__.py"
        assert folder == str(tmp_path / "here"), "relative paths count from there all the same"
        assert arguments == [str(package / "probe.py"), "-m", "x y"]
        assert path[0] == str(package.parent) and not {"", str(tmp_path / "here"), str(package)} & set(path)


def test_installed_packages_stay_behind_the_standard_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Among them are old copies of parts of it."""
    places = ["/a clone/ftlib", "/standard", "/site-packages", "/other"]
    monkeypatch.setattr(sys, "path", list(places))
    monkeypatch.setattr(sys, "flags", type("Flags", (), {"isolated": 0, "safe_path": False}))
    monkeypatch.setattr(run_module, "_PACKAGES", "/site-packages")
    monkeypatch.setattr("site.getsitepackages", lambda: ["/site-packages"])
    monkeypatch.setenv("PYTHONSAFEPATH", "")
    run_module._leave_out_working_folder()
    assert sys.path == places[1:] and os.environ["PYTHONSAFEPATH"] == "1"
