"""Where models and datasets lie.

A base model is a local folder, a hub name (kept in the store's shared cache, `<store>/hf`), or an embedded model whose
name begins with `ftlib/` (kept in `<store>/models`). Jobs never reach the hub: they take what `ftlib stage` brought.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ftlib import files
from ftlib.config import Model
from ftlib.errors import UserError
from ftlib.hashes import hash_files
from ftlib.site import Site

EMBEDDED = "ftlib/"
WEIGHTS = (
    ("model.safetensors", "model-*-of-*.safetensors"),
    ("pytorch_model.bin", "pytorch_model-*-of-*.bin"),
)
"""The names that transformers loads weights by, one form of them after the other; the first that is there is enough."""

TOKENIZERS = ("tokenizer.json", "*.model", "vocab.*")
_READ_BESIDE = (
    *("config.json", "generation_config.json", "*.safetensors.index.json", "*.bin.index.json"),
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt", "chat_template*"),
    *("processor_config.json", "preprocessor_config.json"),
)
"""What else transformers reads of a model's folder."""

MERGE_RECORD = "merge.json"
"""In the folder of a merged model: how it was made."""
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Repository:
    """A model or dataset of the hub; without a revision the one that was first staged, or its newest."""

    kind: Literal["model", "dataset"]
    name: str
    revision: str | None


def is_embedded(model: Model) -> bool:
    """Whether ftlib makes this model itself."""
    return model.base.startswith(EMBEDDED)


def embedded_folder(model: Model, site: Site) -> Path:
    """Where an embedded model lies in the store."""
    return site.store / "models" / model.base


def find_model(model: Model, site: Site) -> Path:
    """The local folder of a base model.

    Raises:
        UserError: it is not there; the message says how to bring it.
    """
    remedy = "Run `ftlib stage CONFIG` on the login node first."
    if is_embedded(model):
        folder = embedded_folder(model, site)
        if not files.is_complete(folder):
            raise UserError(f"model {model.base} is not in the store ({folder})", remedy)
        return folder
    if looks_local(model.base):
        folder = Path(model.base).expanduser()
        if not folder.is_dir():
            raise UserError(f"model.base: {folder}: no such folder")
        return folder
    repository = Repository("model", model.base, model.revision)
    found = find_staged(repository, site)
    if found is None:
        raise UserError(f"model {model.base} is not in the store ({cache_folder(repository, site)})", remedy)
    return found


def model_hashes(folder: Path, site: Site) -> dict[str, str]:
    """The SHA-256 of every file that transformers reads of a model's folder; see `hashes.hash_files`.

    Raises:
        UserError: a file is not what was staged.
    """
    forms = [[path.name for pattern in patterns for path in folder.glob(pattern)] for patterns in WEIGHTS]
    weights = next(filter(None, forms), [])
    beside = {path.name for pattern in (*TOKENIZERS, *_READ_BESIDE) for path in folder.glob(pattern)}
    names = [name for name in sorted({*weights, *beside}) if (folder / name).is_file()]
    found = hash_files(folder, names, site)
    marker = folder / files.MARKER
    staged = files.read_json(marker) if marker.is_file() else {}
    for name, digest in found.items():
        if name in staged and staged[name]["sha256"] != digest:
            problem = f"{folder / name}: not the file that was staged: its content has changed"
            raise UserError(problem, "Put the old file back, or remove the folder and run `ftlib stage CONFIG`.")
    return found


def require_model(folder: Path) -> None:
    """Refuse a folder without config.json; transformers would make a model of its defaults up.

    Raises:
        UserError: no model there.
    """
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: no model in it (config.json is missing)")


def looks_local(base: str) -> bool:
    """Whether a model's or dataset's name is that of a folder, not one of the hub; configs name folders absolutely."""
    return base.startswith(("/", ".", "~")) or base.count("/") != 1


def cache_name(repository: Repository) -> str:
    """What huggingface_hub calls a repository's folder in a cache."""
    return f"{repository.kind}s--{repository.name.replace('/', '--')}"


def cache_folder(repository: Repository, site: Site) -> Path:
    """Where a repository lies in the store."""
    return site.store / "hf" / "hub" / cache_name(repository)


def is_commit(revision: str | None) -> bool:
    """Whether a revision is a commit, which never changes."""
    return revision is not None and _COMMIT.fullmatch(revision) is not None


def pinned_commit(folder: Path, revision: str | None) -> str | None:
    """The commit that a revision means in a repository's cache folder; None if that is not known there."""
    if is_commit(revision):
        return revision
    reference = folder / "refs" / (revision or "main")
    return reference.read_text().strip() if reference.is_file() else None


def find_staged(repository: Repository, site: Site) -> Path | None:
    """The complete folder that `ftlib stage` left of a repository; None without one."""
    folder = cache_folder(repository, site)
    commit = pinned_commit(folder, repository.revision)
    snapshot = folder / "snapshots" / (commit or "")
    return snapshot if commit and files.is_complete(snapshot) else None


def is_unreachable(error: Exception) -> bool:
    """Whether there was no answer at all; which HTTP library is behind the hub's client differs by its version."""
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    of_http = "TransportError" in {kind.__name__ for kind in type(error).__mro__}
    return of_http or isinstance(error, (OfflineModeIsEnabled, LocalEntryNotFoundError, ConnectionError, TimeoutError))
