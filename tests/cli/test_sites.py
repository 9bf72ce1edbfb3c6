"""Odd sites: a store that can only be read, paths with spaces, secrets all around, no Slurm."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import needs

Ftlib = Callable[..., tuple[int, str, str]]
SECRETS = {"HF_TOKEN": "hf_planted0123456789secret", "WANDB_API_KEY": "wandb_planted0123456789secret"}


@pytest.fixture
def lockable(tmp_path: Path) -> Iterator[Path]:
    """A file system that can be made read-only."""
    folder = tmp_path / "the shared store"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder], capture_output=True).returncode:
        needs.lack("mount")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.mount
def test_a_store_that_can_only_be_read_and_no_secret_anywhere(
    ftlib: Ftlib, lockable: Path, tmp_path: Path, write_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {**SECRETS, "FTLIB_STORE": str(lockable), "FTLIB_RUNS": str(tmp_path / "my runs")}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PATH", "/nowhere")
    config = write_config()
    outputs = [ftlib(command, config) for command in ("stage", "prepare")]
    subprocess.run(["/bin/mount", "-o", "remount,ro", lockable], check=True)
    commands = [("stage", config), ("prepare", config), ("train", config), ("evaluate", "tiny"), ("report", "tiny"),
                ("status", "--json"), ("status", "--usage"), ("schema",)]  # fmt: skip
    outputs += [ftlib(*command) for command in commands]
    assert [output[0] for output in outputs] == [0] * len(outputs), outputs
    assert ftlib("doctor", config)[0] == 1  # the store is not writable, which it says
    outputs += [ftlib("doctor", config), ftlib("train", config, "data.prompt=${HF_TOKEN}")]
    said = "".join(output[1] + output[2] for output in outputs)
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert "planted" not in said and len(written) > 20
    assert not [path for path in written if b"planted" in path.read_bytes()]
