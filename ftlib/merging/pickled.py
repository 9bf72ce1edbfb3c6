"""Convert PyTorch's older `.bin` files to safetensors, once, in the store."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors.torch import save_file

from ftlib.core import files, log, permissions
from ftlib.core.hashes import hash_files
from ftlib.core.lease import compute_once
from ftlib.core.paths import Site
from ftlib.errors import UserError

_FORMS = ("adapter_model.bin", "pytorch_model.bin", "pytorch_model-*-of-*.bin")
_WEIGHT_SUFFIXES = (".bin", ".h5", ".msgpack", ".pt", ".pth", ".onnx", ".gguf")
_LEFT_OUT = (files.COMPLETE_MARKER, "pytorch_model.bin.index.json")
_NAME = re.compile(r"(adapter|pytorch)_model(-\d+-of-\d+)?\.bin")


def as_safetensors(folder: Path, site: Site) -> Path:
    """Return a folder with the weights as safetensors: the folder itself, or a converted copy in the store.

    The copy also contains the folder's small files, so that it is a complete model.

    Raises:
        UserError: a file contains more than tensors, or is damaged; no space.
    """
    paths = next(filter(None, (sorted(folder.glob(form)) for form in _FORMS)), [])
    if any(folder.glob("*.safetensors")) or not paths:
        return folder
    beside = [path for path in sorted(folder.iterdir()) if _goes_along(path)]
    digests = hash_files(folder, [path.name for path in (*paths, *beside)], site)
    target = site.store / "converted" / files.json_sha256([folder.name, digests])[:24]

    def find() -> Path | None:
        return target if files.is_complete(target) else None

    def convert() -> Path:
        log.info(f"{folder}: converting its .bin files to safetensors, once")
        files.require_space(site.store, sum(path.stat().st_size for path in paths))
        with permissions.group_writable(site), files.atomic_directory(target) as temporary:
            for path in beside:
                shutil.copyfile(path, temporary / path.name)
            for path in paths:
                _convert(path, temporary / _NAME.sub(_safetensors_name, path.name))
        return target

    made = compute_once(site.store / "converted" / f"{target.name}.working", find, convert, str(folder))
    assert made
    return made


def _goes_along(path: Path) -> bool:
    return path.is_file() and path.suffix not in _WEIGHT_SUFFIXES and path.name not in _LEFT_OUT


def _safetensors_name(match: re.Match[str]) -> str:
    stem = "adapter_model" if match[1] == "adapter" else "model"
    return f"{stem}{match[2] or ''}.safetensors"


def _convert(path: Path, target: Path) -> None:
    try:
        weights: Any = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError:
        problem = f"{path}: contains more than tensors; loading it could run code"
        raise UserError(problem, "Use a model with safetensors.") from None
    except (RuntimeError, OSError, EOFError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: cannot be read: {reason}") from None
    if not isinstance(weights, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in weights.values()):
        raise UserError(f"{path}: not a dictionary of tensors")
    copies = {str(name): tensor.contiguous().clone() for name, tensor in weights.items()}  # tied ones share memory
    save_file(copies, target, {"format": "pt"})
