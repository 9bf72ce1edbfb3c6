"""What a person sees while ftlib works: messages of the standard `logging`, progress, and results on stdout.

Messages go to the logger of the calling module (`ftlib.training.train`), below the logger `ftlib`. Its handler is
installed by the command line (`configure`): plain lines on stderr, at the level set by -v or -q. A program that
imports ftlib configures `logging` itself, as with any library. Only the first rank of a job logs, except for errors.

On a terminal progress is a bar; in a log file it is a line now and then; with -q there is none.

File names, histories and answers of models may contain terminal escape sequences: control characters are printed as
`\\x1b`. Secrets are masked (redaction.py). Both are done before a message reaches any handler; records that a plugin
logs itself are cleaned in ftlib's handler. After `install_safe_streams` both hold for tracebacks, warnings and the
output of libraries, too, except for colors and progress bars.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, TextIO, TypeVar

from ftlib.core.redaction import redact
from ftlib.errors import UserError

if TYPE_CHECKING:
    from rich.progress import Progress

T = TypeVar("T")
Verbosity = Literal["quiet", "normal", "verbose"]
VERBOSITY_VARIABLE = "FTLIB_VERBOSITY"
"""Environment variable with the verbosity of commands without -v and -q."""

RESULT = (logging.INFO + logging.WARNING) // 2
"""The level of tables that are a command's result."""

LEVELS: dict[Verbosity, int] = {"quiet": RESULT, "normal": logging.INFO, "verbose": logging.DEBUG}
"""The lowest level that is shown."""

SECONDS_BETWEEN_LINES = 30.0
LINES_PER_TASK = 20

_CONTROL = r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]"
"""Control characters except newlines and tabs, and lone surrogates, which cannot be printed."""

_ANY_CONTROL = re.compile(_CONTROL)
_LIBRARY_CONTROL = re.compile(rf"(\x1b\[[0-9;]*[mABCDGJK]|\x1b\[\?25[hl]|\r)|{_CONTROL}")
"""Group 1: colors and progress bars, which are kept; otherwise what is escaped."""

_NOT_IN_JSON = re.compile(r"[\x7f-\x9f\ud800-\udfff]")

_logger = logging.getLogger("ftlib")
_logger.addHandler(logging.NullHandler())  # without a handler, Python would print warnings of a library on stderr

_verbosity: Verbosity | None = None
"""Set by `configure`; None if ftlib is used as a library."""

_bars: Progress | None = None
"""The active progress display."""

ProgressUpdate = Callable[[int, str], None]
"""Called with the number of finished units and what to say of the last one."""


def rank_and_world_size() -> tuple[int, int]:
    """This process's number and how many there are, as Slurm counts the tasks of a step."""
    return int(os.environ.get("SLURM_PROCID", 0)), int(os.environ.get("SLURM_STEP_NUM_TASKS", 1))


def is_main_process() -> bool:
    """Whether this process is the first rank of its job (or the only one)."""
    return rank_and_world_size()[0] == 0


def escape_control_characters(text: str) -> str:
    """A text that no terminal obeys: control characters are escaped, but for the ends of lines and tabs."""
    return _ANY_CONTROL.sub(_escaped, text.replace("\r\n", "\n"))


def _escaped(match: re.Match[str]) -> str:
    """An escape as Python writes it; a byte that is no text (in a file's name) is shown as that byte."""
    code = ord(match[0])
    if 0xDC80 <= code <= 0xDCFF:
        code -= 0xDC00
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


class _SafeStream:
    """A text stream that masks secrets, and escapes what terminals obey, in what is written to it."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(_LIBRARY_CONTROL.sub(lambda match: match[1] or _escaped(match), redact(text)))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def install_safe_streams() -> None:
    """Mask secrets, and escape sequences except colors and progress bars, in everything that Python prints."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, _SafeStream):
            setattr(sys, name, _SafeStream(stream))


def _clean(text: str) -> str:
    return escape_control_characters(redact(text))


class _StderrHandler(logging.Handler):
    """Prints records as plain lines on what is sys.stderr at that time (a progress bar and pytest replace it).

    Also of loggers below `ftlib` that plugins use, whose records nobody has cleaned.
    """

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record; a closed stderr raises, and ends the command."""
        try:
            text = _clean(self.format(record))
        except Exception:  # a plugin's arguments that do not fit its message
            self.handleError(record)
            return
        print(text, file=sys.stderr, flush=True)


def _may_speak(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR or is_main_process()


def configure(verbosity: Verbosity | None = None) -> None:
    """Show messages on stderr from now on, as commands do. Calling it again changes the verbosity.

    Args:
        verbosity: `quiet`: only results, warnings and errors. `verbose`: details, and warnings of the libraries, too.
            None: as FTLIB_VERBOSITY says, else `normal`.
    """
    global _verbosity
    named = os.environ.get(VERBOSITY_VARIABLE, "")
    given = [known for known in LEVELS if known == (verbosity or named)]
    _verbosity = given[0] if given else "normal"
    _logger.setLevel(LEVELS[_verbosity])
    _logger.propagate = False  # a handler that some library put on the root logger would print everything again
    if not any(isinstance(handler, _StderrHandler) for handler in _logger.handlers):
        handler = _StderrHandler()
        handler.addFilter(_may_speak)
        _logger.addHandler(handler)
    if silences_libraries():
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # a line per layer and batch
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft")
    if named and named not in LEVELS:
        warning(f"{VERBOSITY_VARIABLE}={named}: ignored; it can be {', '.join(LEVELS)}")


def verbosity() -> Verbosity | None:
    """What this command shows; None if this process is none, but a program that uses ftlib as a library."""
    return _verbosity


def silences_libraries() -> bool:
    """Whether warnings and progress bars of libraries are hidden: in a command, unless it is verbose."""
    return _verbosity in ("quiet", "normal")


def shows_progress() -> bool:
    """Whether this process reports progress."""
    return is_main_process() and _logger.isEnabledFor(logging.INFO)


def export_verbosity() -> None:
    """Let the commands that this one starts show as much."""
    if _verbosity:
        os.environ[VERBOSITY_VARIABLE] = _verbosity


def debug(text: str) -> None:
    """Log a detail, if this is the first rank."""
    _log(logging.DEBUG, text)


def info(text: str) -> None:
    """Log what is done, if this is the first rank."""
    _log(logging.INFO, text)


def result(text: str) -> None:
    """Log a table that is the command's result, also with -q, if this is the first rank."""
    _log(RESULT, text)


