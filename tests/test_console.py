"""Progress and tables."""

import itertools

import pytest

from ftlib import console


def test_a_log_file_gets_lines_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    with console.progress("step", 256) as update:
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
    console.say("hello")
    with console.progress("step", 1) as update:
        update(1, "")
    assert capsys.readouterr().err == ""


def test_a_bar_within_a_bar_comes_and_goes(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console.sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    with console.progress("train", 2) as outer:
        outer(1, "")
        with console.progress("ask", 5) as inner:
            inner(5, "")
            assert console._bars and [task.description for task in console._bars.tasks] == ["train", "ask"]
        assert [task.description for task in console._bars.tasks] == ["train"]
        outer(2, "done")
    assert console._bars is None
    shown = capsys.readouterr().err
    assert "train" in shown and "done" in shown


def test_table() -> None:
    assert console.table(["a", "b"], [["x", "1"], ["yy", "22"]]) == "a    b\n--  --\nx    1\nyy  22"
