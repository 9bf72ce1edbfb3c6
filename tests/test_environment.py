"""What a process sets up before torch is imported."""

from __future__ import annotations

import os

import pytest

from ftlib import environment

NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
SEGMENTS = "expandable_segments:True"


@pytest.mark.parametrize(
    ("torch", "given", "expected"),
    [
        ("2.11.0+cu130", {}, {NAMES[0]: SEGMENTS}),
        ("2.6.0", {}, {NAMES[1]: SEGMENTS}),
        ("2.11.0", {NAMES[1]: "max_split_size_mb:128"}, {NAMES[1]: "max_split_size_mb:128"}),
        ("2.6.0", {NAMES[0]: ""}, {NAMES[0]: ""}),
        (None, {}, {}),
    ],
)
def test_segments_are_expandable_unless_the_user_says_otherwise(
    torch: str | None, given: dict[str, str], expected: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in NAMES:
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(environment, "_version", lambda name: torch)
    environment.prefer_expandable_segments()
    assert {name: os.environ[name] for name in NAMES if name in os.environ} == expected
