"""The GPU type of a config against the image and the precision."""

from __future__ import annotations

from pathlib import Path

import pytest

from ftlib.config.loader import load_experiment
from ftlib.core.paths import Site
from ftlib.errors import UserError
from ftlib.slurm.gpu_support import gpu_capability, gpu_fault, require_gpu_support

SETTINGS = {"FTLIB_GPU_ARCH": "a100=sm_80, v100=sm_70,b200=sm_100"}


def test_the_table_of_site_env() -> None:
    assert gpu_capability(SETTINGS, "v100") == (7, 0) and gpu_capability(SETTINGS, "b200") == (10, 0)
    assert gpu_capability(SETTINGS, "h100") is None and gpu_capability({}, None) is None
    with pytest.raises(UserError, match="expected TYPE=sm_NN"):
        gpu_capability({"FTLIB_GPU_ARCH": "a100:80"}, "a100")


def test_image_and_precision(tmp_path: Path, config_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = Site(tmp_path, tmp_path / "runs")
    wanted = ["job.gpus=1", "job.gpu_type=v100", "training.bf16=true"]
    config = load_experiment(config_file, wanted, site).config
    plain = load_experiment(config_file, wanted[:2], site).config
    assert gpu_fault(config, (8, 0), ["sm_80"]) is None and gpu_fault(plain, (7, 0), []) is None
    assert "has no bfloat16" in (gpu_fault(config, (7, 0), []) or ("",))[0]
    assert "built for sm_80, sm_90 only" in (gpu_fault(plain, (7, 0), ["sm_80", "sm_90"]) or ("",))[0]
    program, image = tmp_path / "apptainer", tmp_path / "ftlib.sif"
    program.write_text("#!/bin/sh\necho 'org.ftlib.architectures: sm_80 sm_90'\n")
    program.chmod(0o755)
    image.write_text("")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(UserError, match="v100 is sm_70, and the image's torch"):
        require_gpu_support(plain, SETTINGS, image)
    require_gpu_support(plain, {}, image)
    require_gpu_support(plain, SETTINGS, tmp_path / "none.sif")
