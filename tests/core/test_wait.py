"""Waiting for what another process does."""

from __future__ import annotations

from ftlib.core import wait
from ftlib.core.wait import wait_until


def test_it_looks_until_something_is_there(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    slept: list[float] = []
    monkeypatch.setattr(wait.time, "sleep", slept.append)
    answers = iter([None, "", "there"])
    assert wait_until(lambda: next(answers), poll=3) == "there" and slept == [3, 3]
    assert wait_until(lambda: True, poll=3) and slept == [3, 3], "what is there is not waited for"


def test_its_time_ends(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    now = [0.0]
    monkeypatch.setattr(wait.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(wait.time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    asked: list[float] = []
    assert wait_until(lambda: asked.append(now[0]), poll=2, timeout=5) is None
    assert asked == [0, 2, 4, 6], "and looks once more in the end"
    asked.clear()
    assert wait_until(lambda: asked.append(now[0]), poll=2, timeout=0) is None and len(asked) == 1
