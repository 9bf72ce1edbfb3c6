"""What a command hides of the libraries that load models."""

from __future__ import annotations

from ftlib.core import log


def quiet_libraries() -> None:
    """In a command without -v, hide warnings and progress bars of transformers; a program that uses ftlib decides.

    It is called before a model or tokenizer is loaded. `log.configure` has hidden what needs no import.
    """
    if log.silences_libraries():
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
