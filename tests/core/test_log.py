"""Messages, their levels and handlers; progress and tables."""

import io
import itertools
import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ftlib.cli.main import main
from ftlib.core import files, log
from ftlib.core.paths import Site
from ftlib.runs import pinning
from ftlib.runs.run import Run
from tests.conftest import REPOSITORY


def test_a_log_file_gets_lines_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(log.time, "monotonic", lambda: now[0])
    with log.progress("step", 256) as update:
        for step in range(1, 257):
            now[0] += 5
            update(step, f"lr: {0.03:.5f}   loss: {0.3417:.4f}")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "step: 1/256   lr: 0.03000   loss: 0.3417"
    assert lines[-1] == "step: 256/256   lr: 0.03000   loss: 0.3417"
    steps = [int(line.split()[1].split("/")[0]) for line in lines]
    assert max(b - a for a, b in itertools.pairwise(steps)) * 5 <= 30
    assert len(lines) < 80


def test_other_ranks_are_silent(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_PROCID", "1")
    log.info("hello")
    with log.progress("step", 1) as update:
        update(1, "")
    assert capsys.readouterr().err == ""


def test_a_bar_within_a_bar_comes_and_goes(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log.sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    with log.progress("train", 2) as outer:
        outer(1, "")
        with log.progress("ask", 5) as inner:
            inner(5, "")
            assert log._bars and [task.description for task in log._bars.tasks] == ["train", "ask"]
        assert [task.description for task in log._bars.tasks] == ["train"]
        outer(2, "done")
    assert log._bars is None
    shown = capsys.readouterr().err
    assert "train" in shown and "done" in shown


def test_table() -> None:
    assert log.format_table(["a", "b"], [["x", "1"], ["yy", "22"]]) == "a    b\n--  --\nx    1\nyy  22"


HOSTILE = "a\x1b]52;c;cGxhbnRlZA==\x07b\x1b]0;title\x1b\\\\c\x9b31md\x7f\x08\re\udcff"


def test_what_a_terminal_obeys_is_visible() -> None:
    seen = log.escape_control_characters(HOSTILE)
    assert seen == r"a\x1b]52;c;cGxhbnRlZA==\x07b\x1b]0;title\x1b\\c\x9b31md\x7f\x08\x0de\xff"
    assert log.escape_control_characters("行 🦊\tx\r\ny\n") == "行 🦊\tx\ny\n"
    assert log.format_table(["a"], [["\x07"]]) == "a\n----\n\\x07"


def test_everything_that_is_printed_is_visible(capsys: pytest.CaptureFixture[str]) -> None:
    log.info(HOSTILE)
    log.print_result(HOSTILE)
    log.print_json([HOSTILE, "é"])
    shown = capsys.readouterr()
    assert not log._ANY_CONTROL.search(shown.out + shown.err)
    found = json.loads(shown.out.partition("\n")[2])
    assert found == [HOSTILE, "é"], "programs get what it was"


def test_of_libraries_colors_and_bars_stay(capsys: pytest.CaptureFixture[str]) -> None:
    log.install_safe_streams()
    bar = "\r\x1b[32m 50%\x1b[0m\x1b[1A\x1b[2K\x1b[?25l"
    print(bar + "\x1b]0;title\x07\x1b[21t\x1b[5n", file=sys.stderr)
    assert capsys.readouterr().err == bar + r"\x1b]0;title\x07\x1b[21t\x1b[5n" + "\n"


def test_a_bar_shows_hostile_labels_as_they_are(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log.sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    with log.progress("\x1b]0;t\x07 [link=http://x]y", 2) as update:
        update(2, "\x1b]0;t\x07 [bold]z")
    shown = capsys.readouterr().err
    assert "\x1b]" not in shown and r"\x1b]0;t\x07 [link=http://x]y" in shown and "[bold]z" in shown
    assert "\x1b[" in shown, "the bar itself has its colors"


def log_each_level() -> None:
    log.debug("a detail")
    log.info("done")
    log.result("a table")
    log.warning("ignored")
    log.error("ftlib: failed")


@pytest.mark.parametrize(
    ("verbosity", "shown"),
    [
        ("quiet", ["a table", "ignored", "ftlib: failed"]),
        ("normal", ["done", "a table", "ignored", "ftlib: failed"]),
        ("verbose", ["a detail", "done", "a table", "ignored", "ftlib: failed"]),
    ],
)
def test_levels(capsys: pytest.CaptureFixture[str], verbosity: log.Verbosity, shown: list[str]) -> None:
    log.configure(verbosity)
    log.configure(verbosity)
    log_each_level()
    assert capsys.readouterr().err.splitlines() == shown, "each once, without a prefix"


def test_other_ranks_log_errors_only(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_PROCID", "1")
    log.configure("verbose")
    log_each_level()
    logging.getLogger("ftlib.of.a.plugin").warning("not from this rank")
    assert capsys.readouterr().err == "ftlib: failed\n"


def test_quiet_shows_no_progress(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    log.configure("quiet")
    for terminal in (False, True):
        monkeypatch.setattr(log.sys.stderr, "isatty", lambda terminal=terminal: terminal)
        assert list(log.track([1, 2], "file")) == [1, 2]
    assert capsys.readouterr().err == ""


def test_results_are_not_messages(capsys: pytest.CaptureFixture[str]) -> None:
    log.configure("quiet")
    log.print_result("12")
    assert capsys.readouterr().out == "12\n"


@pytest.fixture
def foreign() -> Iterator[io.StringIO]:
    """What a handler of a program that uses ftlib gets, which has not called `configure`."""
    text = io.StringIO()
    handler = logging.StreamHandler(text)
    handler.setFormatter(logging.Formatter("%(name)s %(levelname)s %(filename)s %(funcName)s %(message)s"))
    logger = logging.getLogger("ftlib")
    logger.addHandler(handler)
    yield text
    logger.removeHandler(handler)


def test_other_handlers_get_no_secret_and_nothing_that_terminals_obey(
    foreign: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_TOKEN", "correct-horse-7")
    log.warning("at https://me:pw1234567@host with correct-horse-7\x1b]0;title\x07 100 %s")
    expected = r"at https://***@host with ***\x1b]0;title\x07 100 %s"
    name = "test_other_handlers_get_no_secret_and_nothing_that_terminals_obey"
    assert foreign.getvalue() == f"ftlib WARNING test_log.py {name} {expected}\n"


def test_records_name_the_module_that_logs(foreign: io.StringIO) -> None:
    namespace = {"__name__": "ftlib.training.train", "log": log}
    exec("log.info('hello')", namespace)
    assert foreign.getvalue().startswith("ftlib.training.train INFO ")


def test_records_of_plugins_are_cleaned_when_shown(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_TOKEN", "correct-horse-7")
    logging.getLogger("ftlib.of.a.plugin").warning("%s\x07", "correct-horse-7")
    try:
        raise RuntimeError("correct-horse-7 is wrong")
    except RuntimeError:
        logging.getLogger("ftlib.of.a.plugin").exception("failed")
    shown = capsys.readouterr().err
    assert shown.startswith("***\\x07\nfailed\nTraceback") and shown.endswith("RuntimeError: *** is wrong\n")


def test_a_handler_on_the_root_logger_prints_nothing_twice(capsys: pytest.CaptureFixture[str]) -> None:
    handler = logging.StreamHandler(sys.stderr)
    logging.getLogger().addHandler(handler)
    try:
        log.warning("once")
    finally:
        logging.getLogger().removeHandler(handler)
    assert capsys.readouterr().err == "once\n"


def test_an_unknown_verbosity_is_reported(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FTLIB_VERBOSITY", "loud")
    log.configure()
    assert log.verbosity() == "normal"
    assert capsys.readouterr().err == "FTLIB_VERBOSITY=loud: ignored; it can be quiet, normal, verbose\n"


AS_A_LIBRARY = """
import logging
from ftlib.core import log
assert log.verbosity() is None and not log.silences_libraries()
log.warning("not shown")
with log.progress("files", 1) as update:
    update(1, "")
logging.basicConfig(format="%(name)s: %(message)s", level=logging.INFO)
log.info("shown")
with log.progress("files", 1) as update:
    update(1, "")
"""


def test_a_program_that_imports_ftlib_configures_logging() -> None:
    done = subprocess.run([sys.executable, "-c", AS_A_LIBRARY], capture_output=True, text=True, check=True)
    assert done.stderr == "ftlib: shown\nftlib.core.log: files: 1/1\n"


WORKERS = """
import multiprocessing
from ftlib.core import log
if __name__ == "__main__":
    log.configure("quiet")
import logging
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
from ftlib.training.trainer import _start_worker

def work(verbosity):
    _start_worker(verbosity, 0)
    log.warning("from a worker")
    log.info("not with -q")

if __name__ == "__main__":
    for method in ("fork", "spawn"):
        process = multiprocessing.get_context(method).Process(target=work, args=(log.verbosity(),))
        process.start()
        process.join()
        assert process.exitcode == 0
"""


def test_forked_and_spawned_workers_log_as_their_parent(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(WORKERS)
    done = subprocess.run([sys.executable, tmp_path / "program.py"], capture_output=True, text=True, check=True)
    assert done.stderr == "from a worker\n" * 2


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize(("option", "verbosity"), [("-v", "verbose"), ("-q", "quiet")])
def test_options_stand_anywhere(
    monkeypatch: pytest.MonkeyPatch, store: Path, place: int, option: str, verbosity: str
) -> None:
    seen = []
    monkeypatch.setattr("ftlib.cli.status.main", lambda argv: seen.append(argv) or 0)
    arguments = ["status", "NAME"]
    assert main([*arguments[:place], option, *arguments[place:]]) == 0
    assert seen == [["NAME"]] and log.verbosity() == verbosity
    assert log.VERBOSITY_VARIABLE not in os.environ, "jobs that it submits would inherit it"
    assert main(["status", "--", option]) == 0 and seen[-1] == ["--", option]
    assert log.verbosity() == "normal"


def test_no_command_has_short_options_of_its_own_with_these_names() -> None:
    for path in (REPOSITORY / "ftlib" / "cli").glob("*.py"):
        assert path.name == "main.py" or not re.search(r"\"-[vq]\"|\"--(quiet|verbose)\"", path.read_text()), path


def test_code_that_a_run_pinned_is_told_by_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Older code knows neither -v nor -q."""
    site, run = Site(tmp_path, tmp_path / "runs"), Run(tmp_path / "runs" / "name" / "1")
    (run.code / "ftlib").mkdir(parents=True)
    (run.code / files.COMPLETE_MARKER).write_text("{}")
    started = []
    monkeypatch.setattr("ftlib.runs.pinning.permissions.require_trusted", lambda *given: None)
    monkeypatch.setattr("ftlib.runs.pinning.signal.signal", lambda *given: None)
    monkeypatch.setattr("ftlib.runs.pinning.os.execv", lambda program, arguments: started.append(arguments))
    log.configure("quiet")
    pinning.exec_pinned_code(run, site, ["train", "config.yaml"])
    assert started[0][-2:] == ["train", "config.yaml"] and os.environ["FTLIB_VERBOSITY"] == "quiet"
    assert "a different version of ftlib" in capsys.readouterr().err
    log.configure()
    assert log.verbosity() == "quiet"
