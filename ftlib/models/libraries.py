"""What a command hides of the libraries that load models, and from them."""

from __future__ import annotations

from ftlib.config.packages import BITSANDBYTES, required_packages
from ftlib.config.schema import Config
from ftlib.core import files, imports, log
from ftlib.core.paths import Site
from ftlib.errors import UserError
from ftlib.hub.cache import find_adapter_base, find_model, is_adapter


def quiet_libraries() -> None:
    """In a command without -v, hide warnings and progress bars of transformers; a program that uses ftlib decides.

    It is called before a model or tokenizer is loaded. `log.configure` has hidden what needs no import.
    """
    if log.silences_libraries():
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()


def hide_unused_bitsandbytes(config: Config, site: Site) -> None:
    """Let a command whose config needs no bitsandbytes work without it; must come before peft is imported.

    Where it is installed, peft imports it, and with it torch's compiler: two seconds at every start. Code of plugins,
    and weights that are stored quantized, may need it.
    """
    needed = any(wanted == BITSANDBYTES for _, wanted in required_packages(config))
    if not (needed or config.plugins or _is_stored_quantized(config, site)):
        imports.hide_package(BITSANDBYTES[0])


def _is_stored_quantized(config: Config, site: Site) -> bool:
    try:
        folder = find_model(config.model, site)
        if is_adapter(folder):
            folder = find_adapter_base(folder, site)
        return "quantization_config" in files.read_json_object(folder / "config.json")
    except (UserError, OSError, ValueError):
        return False  # it cannot be loaded either, which is reported then
