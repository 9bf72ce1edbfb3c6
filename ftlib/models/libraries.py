"""What a command hides of the libraries that load models, and from them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ftlib.config.loader import RUN_CONFIG, load_experiment
from ftlib.config.packages import BITSANDBYTES, required_packages
from ftlib.config.schema import Config
from ftlib.core import files, imports, log
from ftlib.core.paths import Site
from ftlib.errors import UserError
from ftlib.hub.cache import find_adapter_base, find_model, is_adapter, is_model_folder


def quiet_libraries() -> None:
    """In a command without -v, hide warnings and progress bars of transformers; a program that uses ftlib decides.

    It is called before a model or tokenizer is loaded. `log.configure` has hidden what needs no import.
    """
    if log.silences_libraries():
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()


_UNNEEDED = ("datasets", "scipy", "sklearn")
"""transformers and peft import them, and with them pandas, for trainers, losses and assistants that ftlib does not use:
a sixth of the CPU time of their import and a quarter of the files."""


def hide_unused_packages(config: Config, site: Site) -> None:
    """Let a command start without packages that it does not need; must come before transformers and peft are imported.

    Where bitsandbytes is installed, peft imports it, and with it torch's compiler: two seconds at every start. Code of
    plugins, and weights that are stored quantized, may need it.
    """
    if not config.plugins:
        needed = any(wanted == BITSANDBYTES for _, wanted in required_packages(config))
        _hide(lambda: find_model(config.model, site), needed, site)


def hide_unused_packages_of(model_or_run: str, site: Site) -> None:
    """As `hide_unused_packages`, for the folder of a model or of a run."""
    folder = Path(model_or_run)
    if is_model_folder(folder):
        _hide(lambda: folder, False, site)
    else:
        hide_unused_packages(load_experiment(folder / RUN_CONFIG, [], site).config, site)


def _hide(find: Callable[[], Path], needs_bitsandbytes: bool, site: Site) -> None:
    imports.hide_while_importing(*_UNNEEDED)
    if not (needs_bitsandbytes or _is_stored_quantized(find, site)):
        imports.hide_package(BITSANDBYTES[0])


def _is_stored_quantized(find: Callable[[], Path], site: Site) -> bool:
    try:
        folder = find()
        if is_adapter(folder):
            folder = find_adapter_base(folder, site)
        return "quantization_config" in files.read_json_object(folder / "config.json")
    except (UserError, OSError, ValueError):
        return False  # it cannot be loaded either, which is reported then
