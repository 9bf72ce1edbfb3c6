"""Where models and datasets are stored.

A base model is a local folder, a hub name (stored in the shared cache, `<store>/hf`), or an embedded model whose name
begins with `ftlib/` (stored in `<store>/models`). Jobs do not use the network: they read the models that `ftlib stage`
has downloaded.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ftlib.config.loader import RUN_CONFIG
from ftlib.config.npz_checkpoints import is_converted
from ftlib.config.schema import NPZ, Model
from ftlib.core import files
from ftlib.core.hashes import hash_files
from ftlib.core.paths import Site
from ftlib.errors import UserError

EMBEDDED_PREFIX = "ftlib/"
WEIGHT_PATTERNS = (
    ("model.safetensors", "model-*-of-*.safetensors"),
    ("pytorch_model.bin", "pytorch_model-*-of-*.bin"),
)
"""File names of weights, one format after the other, in transformers' order; the first format that exists is used."""

TOKENIZER_PATTERNS = ("tokenizer.json", "*.model", "vocab.*")
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = (("adapter_model.safetensors",), ("adapter_model.bin",))

TOKENIZER_FILES = (
    *("tokenizer*.json", "*.model", "tokenizer.model.*", "*.tiktoken", "tekken.json", "vocab.*", "merges.txt"),
    *("special_tokens_map.json", "added_tokens.json", "chat_template*", "additional_chat_templates/*.jinja"),
    "generation_config.json",
)
"""Tokenizer, chat templates and generation settings, in every form that transformers reads."""

LICENSE_FILES = ("LICENSE*", "LICENCE*", "NOTICE*", "COPYING*", "USE_POLICY*", "*license*")
"""What has to go along with weights that are passed on."""

IMAGE_PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")

_CONFIG_FILES = (
    *("config.json", "generation_config.json", "*.safetensors.index.json", "*.bin.index.json"),
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt", "chat_template*"),
    *IMAGE_PROCESSOR_FILES,
)
"""The other files that transformers reads from a model's folder."""

MERGE_RECORD = "merge.json"
"""In the folder of a merged model: how it was made."""
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Repository:
    """A model or dataset on the hub; without a revision the one that was first staged, or else the newest."""

    kind: Literal["model", "dataset"]
    name: str
    revision: str | None


def is_embedded(model: Model) -> bool:
    """Whether ftlib creates this model itself."""
    return model.base.startswith(EMBEDDED_PREFIX)


def embedded_folder(model: Model, site: Site) -> Path:
    """The folder of an embedded model in the store."""
    return site.store / "models" / model.base


def find_model(model: Model, site: Site) -> Path:
    """The local folder of a base model.

    Raises:
        UserError: it does not exist; the message says how to stage it.
    """
    remedy = "Run `ftlib stage CONFIG` on the login node first."
    if is_embedded(model):
        folder = embedded_folder(model, site)
        if not files.is_complete(folder):
            raise UserError(f"model {model.base} is not in the store ({folder})", remedy)
        return folder
    if is_local_path(model.base):
        folder = Path(model.base).expanduser()
        if is_converted(folder, site) and not files.is_complete(folder):
            problem = f"model.base: the .npz checkpoint is not converted yet, so that {folder} is not there"
            raise UserError(problem, "Run `jobs/run.sh ftlib stage CONFIG` first, with the config that names the file.")
        if not folder.is_dir():
            raise UserError(f"model.base: {folder}: no such folder")
        return folder
    repository = Repository("model", model.base, model.revision)
    found = find_staged(repository, site)
    if found is None:
        raise UserError(f"model {model.base} is not in the store ({cache_folder(repository, site)})", remedy)
    return found


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter and no whole model."""
    return (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file()


def is_model_folder(folder: Path) -> bool:
    """Whether a folder holds a model or an adapter, and is no run folder; False for one that cannot be read."""
    names = ("config.json", ADAPTER_CONFIG)
    try:
        return not (folder / RUN_CONFIG).is_file() and any((folder / name).is_file() for name in names)
    except PermissionError:
        return False


def image_resampling(folder: Path) -> int | None:
    """Pillow's number of how the image processor in a folder resizes; None if the folder has none."""
    for name in IMAGE_PROCESSOR_FILES:
        if (folder / name).is_file():
            found = files.read_json(folder / name)
            resample: int | None = found.get("image_processor", found).get("resample")
            if resample is not None:
                return resample
    return None


