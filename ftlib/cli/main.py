"""The command line: `ftlib COMMAND …` and `python3 -m ftlib COMMAND …` are the same.

Each command is a module in `ftlib/cli/`, imported only when it is called, so that `--help` is quick and the
login node does without torch. This is the only place that catches UserError.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import platform
import sys
from pathlib import Path

from ftlib import __version__
from ftlib.core import imports, log, permissions, signals, trust
from ftlib.core.environment import prefer_expandable_segments
from ftlib.core.paths import find_site
from ftlib.core.user_errors import as_user_errors
from ftlib.errors import EXIT_FAILURE, EXIT_INTERRUPTED, EXIT_RANK_LOST, EXIT_REQUEUE, EXIT_USER, RankLost, UserError
from ftlib.hub.offline import offline

COMMANDS = {
    "demo": "no cluster: real digits, or a pretrained text model, through the whole chain to a report",
    "stage": "bring model and dataset into the shared store",
    "prepare": "check a dataset and split it into train, valid and test",
    "prompts": "rank prompts with the untrained model",
    "plan": "what a config will need on a GPU, and the largest micro-batch that fits",
    "train": "train, or go on training",
    "evaluate": "ask a model every question of a split and score its answers",
    "score": "score result files of a dataset's own format; no model, no GPU",
    "merge": "merge fine-tuned models or adapters into one",
    "export": "a run's result as a whole model, without PEFT",
    "predict": "one answer to one question",
    "chat": "an interactive session with a trained run",
    "audit": "likely wrong labels and near-duplicate images of a dataset",
    "report": "one self-contained HTML page about a run, or of several",
    "submit": "send a run, or all runs of a sweep, to Slurm; or train here",
    "status": "what runs, what died and why; what it cost",
    "logs": "the end of a run's log",
    "cancel": "cancel runs, queued or running, by name",
    "clean": "free the space of what is not needed any more; asks before it deletes",
    "push": "put a run's adapter or model on the hub",
    "doctor": "check this machine and say what to do",
    "schema": "JSON Schema of the config, for editors",
}

OFFLINE = ("prepare", "prompts", "plan", "train", "evaluate", "merge", "export", "predict", "chat")
"""They work with what is in the store. What they import must not reach the hub either, as bitsandbytes for kernels."""

VERBOSITY_OPTIONS: dict[str, log.Verbosity] = {"-v": "verbose", "-q": "quiet"}
"""Anywhere in a command line, as `--debug`."""


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    log.install_safe_streams()
    code = EXIT_FAILURE
    try:
        code = _run_to_exit_code(list(sys.argv[1:] if argv is None else argv))
    except SystemExit as stop:  # argparse
        code = int(stop.code or 0)
        raise
    except BrokenPipeError:  # nobody reads the messages any more
        pass
    finally:
        _discard_unread_output()
        if code not in (0, EXIT_REQUEUE):
            signals.notify_failure(code)
    return code


def _discard_unread_output() -> None:
    """Flush the output; discard what nobody reads (`ftlib --help | head`), which Python would report at its end."""
    for stream, number in ((sys.stdout, 1), (sys.stderr, 2)):
        try:
            if stream is not None:
                stream.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)


def _configure_log(arguments: list[str]) -> list[str]:
    """The arguments without -v and -q, of which the last one holds; what is behind `--` stays."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    named = [argument for argument in arguments[:end] if argument in VERBOSITY_OPTIONS]
    log.configure(VERBOSITY_OPTIONS[named[-1]] if named else None)
    return [argument for argument in arguments[:end] if argument not in VERBOSITY_OPTIONS] + arguments[end:]


def _trust_named_code(arguments: list[str]) -> list[str]:
    """The arguments without `--trust-code HASH`, which is noted in the environment for processes of this command."""
    while "--trust-code" in arguments[:-1]:
        place = arguments.index("--trust-code")
        named = [os.environ.get(trust.TRUSTED, ""), arguments[place + 1]]
        os.environ[trust.TRUSTED] = ",".join(filter(None, named))
        arguments = arguments[:place] + arguments[place + 2 :]
    return arguments


def _run_to_exit_code(arguments: list[str]) -> int:
    """Run a command; its exit code, whatever became of it."""
    debug = "--debug" in arguments
    try:
        arguments = [argument for argument in arguments if argument != "--debug"]
        arguments = _trust_named_code(_configure_log(arguments))
        if not arguments or arguments[0] in ("-h", "--help", "help"):
            print(_help())
            return 0
        if arguments[0] == "--version":
            print(f"ftlib {__version__}")
            return 0
        signals.install_handlers()
        permissions.limit_umask()
        prefer_expandable_segments()
        imports.skip_collection_at_exit()
        imports.store_import_structure(_jobs_folder)
        if not (code := _run(arguments[0], arguments[1:])):
            signals.notify_done(arguments[0])
        return code
    except signals.Preempted as signal:
        log.error(f"ftlib: {signals.end_message(f'ended by {signal}')}")
        return EXIT_REQUEUE
    except UserError as error:
        if debug:
            raise
        log.error(f"ftlib: {error}")
        return EXIT_USER
    except RankLost as error:
        log.error(f"ftlib: {error}")
        return EXIT_RANK_LOST
    except KeyboardInterrupt:
        log.error(f"ftlib: {signals.end_message('interrupted')}")
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        return EXIT_FAILURE


def _jobs_folder() -> Path | None:
    """The user's folder for what jobs share; None in a store without a run of theirs, in which nothing is created."""
    site = find_site()
    return permissions.open_jobs_folder(site) if site.store.is_dir() and site.runs.is_dir() else None


def _run(name: str, arguments: list[str]) -> int:
    if name not in COMMANDS:
        import difflib

        near = difflib.get_close_matches(name, COMMANDS, n=1)
        raise UserError(f"{name}: no such command", f"Did you mean {near[0]}?" if near else "See `ftlib --help`.")
    log.debug(f"ftlib {__version__} in {Path(__file__).parents[1]}, Python {platform.python_version()}")
    with as_user_errors(name), offline() if name in OFFLINE else contextlib.nullcontext():
        code: int = importlib.import_module(f"ftlib.cli.{name}").main(arguments)
    if not code and name == "stage" and signals.following_command() == "prepare":
        # Mostly that is done: then the job need not start a container and a Python for it.
        return _run("prepare", arguments)
    return code


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            "usage: ftlib COMMAND …   (ftlib COMMAND --help tells more; --debug shows tracebacks of user errors,",
            "                          -v also details and warnings of libraries; -q only warnings, errors, results)",
            "",
            *lines,
        ]
    )
