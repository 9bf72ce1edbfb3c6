"""Keeps the libraries of Hugging Face offline: models and datasets come from the store."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any

_VARIABLE = "HF_HUB_OFFLINE"


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """In the body the libraries of Hugging Face reach no network; also a decorator. It holds for all threads.

    They read HF_HUB_OFFLINE when they are imported, which may already have happened, so their constants are set, too.
    peft and child processes read the variable. All are restored at the end.
    """
    from huggingface_hub import constants

    variable, before = os.environ.get(_VARIABLE), constants.HF_HUB_OFFLINE
    datasets = _datasets_config()
    datasets_before = datasets.HF_HUB_OFFLINE if datasets else before
    os.environ[_VARIABLE] = "1"
    constants.HF_HUB_OFFLINE = True
    if datasets:
        datasets.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
        if datasets := datasets or _datasets_config():  # imported in the body, it has taken over our constant
            datasets.HF_HUB_OFFLINE = datasets_before
        if variable is None:
            os.environ.pop(_VARIABLE, None)
        else:
            os.environ[_VARIABLE] = variable


def _datasets_config() -> Any:
    """The module `datasets.config`, if `datasets` has been imported; it has a constant of its own."""
    return sys.modules.get("datasets.config")
