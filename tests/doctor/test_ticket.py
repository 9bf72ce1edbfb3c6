"""The facts for a support ticket."""

from __future__ import annotations

from pathlib import Path

import pytest

from ftlib.cli import doctor


def test_a_ticket_has_versions_and_settings_but_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    programs = {"sinfo": "slurm 24.11.5", "scontrol": "PartitionName=gpu MaxTime=1-00:00:00\nPartitionName=cpu",
                "apptainer": "org.ftlib.revision: 12ab"}  # fmt: skip
    for name, answer in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\ncat <<'END'\n{answer}\nEND\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("FTLIB_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("INDEX_URL", "https://user:hunter2@index.example/simple")
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijklmnopqrstuvwxyz")
    assert doctor.main(["--ticket"]) == 0
    told = capsys.readouterr().out
    for fact in ("slurm 24.11.5", "PartitionName=gpu MaxTime=1-00:00:00", "org.ftlib.revision: 12ab", "ftlib "):
        assert fact in told
    assert "INDEX_URL=(set)" in told and "HF_TOKEN=(set)" in told
    assert "hunter2" not in told and "hf_abc" not in told
