"""doctor: what is in order, what is not, and what to do."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

Ftlib = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def _bare_machine(store: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.delenv("HF_TOKEN_PATH", raising=False)


def program(folder: Path, name: str, text: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(0o755)


def test_a_bare_machine_is_fine_and_told_what_it_lacks(ftlib: Ftlib, store: Path) -> None:
    code, output, _ = ftlib("doctor")
    assert code == 0
    assert f"ok    store: {store} is writable" in output
    assert "note  Slurm: sinfo is not in PATH" in output
    assert "note  container: neither apptainer nor singularity" in output


def test_slurm_that_answers_and_slurm_that_does_not(ftlib: Ftlib, tmp_path: Path) -> None:
    program(tmp_path / "bin", "sinfo", "echo 'low*'; echo high")
    assert "ok    Slurm: partitions low*, high" in ftlib("doctor")[1]
    program(tmp_path / "bin", "sinfo", "exit 1")
    code, output, _ = ftlib("doctor")
    assert code == 1 and "FAIL  Slurm: does not answer" in output


def test_images(ftlib: Ftlib, tmp_path: Path, store: Path) -> None:
    program(tmp_path / "bin", "apptainer", "echo org.ftlib.revision: abc123")
    assert "ftlib.sif is not there" in ftlib("doctor")[1]
    (store / "images" / "ftlib.sif").write_text("")
    assert "ftlib.sif: ftlib abc123" in ftlib("doctor")[1]
    program(tmp_path / "bin", "apptainer", "exit 255")
    code, output, _ = ftlib("doctor")
    assert code == 1 and "is no image of ftlib" in output


def test_a_token_that_others_can_read(ftlib: Ftlib, tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    token = tmp_path / "hf" / "token"
    token.write_text("hf_secret")
    token.chmod(0o644)
    code, output, error = ftlib("doctor")
    assert code == 1 and f"chmod 600 {token}" in output
    assert "hf_secret" not in output + error
    token.chmod(0o600)
    assert ftlib("doctor")[0] == 0


def test_what_a_config_needs(ftlib: Ftlib, write_config: Callable[..., Path]) -> None:
    config = write_config()
    output = ftlib("doctor", config)[1]
    assert "config.yaml is in order" in output and "is not prepared" in output
    assert ftlib("prepare", config)[0] == 0
    assert "is prepared" in ftlib("doctor", config)[1]
    code, output, _ = ftlib("doctor", write_config(base="ftlib/tiny-paligemma"))
    assert code == 1 and "Run `ftlib stage CONFIG`" in output
    code, output, _ = ftlib("doctor", write_config(replace=("seed: 3", "sed: 3")))
    assert code == 1 and "sed: unknown key" in output


@pytest.mark.parametrize(
    ("processor", "installed", "expected"),
    [
        ("SmolVLMProcessor", (), "needs torchvision and num2words, not installed"),
        ("SmolVLMProcessor", ("torchvision",), "needs num2words, not installed"),
        ("Qwen3VLProcessor", ("torchvision",), "needs torchvision, which cannot be imported: other torch"),
        ("Idefics3Processor", (), ""),
    ],
)
def test_packages_of_a_processor(
    ftlib: Ftlib, write_config: Callable[..., Path], shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    processor: str, installed: tuple[str, ...], expected: str,
) -> None:  # fmt: skip
    """Named with the line that installs them, in the build of torch; a torchvision of another torch is found out."""
    find, load = importlib.util.find_spec, importlib.import_module

    def imported(name: str, package: str | None = None) -> object:
        if name == "torchvision":
            raise RuntimeError("other torch")
        return load(name, package)

    known = {name: object() if name in installed else None for name in ("torchvision", "num2words")}
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *package: known[name] if name in known else find(name, *package)
    )
    monkeypatch.setattr("importlib.import_module", imported)
    versions = importlib.metadata.version
    monkeypatch.setattr(
        "importlib.metadata.version", lambda name: "2.13.0+cu130" if name == "torch" else versions(name)
    )
    base = shutil.copytree(shared / "model", tmp_path / "vlm")
    for name in ("processor_config.json", "preprocessor_config.json"):
        (base / name).write_text(json.dumps({"processor_class": processor}))
    code, output, _ = ftlib("doctor", write_config(base=str(base), replace=("family: paligemma", "family: vlm")))
    if not expected:
        assert processor not in output
        return
    assert code == 1 and f"FAIL  processor: {processor} {expected}" in output
    packages = " ".join(
        [*["'torchvision==0.28.*'"] * ("torchvision" in expected), *["num2words"] * ("num2" in expected)]
    )
    index = " --extra-index-url https://download.pytorch.org/whl/cu130" * ("torchvision" in expected)
    assert f"Run: pip install {packages}{index}\n" in output


def test_packages_that_shadow(ftlib: Ftlib, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("site.getusersitepackages", lambda: str(tmp_path / "user"))
    monkeypatch.delenv("PYTHONNOUSERSITE", raising=False)
    (tmp_path / "user" / "torch").mkdir(parents=True)
    assert "note  packages in ~/.local: torch" in ftlib("doctor")[1]
    monkeypatch.setenv("PYTHONNOUSERSITE", "1")
    assert "ok    packages in ~/.local" in ftlib("doctor")[1]


def test_a_store_that_cannot_be_written(ftlib: Ftlib, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FTLIB_STORE", str(tmp_path / "file"))
    code, output, _ = ftlib("doctor")
    assert code == 1 and "FAIL  store:" in output


def test_slurm_would_take_the_job_or_says_why_not(
    ftlib: Ftlib, tmp_path: Path, write_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    program(tmp_path / "bin", "sinfo", "echo low")
    program(tmp_path / "bin", "sacct", "exit 1")
    asked = tmp_path / "asked"
    program(
        tmp_path / "bin",
        "sbatch",
        f"echo \"$SLURM_CONF $SBATCH_ACCOUNT $@\" >> '{asked}'; echo 'sbatch: Job 5 to start' >&2",
    )
    monkeypatch.setenv("SBATCH_ACCOUNT", "physics")
    monkeypatch.setenv("SLURM_CONF", "/our/slurm.conf")
    wanted = "seed: 3\njob: {gpus: 0, mem: 3G, time: '90', sbatch: {reservation: ours, contiguous: true, nice: 0}}"
    output = ftlib("doctor", write_config(replace=("seed: 3", wanted)))[1]
    assert "ok    job: Job 5 to start" in output and "ok    config's job: Job 5 to start" in output
    assert "note  accounting: sacct does not answer" in output
    first, second = asked.read_text().splitlines()
    assert first == "/our/slurm.conf physics --test-only --wrap true"
    assert second.startswith("/our/slurm.conf  --test-only --time=90 --nodes=1"), "what is ours is said by options"
    assert "--mem=3G --account=physics --contiguous --nice=0 --reservation=ours --signal=B:USR1@120" in second
    program(tmp_path / "bin", "sbatch", "echo 'allocation failure: Invalid partition name specified' >&2; exit 1")
    code, output, _ = ftlib("doctor")
    assert code == 1 and "FAIL  job: Slurm refuses it: allocation failure: Invalid partition" in output


def test_a_token_in_the_environment(ftlib: Ftlib, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    code, output, error = ftlib("doctor")
    assert code == 0 and "note  HF_TOKEN: is set in the environment" in output
    assert "hf_secret" not in output + error
