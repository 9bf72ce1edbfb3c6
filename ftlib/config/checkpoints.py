"""Base models that are converted before use: big_vision's `.npz` checkpoints of PaliGemma.

A config sets the file and its tokenizer. They are converted to a model folder in the store, named by a hash of their
content, and the resolved config has that folder as its base. So a run ID depends on the content of the two files, not
on their paths, and the files can be deleted after the conversion.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ftlib.config.schema import HUB_NAME, NPZ, Model
from ftlib.core.files import json_sha256, read_json
from ftlib.core.hashes import hash_files, recorded_hash
from ftlib.core.paths import STORE, Site
from ftlib.errors import UserError

CONVERSION_RECORD = "big_vision.json"
"""File in the folder of a converted model: names and hashes of the original files."""
_FOLDER = "big_vision-"


@dataclass(frozen=True)
class NpzCheckpoint:
    """The `.npz` checkpoint of a config.

    Attributes:
        file: the checkpoint.
        sha256: of the file.
        tokenizer: path of a tokenizer file, or hub name of a model.
        tokenizer_sha256: of the tokenizer file; None for a hub name.
        folder: the converted model in the store.
    """

    file: Path
    sha256: str
    tokenizer: str
    tokenizer_sha256: str | None
    folder: Path


def find_npz_checkpoint(model: Model, site: Site) -> NpzCheckpoint | None:
    """Return a config's `.npz` file and tokenizer with their hashes; None for any other base.

    A file is hashed once. For a deleted file, the last hash is used.

    Args:
        model: with stored paths, see `config.paths`.

    Raises:
        UserError: no such file.
    """
    if not model.base.endswith(NPZ):
        return None
    assert model.tokenizer is not None
    file = Path(model.base.replace(STORE, str(site.store), 1))
    digest = _content("model.base", file, site)
    tokenizer, tokenizer_digest = model.tokenizer, None
    if not HUB_NAME.fullmatch(tokenizer):
        path = Path(tokenizer.replace(STORE, str(site.store), 1))
        tokenizer, tokenizer_digest = str(path), _content("model.tokenizer", path, site)
    key = json_sha256({"base": digest, "tokenizer": tokenizer_digest or tokenizer})[:16]
    return NpzCheckpoint(file, digest, tokenizer, tokenizer_digest, site.store / "models" / f"{_FOLDER}{key}")


def is_converted(folder: Path, site: Site) -> bool:
    """Whether a base is a converted `.npz` checkpoint; the folder may not exist."""
    return folder.parent == site.store / "models" and folder.name.startswith(_FOLDER)


def describe_conversion(base: str) -> str:
    """Return the origin of a converted base model as text; "" for any other base.

    Also "" if this user may not read the folder, which happens in reports about other users' runs.
    """
    if not base.startswith("/"):
        return ""
    try:
        facts = read_json(Path(base) / CONVERSION_RECORD)
    except OSError:
        return ""
    return f"converted from big_vision's {facts['checkpoint']} (SHA-256 {facts['sha256'][:16]}…)"


def _content(key: str, path: Path, site: Site) -> str:
    if path.is_file():
        return hash_files(path.parent, [path.name], site)[path.name]
    if known := recorded_hash(path, site):
        return known
    raise UserError(f"{key}: {path}: no such file", "See docs/models.md for the download.")
