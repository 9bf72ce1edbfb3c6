"""Packages beyond `ftlib[train]` that a config can require, and how to install them."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

from ftlib.config.schema import Config
from ftlib.errors import UserError

BITSANDBYTES = ("bitsandbytes", "ftlib[quant]")
_OPTIMIZERS = {
    "galore": ("galore_torch", "ftlib[optimizers]"),
    "apollo": ("apollo_torch", "ftlib[optimizers]"),
    "stable_adamw": ("optimi", "ftlib[optimizers]"),
    "adamw_torch_4bit": ("torchao", "torchao"),
    "adamw_torch_8bit": ("torchao", "torchao"),
    "adamw_8bit": BITSANDBYTES,
    "ademamix": BITSANDBYTES,
    "lion": BITSANDBYTES,
    "bnb": BITSANDBYTES,
    "paged": BITSANDBYTES,
}
"""Part of an optimizer's name → (module that it needs, name of the package for pip); the first match counts."""


def require_packages(config: Config) -> None:
    """Check that the packages that the config requires are installed, before data or a model are loaded.

    Raises:
        UserError: packages are missing; names the config keys and the pip command that installs all of them.
    """
    missing = {
        what: wanted for what, wanted in required_packages(config) if importlib.util.find_spec(wanted[0]) is None
    }
    if missing:
        problem = "; ".join(f"{what} needs {module}" for what, (module, _) in missing.items())
        names = " ".join(f"'{name}'" for name in dict.fromkeys(name for _, name in missing.values()))
        remedy = f"pip install {names} (images built from containers/ftlib.def contain ftlib's extras)"
        raise UserError(f"{problem}, which is not installed here", remedy)


def required_packages(config: Config) -> Iterator[tuple[str, tuple[str, str]]]:
    """Yield (config setting, (module, pip name)) of each required package."""
    if config.model.quantization != "none":
        yield f"model.quantization: {config.model.quantization}", BITSANDBYTES
    if config.training.get("use_liger_kernel"):
        yield "training.use_liger_kernel", ("liger_kernel", "ftlib[liger]")
    optimizer = str(config.training.get("optim", ""))
    for part, wanted in _OPTIMIZERS.items():
        if part in optimizer:
            yield f"training.optim: {optimizer}", wanted
            break
