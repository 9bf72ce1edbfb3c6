"""Turns errors that a user can fix into UserError, the same way for commands and for the Python API."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from ftlib.core import files
from ftlib.core.out_of_memory import oom_as_user_error
from ftlib.errors import UserError

HEAVY_PACKAGES = ("torch", "transformers", "peft", "accelerate", "safetensors", "PIL", "sacrebleu", "pycocotools")
"""What the light install lacks."""


@contextlib.contextmanager
def as_user_errors(name: str) -> Iterator[None]:
    """Turn a missing package, memory that ran out, and files that cannot be used, in the body, into a UserError.

    Args:
        name: of the command or function.

    Raises:
        UserError: one of these.
    """
    try:
        with oom_as_user_error():
            yield
    except ModuleNotFoundError as error:
        if error.name not in HEAVY_PACKAGES:
            raise
        remedy = f"Run it in the container: jobs/run.sh ftlib {name} … (or, in the clone: pip install -e '.[train]')"
        raise UserError(f"{name} needs {error.name}, which is not installed here", remedy) from None
    except OSError as error:
        if told := files.as_user_error(error):
            raise told from error
        raise
