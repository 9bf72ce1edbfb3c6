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
from ftlib.core.imports import _ImportUtilsLoader

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


def redirect(text: str) -> str:
    """The same JSON with a class of another module."""
    changed = text.replace("paligemma.configuration_paligemma", "paligemma.configuration_nowhere")
    assert changed != text
    return changed


def test_the_file_holds_what_transformers_finds_in_its_sources(tmp_path: Path) -> None:
    found = [loaded(""), loaded(tmp_path), loaded(tmp_path)]
    (file,) = tmp_path.iterdir()
    whole = file.read_text()
    for damaged in (whole[:1000], redirect(whole)):
        file.write_text(damaged)
        found.append(loaded(tmp_path))
        assert file.read_text() == whole, "it is written again"
    plain, first, second, *others = [one.pop("sources") for one in found]
    assert all(one == found[0] for one in found)
    assert found[0]["modules"][0]["PaliGemmaForConditionalGeneration"] == "models.paligemma.modeling_paligemma"
    assert plain > 3000 and 1500 < first < plain / 1.8 and second < 50 and others == [first, first]


def test_transformers_that_may_be_edited_is_read_each_time(tmp_path: Path) -> None:
    import transformers

    packages = tmp_path / "packages"
    packages.mkdir()
    (packages / "transformers").symlink_to(Path(transformers.__file__).parent)  # no RECORD beside it
    folder = tmp_path / "structure"
    folder.mkdir()
    assert loaded(folder, str(packages))["sources"] > 3000
    assert not list(folder.iterdir())


@pytest.mark.parametrize("content", ["[]", "{}", "null", "3", '{"structure": []}', "[" * 100_000])
def test_json_of_another_shape_is_no_structure(content: str, tmp_path: Path) -> None:
    loader = _ImportUtilsLoader("transformers.utils.import_utils", "/p/transformers/utils/import_utils.py")
    loader.installed, loader.folder = "0" * 64, lambda: tmp_path
    file = tmp_path / f"transformers-{'0' * 12}.json"
    file.write_text(content)
    found = {frozenset({"torch"}): {"albert.modeling_albert": {"AlbertModel"}}}
    expected = [[["torch"], {"albert.modeling_albert": ["AlbertModel"]}]]
    umask = os.umask(0o002)
    assert json.loads(json.dumps(loader._read_or_store(lambda: found))) == expected
    os.umask(umask)
    assert file.stat().st_mode & 0o777 == 0o600, "nobody else's, whatever the command writes for others"
    assert loader._read_or_store(lambda: {}) == expected, "it has been written again"


def test_nothing_is_stored_where_the_user_has_no_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FTLIB_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("FTLIB_RUNS", str(tmp_path / "runs"))
    assert _jobs_folder() is None and not list(tmp_path.iterdir())
    (tmp_path / "runs").mkdir()
    assert _jobs_folder() is None and not (tmp_path / "store").exists()
    (tmp_path / "store").mkdir()
    folder = _jobs_folder()
    assert folder == tmp_path / "runs" / ".jobs" and folder.stat().st_mode & 0o777 == 0o700


def test_what_was_imported_is_not_looked_through_again(tmp_path: Path) -> None:
    """Neither by the next collection of young objects, nor by the last one at exit."""
    code = """
import atexit, gc
atexit.register(lambda: print("frozen at exit:", gc.get_freeze_count() > 10_000))  # the last one to be called
from ftlib.cli.main import main
from ftlib.core import imports

with imports.quick_imports():
    made = [{} for _ in range(10)]
print("old:", any(one is made for one in gc.get_objects(generation=2)), "frozen:", gc.get_freeze_count())
main(["status"])
"""
    environment = {**os.environ, "FTLIB_STORE": str(tmp_path), "FTLIB_RUNS": str(tmp_path / "runs")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.splitlines()[0] == "old: True frozen: 0", done.stderr
    assert done.stdout.splitlines()[-1] == "frozen at exit: True"
