"""Code that comes with a model (`auto_map` in its files) is never run.

Every `from_pretrained` gets trust_remote_code=False; without that transformers asks on a terminal whether to run it.
"""

from __future__ import annotations

from pathlib import Path


def load_error_message(error: Exception, folder: Path | None = None) -> str:
    """Why transformers cannot load a model, in one line.

    Args:
        folder: of the model; the files that name its code are then told.
    """
    if not _needs_code(error):
        return (str(error).splitlines() or [type(error).__name__])[0]
    told = "it needs Python code that comes with it (auto_map), and ftlib runs none"
    files = sorted(folder.glob("*config.json")) if folder else []
    named = [path.name for path in files if b'"auto_map"' in path.read_bytes()]
    return f"{told}; it is named in {', '.join(named)}" if named else told


def load_error_remedy(error: Exception, usual: str) -> str:
    """What to do about it.

    Args:
        usual: the remedy unless the model needs code of its own.
    """
    return "Take a model that transformers loads without trust_remote_code." if _needs_code(error) else usual


def _needs_code(error: Exception) -> bool:
    return "trust_remote_code" in str(error)