def find_adapter_base(folder: Path, site: Site) -> Path:
    """The folder of the base that an adapter names.

    Raises:
        UserError: it names none, or it is not here.
    """
    config = files.read_json_object(folder / ADAPTER_CONFIG)
    name = config.get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise UserError(f"{folder / ADAPTER_CONFIG}: it does not name its base (base_model_name_or_path)")
    return find_model(Model(family="causal", base=name, revision=config.get("revision")), site)


def model_hashes(folder: Path, site: Site) -> dict[str, str]:
    """The SHA-256 of every file that transformers reads from a model's folder; see `hashes.hash_files`.

    Raises:
        UserError: a file has changed since it was staged.
    """
    kinds = (*ADAPTER_WEIGHTS, (ADAPTER_CONFIG,)) if is_adapter(folder) else WEIGHT_PATTERNS
    forms = [[path.name for pattern in patterns for path in folder.glob(pattern)] for patterns in kinds]
    weights = [name for form in forms for name in form] if is_adapter(folder) else next(filter(None, forms), [])
    beside = {path.name for pattern in (*TOKENIZER_PATTERNS, *_CONFIG_FILES) for path in folder.glob(pattern)}
    names = [name for name in sorted({*weights, *beside}) if (folder / name).is_file()]
    found = hash_files(folder, names, site)
    marker = folder / files.COMPLETE_MARKER
    staged = files.read_json(marker) if marker.is_file() else {}
    for name, digest in found.items():
        if name in staged and staged[name]["sha256"] != digest:
            problem = f"{folder / name}: not the file that was staged: its content has changed"
            raise UserError(problem, "Put the old file back, or remove the folder and run `ftlib stage CONFIG`.")
    return found


def require_model(folder: Path) -> None:
    """Refuse a folder without config.json, for which transformers would build a default model.

    Raises:
        UserError: there is no model in it.
    """
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: no model in it (config.json is missing)")


def is_local_path(base: str) -> bool:
    """Whether the name of a model or dataset is a local path and not a name on the hub."""
    return base.startswith(("/", ".", "~")) or base.count("/") != 1 or base.endswith(NPZ)


def cache_name(repository: Repository) -> str:
    """The name of a repository's folder in a cache of huggingface_hub."""
    return f"{repository.kind}s--{repository.name.replace('/', '--')}"


def cache_folder(repository: Repository, site: Site) -> Path:
    """The folder of a repository in the store."""
    return site.store / "hf" / "hub" / cache_name(repository)


def is_commit(revision: str | None) -> bool:
    """Whether a revision is a commit hash, which never changes."""
    return revision is not None and _COMMIT.fullmatch(revision) is not None


def pinned_commit(folder: Path, revision: str | None) -> str | None:
    """The commit that a revision refers to in a repository's cache folder; None if unknown."""
    if is_commit(revision):
        return revision
    reference = folder / "refs" / (revision or "main")
    return reference.read_text().strip() if reference.is_file() else None


def find_staged(repository: Repository, site: Site) -> Path | None:
    """The complete folder of a staged repository; None if it is not staged."""
    folder = cache_folder(repository, site)
    commit = pinned_commit(folder, repository.revision)
    snapshot = folder / "snapshots" / (commit or "")
    return snapshot if commit and files.is_complete(snapshot) else None


def is_unreachable(error: Exception) -> bool:
    """Whether the hub did not answer at all. The hub client's HTTP library differs by its version."""
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    of_http = "TransportError" in {kind.__name__ for kind in type(error).__mro__}
    return of_http or isinstance(error, (OfflineModeIsEnabled, LocalEntryNotFoundError, ConnectionError, TimeoutError))
