"""Download what a config needs to the shared store: model and processor, and a hub dataset or a generated toy dataset.
Or a model or adapter of the hub by its name, OWNER/NAME, for example to merge it.

Run it on the login node; jobs then work offline. A model or dataset of the hub stays at the commit that was first
staged; model.revision selects another one. Embedded models (ftlib/…) are generated. A big_vision checkpoint
(model.base: ….npz) is converted, which needs the packages of training: `jobs/run.sh ftlib stage CONFIG`.
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
        raise UserError(f"stage: {options[-1]}: for a model of the hub, only revision=… can be set")
    return names[0] if names else None
