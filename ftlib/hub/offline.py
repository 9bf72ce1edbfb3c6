"""No network: models and datasets come from the store, whatever a library would like to look up."""

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

    They read HF_HUB_OFFLINE only when they are imported, which may have been long ago, so that the constant that they
    made of it is set, too. peft, and processes that are started, read the variable. Afterwards all is as it was.
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
