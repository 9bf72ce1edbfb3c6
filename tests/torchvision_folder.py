"""torchvision for tests, from a folder of its own: it changes what transformers does wherever it is installed."""

from __future__ import annotations

import sys
from typing import Any

_KEPT: list[Any] = []


def use(folder: str) -> None:
    """Make the torchvision in a folder importable, before transformers is imported.

    Its wheel for GPUs cannot load its library beside torch for CPUs, and is not importable then for lack of two
    operators, which no image processor uses. With their names defined it is.
    """
    import torch

    sys.path.insert(0, folder)
    try:
        import torchvision
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _KEPT.append(library)
        import torchvision  # noqa: F401
