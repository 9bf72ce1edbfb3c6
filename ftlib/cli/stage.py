"""Bring what a config needs into the shared store: model and processor, a dataset of the hub or one that ftlib makes.
Or a model or adapter of the hub by its name, OWNER/NAME, for example to merge it.

Run it on the login node; jobs then work offline. A hub's model or dataset stays at the commit that was first staged;
model.revision names another one. Embedded models (ftlib/…) are made instead of downloaded. A checkpoint of big_vision
(model.base: ….npz) is converted, which needs what training needs: `jobs/run.sh ftlib stage CONFIG`.
"""

from __future__ import annotations

from ftlib import api, staging
from ftlib.cli import arguments
from ftlib.config.paths import hub_name
from ftlib.core import log
from ftlib.core.paths import find_site
from ftlib.errors import UserError


def main(argv: list[str]) -> int:
    """`ftlib stage CONFIG [KEY=VALUE…]` or `ftlib stage OWNER/NAME [revision=REVISION]`"""
    command = arguments.make_parser("stage", __doc__)
    arguments.add_config_arguments(command)
    parsed = command.parse_args(argv)
    if hub_name(str(parsed.config)) and parsed.config.suffix not in (".yaml", ".yml") and not parsed.config.exists():
        revision = _revision(parsed.overrides)
        log.print_result(str(staging.stage_by_name(str(parsed.config), revision, find_site())))
        return 0
    api.stage(parsed.config, parsed.overrides)
    return 0


def _revision(options: list[str]) -> str | None:
    """The value of `revision=…`."""
    names = [text.removeprefix("revision=") for text in options]
    if len(options) > 1 or (options and names == options):
        raise UserError(f"stage: {options[-1]}: of a model of the hub, only revision=… can be set")
    return names[0] if names else None
