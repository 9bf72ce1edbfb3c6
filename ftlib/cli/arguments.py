"""Arguments that several commands share."""

from __future__ import annotations

import argparse
from pathlib import Path

from ftlib.config.loader import Experiment, load_experiment
from ftlib.core.paths import Site
from ftlib.hub.cache import is_model_folder
from ftlib.runs.run import find_trained_run


def make_parser(command: str, description: str | None) -> argparse.ArgumentParser:
    """An argument parser for `ftlib COMMAND`."""
    return argparse.ArgumentParser(
        prog=f"ftlib {command}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def add_config_arguments(command: argparse.ArgumentParser) -> None:
    """CONFIG [KEY=VALUE…]"""
    command.add_argument("config", metavar="CONFIG", type=Path, help="YAML file of the experiment")
    command.add_argument(
        "overrides",
        metavar="KEY=VALUE",
        nargs="*",
        help="set a field by its dotted path, for example training.learning_rate=1e-4",
    )


def add_max_new_tokens_argument(command: argparse.ArgumentParser) -> None:
    """--max-new-tokens N"""
    told = "default: evaluation.max_new_tokens"
    command.add_argument("--max-new-tokens", metavar="N", type=_positive_int, help=told)


def _positive_int(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text}: must be a whole number above 0")
    return int(text)


def find_model_or_run(text: str, site: Site) -> str:
    """The folder that RUN names: of a model, or of a trained run. Does not import torch, which a login node lacks.

    Raises:
        UserError: no such run, several, or it is not trained yet.
    """
    return text if is_model_folder(Path(text)) else str(find_trained_run(text, site).folder)


def load_from_arguments(arguments: argparse.Namespace, site: Site) -> Experiment:
    """The experiment that CONFIG and KEY=VALUE name."""
    return load_experiment(arguments.config, arguments.overrides, site)
