"""jobs/site.env and the two roots."""

from pathlib import Path

import pytest

from ftlib.errors import UserError
from ftlib.site import find_site, read_site_env


def test_literal_lines(tmp_path: Path) -> None:
    file = tmp_path / "site.env"
    file.write_text("# comment\n\nFTLIB_STORE=/a b/$HOME\nX='q'\nY=\n")
    assert read_site_env(file) == {"FTLIB_STORE": "/a b/$HOME", "X": "q", "Y": ""}
    file.write_text("FTLIB_STORE=/a\nexport FTLIB_RUNS=/b\n")
    with pytest.raises(UserError, match=r"site.env:2: expected KEY=VALUE"):
        read_site_env(file)


def test_the_environment_wins_over_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "site.env").write_text("FTLIB_STORE=/from/file\nFTLIB_RUNS=/runs\n")
    monkeypatch.chdir(tmp_path)
    assert find_site({}).store == Path("/from/file")
    assert find_site({"FTLIB_STORE": "/from/env"}).store == Path("/from/env")
    assert find_site({}).runs == Path("/runs")


def test_without_a_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LOGNAME", "somebody")
    site = find_site({})
    assert (site.store, site.runs) == (tmp_path / "store", tmp_path / "store" / "runs" / "somebody")
    with pytest.raises(UserError, match="FTLIB_STORE is not set"):
        find_site({"SLURM_JOB_ID": "1"})
