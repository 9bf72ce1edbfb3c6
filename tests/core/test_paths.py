"""jobs/site.env and the two roots."""

from pathlib import Path

import pytest

from ftlib.core import redaction
from ftlib.core.paths import find_site
from ftlib.errors import UserError


def test_the_environment_wins_over_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "site.env").write_text("FTLIB_STORE=/from/file\nFTLIB_RUNS=/runs\n")
    monkeypatch.chdir(tmp_path)
    assert find_site({}).store == Path("/from/file")
    assert find_site({"FTLIB_STORE": "/from/env"}).store == Path("/from/env")
    assert find_site({}).runs == Path("/runs")


def test_secrets_of_the_file_are_masked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "site.env").write_text("FTLIB_STORE=/a/folder\nMY_TOKEN=planted-0123\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(redaction, "_site_settings", {})
    assert redaction.redact("planted-0123 of /a/folder") == "planted-0123 of /a/folder"
    find_site({})
    assert redaction.redact("planted-0123 of /a/folder") == "*** of /a/folder"


def test_without_a_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LOGNAME", "somebody")
    site = find_site({})
    assert (site.store, site.runs) == (tmp_path / "store", tmp_path / "store" / "runs" / "somebody")
    with pytest.raises(UserError, match="FTLIB_STORE is not set"):
        find_site({"SLURM_JOB_ID": "1"})
