"""Where models lie, and how they get there.

A base model is a local folder, a hub name (kept in the store's shared cache, `<store>/hf`), or an embedded model whose
name begins with `ftlib/` (kept in `<store>/models`). Jobs never reach the hub: they take what `ftlib stage` brought.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ftlib import files
from ftlib.config import Model
from ftlib.errors import UserError
from ftlib.site import Site

EMBEDDED = "ftlib/"
_BESIDE = ("*.json", "*.model", "*.txt", "*.jinja")
"""Config, tokenizer and processor."""

_WEIGHTS = (
    ("model.safetensors", "model-*-of-*.safetensors"),
    ("pytorch_model.bin", "pytorch_model-*-of-*.bin"),
)
"""The names that transformers loads weights by, one form of them after the other; the first that is there is enough."""


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
    return _snapshot(model, site, local_only=True, wanted=())


def require_model(folder: Path) -> None:
    """Refuse a folder without config.json; transformers would make a model of its defaults up.

    Raises:
        UserError: no model there.
    """
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: no model in it (config.json is missing)")


def stage_hub_model(model: Model, site: Site) -> Path:
    """Download a hub model into the shared cache (or find it there) and return its folder.

    Raises:
        UserError: no such model, a licence not accepted, no connection, no weights that transformers loads.
    """
    for names in _WEIGHTS:
        folder = _snapshot(model, site, local_only=False, wanted=(*_BESIDE, *names))
        if any(path for name in names for path in folder.glob(name)):
            return folder
    looked_for = ", ".join(name for names in _WEIGHTS for name in names)
    raise UserError(f"model {model.base}: no weights in it; looked for {looked_for}")


def looks_local(base: str) -> bool:
    """Whether a base model's name is a folder's, not one of the hub (owner/name)."""
    return base.startswith(("/", ".", "~")) or base.count("/") != 1 or Path(base).is_dir()


def _snapshot(model: Model, site: Site, local_only: bool, wanted: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    cache = site.store / "hf" / "hub"
    try:
        with files.storage_errors(cache):
            return Path(
                snapshot_download(
                    model.base,
                    revision=model.revision,
                    cache_dir=cache,
                    local_files_only=local_only,
                    allow_patterns=list(wanted),
                )
            )
    except GatedRepoError:
        raise UserError(
            f"model {model.base}: its licence has to be accepted first",
            "Accept it on the model's page, then log in with `hf auth login`.",
        ) from None
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise UserError(f"model {model.base}: no such model on the hub: {str(error).splitlines()[0]}") from None
    except LocalEntryNotFoundError:
        problem = f"model {model.base} is not in the shared cache ({cache})"
        problem += "" if local_only else " and the hub cannot be reached"
        remedy = "Run `ftlib stage CONFIG` on a machine that reaches the hub, such as the login node."
        raise UserError(problem, remedy) from None
    except (HfHubHTTPError, OSError) as error:
        raise UserError(f"model {model.base}: the hub cannot be reached: {str(error).splitlines()[0]}") from None
