"""transformers finds out once which of its modules defines which class, and finds the same in the file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ftlib.cli.main import _jobs_folder

CODE = """
import json, sys
from pathlib import Path
from ftlib.core import imports

read = []
sys.addaudithook(lambda event, values: read.append(str(values[0])) if event == "open" else None)
if sys.argv[1]:
    for _ in range(2):  # the second call changes nothing
        imports.store_import_structure(lambda: Path(sys.argv[1]))
import transformers, transformers.models

packages = {name: sorted(needed) for name, needed in transformers._object_missing_backend.items()}
print(json.dumps({
    "modules": [transformers._class_to_module, transformers.models._class_to_module],
    "packages": packages,
    "class": transformers.PaliGemmaConfig.__module__,
    "sources": sum("/transformers/models/" in name and name.endswith(".py") for name in read),
}))
"""


def loaded(folder: Path | str, packages: str = "") -> dict[str, Any]:
    """What a new process finds in transformers; `packages` come before those that are installed."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [packages, os.environ.get("PYTHONPATH")]))}
    done = subprocess.run([sys.executable, "-c", CODE, folder], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_the_file_holds_what_transformers_finds_in_its_sources(tmp_path: Path) -> None:
    plain, first, second = loaded(""), loaded(tmp_path), loaded(tmp_path)
    (file,) = tmp_path.iterdir()
    whole = file.read_text()
    file.write_text(whole[:1000])
    third = loaded(tmp_path)
    assert file.read_text() == whole, "a damaged file is written again"
    read = [found.pop("sources") for found in (plain, first, second, third)]
    assert plain == first == second == third
    assert plain["modules"][0]["PaliGemmaForConditionalGeneration"] == "models.paligemma.modeling_paligemma"
    assert read[0] > 3000 and 1500 < read[1] == read[3] < read[0] / 1.8 and read[2] < 50, read


def test_transformers_that_may_be_edited_is_read_each_time(tmp_path: Path) -> None:
    import transformers

    packages = tmp_path / "packages"
    packages.mkdir()
    (packages / "transformers").symlink_to(Path(transformers.__file__).parent)  # no RECORD beside it
    folder = tmp_path / "structure"
    folder.mkdir()
    assert loaded(folder, str(packages))["sources"] > 3000
    assert not list(folder.iterdir())


def test_nothing_is_stored_where_the_user_has_no_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FTLIB_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("FTLIB_RUNS", str(tmp_path / "runs"))
    assert _jobs_folder() is None and not list(tmp_path.iterdir())
    (tmp_path / "runs").mkdir()
    folder = _jobs_folder()
    assert folder == tmp_path / "runs" / ".jobs" and folder.stat().st_mode & 0o777 == 0o700
