"""PaliGemma checkpoints of big_vision (`.npz`), which are converted before they can be loaded.

A config names the file and its tokenizer. What is converted from them is a model folder in the store whose name is a
hash of their content, and the resolved config has that folder as its base. So a run's identity depends on the content
of the two files, not on where they are, and the files can be deleted once they are converted.
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
"""In the folder of a converted model: the names and hashes of the files that it was made from."""
_FOLDER = "big_vision-"


@dataclass(frozen=True)
class NpzCheckpoint:
    """A `.npz` checkpoint that a config names.

    Attributes:
        file: the checkpoint.
        sha256: of the file.
        tokenizer: path of a tokenizer file, or the name of a model on the hub.
        tokenizer_sha256: of the tokenizer file; None for a name.
        folder: the converted model in the store.
    """

    file: Path
    sha256: str
    tokenizer: str
    tokenizer_sha256: str | None
    folder: Path


def find_npz_checkpoint(model: Model, site: Site) -> NpzCheckpoint | None:
    """The `.npz` file and the tokenizer that a config names, with their hashes; None for any other base.

    A file is hashed once. One that is gone is known by its last hash.

    Args:
        model: with its paths as they are stored.

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
    """Whether a base is the converted form of an `.npz` checkpoint, whether or not it exists."""
    return folder.parent == site.store / "models" and folder.name.startswith(_FOLDER)


def describe_conversion(base: str) -> str:
    """What the model folder that a config names as its base was converted from; "" for any other.

    Also "" where this user may not read it: reports of other users' runs come here.
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
    raise UserError(f"{key}: {path}: no such file", "docs/models.md says where to download it.")