def warning(text: str) -> None:
    """Log what a person must know (ignored, replaced, left out, differs), if this is the first rank."""
    _log(logging.WARNING, text)


def error(text: str) -> None:
    """Log why a command ends, from any rank."""
    _log(logging.ERROR, text)


def _log(level: int, text: str) -> None:
    """To the logger of the module that called `info` or its like."""
    module = sys._getframe(2).f_globals.get("__name__", "")
    logger = logging.getLogger(module) if module.startswith("ftlib.") else _logger
    if logger.isEnabledFor(level) and (level >= logging.ERROR or is_main_process()):
        logger.log(level, _clean(text), stacklevel=3)


def print_result(text: str, end: str = "\n") -> None:
    """Print a result on stdout."""
    print(_clean(text), end=end, flush=True)


def print_json(value: Any) -> None:
    """Print a result on stdout as JSON, which escapes in its own way."""
    text = json.dumps(value, ensure_ascii=False, indent=1)
    print_result(_NOT_IN_JSON.sub(lambda match: f"\\u{ord(match[0]):04x}", text))


def ask(question: str, remedy: str) -> bool:
    """Ask a yes-or-no question on the terminal; anything but yes, also the end of the input, means no.

    Args:
        remedy: how to answer without a terminal.

    Raises:
        UserError: standard input is not a terminal.
    """
    if not sys.stdin.isatty():
        raise UserError("not a terminal, so ftlib cannot ask for confirmation", remedy)
    try:
        return input(f"{question} [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:  # Ctrl-D
        print(file=sys.stderr)
        return False
    except UnicodeDecodeError:
        return False


@contextlib.contextmanager
def progress(label: str, total: int, start: int = 0) -> Iterator[ProgressUpdate]:
    """Show how far a task of `total` units is; 0 if their number is unknown.

    Yields:
        A function to call after each unit with (finished units, text).
    """
    if not shows_progress():
        yield lambda done, text: None
    elif _verbosity and sys.stderr.isatty():
        with _progress_bar(label, total, start) as update:
            yield update
    else:
        yield _progress_lines(label, total)


@contextlib.contextmanager
def _progress_bar(label: str, total: int, start: int) -> Iterator[ProgressUpdate]:
    """A task within another (questions asked in training) has its bar below the other's, as long as it lasts."""
    global _bars
    outer = _bars
    bars = _bars = outer or _new_bars()
    try:
        with contextlib.nullcontext() if outer else bars:
            task = bars.add_task(escape_control_characters(label), total=total, completed=start, text="")
            yield lambda done, text: bars.update(task, completed=done, text=escape_control_characters(text))
            if outer:
                bars.remove_task(task)
    finally:
        _bars = outer


def _new_bars() -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}", markup=False),
    )
    return Progress(*columns, console=Console(stderr=True))


def _progress_lines(label: str, total: int) -> ProgressUpdate:
    """Print the first, the last, about `LINES_PER_TASK` between them if they take long, and one at least every 30 s."""
    every = max(1, total // LINES_PER_TASK)
    of = f"/{total}" if total else ""
    last = time.monotonic() - SECONDS_BETWEEN_LINES

    def update(done: int, text: str) -> None:
        nonlocal last
        quiet = time.monotonic() - last
        if (total and done >= total) or quiet >= SECONDS_BETWEEN_LINES or (total and done % every == 0 and quiet >= 1):
            last = time.monotonic()
            info(f"{label}: {done}{of}   {text}".rstrip())

    return update


def track(items: Sequence[T], label: str) -> Iterable[T]:
    """Go through items and show how far."""
    with progress(label, len(items)) as update:
        for number, item in enumerate(items, 1):
            yield item
            update(number, "")


def format_table(headers: Sequence[str], rows: Sequence[Sequence[str]], text_columns: Collection[str] = ()) -> str:
    """A plain text table; the first column and those in `text_columns` to the left, the others to the right."""
    cells = [list(headers), *[list(map(escape_control_characters, row)) for row in rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(headers))]

    def line(row: Sequence[str]) -> str:
        left = [headers[0], *text_columns]
        cells = zip(headers, row, widths, strict=True)
        aligned = [cell.ljust(width) if name in left else cell.rjust(width) for name, cell, width in cells]
        return "  ".join(aligned).rstrip()

    return "\n".join([line(cells[0]), "  ".join("-" * width for width in widths), *map(line, cells[1:])])
