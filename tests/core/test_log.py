"""Progress and tables."""

import itertools
import json
import sys

import pytest

from ftlib.core import log


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
