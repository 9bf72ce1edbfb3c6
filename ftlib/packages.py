"""Packages beyond `ftlib[train]` that a config can ask for, and the line that installs each."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

from ftlib.config import Config
from ftlib.errors import UserError

_BITSANDBYTES = ("bitsandbytes", "ftlib[quant]")
_OPTIMIZERS = {
    "galore": ("galore_torch", "ftlib[optimizers]"),
    "apollo": ("apollo_torch", "ftlib[optimizers]"),
    "stable_adamw": ("optimi", "ftlib[optimizers]"),
    "adamw_torch_4bit": ("torchao", "torchao"),
    "adamw_torch_8bit": ("torchao", "torchao"),
    "adamw_8bit": _BITSANDBYTES,
    "ademamix": _BITSANDBYTES,
    "lion": _BITSANDBYTES,
    "bnb": _BITSANDBYTES,
    "paged": _BITSANDBYTES,
}
"""Part of an optimizer's name → the module it needs, what pip calls the package; the first that fits counts."""


def require_packages(config: Config) -> None:
    """Before data or a model are loaded.

    Raises:
        UserError: packages are missing; names the config's keys and the one line that installs them all.
    """
    missing = {what: wanted for what, wanted in _asked_for(config) if importlib.util.find_spec(wanted[0]) is None}
    if missing:
        problem = "; ".join(f"{what} needs {module}" for what, (module, _) in missing.items())
        names = " ".join(f"'{name}'" for name in dict.fromkeys(name for _, name in missing.values()))
        remedy = f"pip install {names} (an image built from containers/ftlib.def has what ftlib's extras name)"
        raise UserError(f"{problem}, which is not installed here", remedy)


def _asked_for(config: Config) -> Iterator[tuple[str, tuple[str, str]]]:
    """(what in the config asks, what is needed) of each package."""
    if config.model.quantization != "none":
        yield f"model.quantization: {config.model.quantization}", _BITSANDBYTES
    if config.training.get("use_liger_kernel"):
        yield "training.use_liger_kernel", ("liger_kernel", "ftlib[liger]")
    optimizer = str(config.training.get("optim", ""))
    for part, wanted in _OPTIMIZERS.items():
        if part in optimizer:
            yield f"training.optim: {optimizer}", wanted
            break
