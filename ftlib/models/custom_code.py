"""Code that comes with a model (`auto_map` in its files) is never run.

Every `from_pretrained` gets trust_remote_code=False; without that transformers asks on a terminal whether to run it.
"""

from __future__ import annotations


def load_error_message(error: Exception) -> str:
    """Why transformers cannot load a model, in one line."""
    if "trust_remote_code" in str(error):
        return "it needs Python code that comes with it (auto_map), and ftlib runs none"
    return (str(error).splitlines() or [type(error).__name__])[0]
