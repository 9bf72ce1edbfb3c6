"""Run folders: checkpoints, finding runs."""

from pathlib import Path

import pytest

from ftlib.core import files
from ftlib.core.paths import Site
from ftlib.errors import UserError
from ftlib.runs import run as runs


def make_checkpoint(root: Path, step: int) -> Path:
    folder = runs.checkpoint_folder(root, step)
    with files.atomic_directory(folder) as temporary:
        (temporary / "weights").write_text(str(step))
    return folder


def test_last_checkpoint_skips_torn_damaged_and_temporary_ones(tmp_path: Path) -> None:
    for step in (3, 6, 9, 12):
        make_checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-12" / "weights").write_text("xx")  # another byte count would be seen at once
    (tmp_path / "checkpoint-9" / files.COMPLETE_MARKER).unlink()
    (tmp_path / "checkpoint-15.tmp-1").mkdir()
    assert runs.last_checkpoint(tmp_path) == (6, tmp_path / "checkpoint-6")
    runs.rotate_checkpoints(tmp_path, keep=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-12"]


def test_a_folder_that_is_called_like_a_run_is_not_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before, the run could not be named from where such a folder lies: whatever was in it was evaluated."""
    site = Site(tmp_path, tmp_path / "runs")
    files.write_text(site.runs / "digits" / "aaa" / "config.yaml", "")
    for folder in ("digits", "digits/aaa", "mine"):
        files.write_text(tmp_path / "here" / folder / "config.yaml", "")
    monkeypatch.chdir(tmp_path / "here")
    assert runs.find_run("digits", site).folder == site.runs / "digits" / "aaa"
    assert runs.find_run("digits/aaa", site).folder == site.runs / "digits" / "aaa"
    for path in ("./digits", str(tmp_path / "here" / "digits")):
        assert runs.find_run(path, site).folder == tmp_path / "here" / "digits"
    assert runs.find_run("mine", site).folder == tmp_path / "here" / "mine", "no run is called so"


def test_finding_a_run(tmp_path: Path) -> None:
    site = Site(tmp_path, tmp_path / "runs")
    with pytest.raises(UserError, match="no such run"):
        runs.find_run("digits", site)
    for identity in ("aaa", "bbb"):
        files.write_text(site.runs / "digits" / identity / "config.yaml", "")
    files.write_text(site.runs / "other" / "ccc" / "config.yaml", "")
    assert runs.find_run("other", site).folder == site.runs / "other" / "ccc"
    assert runs.find_run("digits/aaa", site).folder == site.runs / "digits" / "aaa"
    assert runs.find_run(str(site.runs / "digits" / "bbb"), site).folder == site.runs / "digits" / "bbb"
    with pytest.raises(UserError, match="several runs") as caught:
        runs.find_run("digits", site)
    assert "digits/aaa" in caught.value.remedy
    with pytest.raises(UserError) as caught:
        runs.find_run("digit", site)
    assert "digits, other" in caught.value.remedy
