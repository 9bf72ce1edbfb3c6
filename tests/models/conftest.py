"""Fixtures: the tiny PaliGemmas of both generations."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def paligemmas(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Model folders, with attention dropout, so that the mode of a module matters."""
    from tests.models.tiny_paligemma import save  # imports torch: not before `isolation.hide_machine`

    second = save(tmp_path_factory.mktemp("paligemma2"), attention_dropout=0.1)
    return {"paligemma": shared / "model", "paligemma2": second}


@pytest.fixture(params=["paligemma", "paligemma2"], scope="module")
def folder(request: pytest.FixtureRequest, paligemmas: dict[str, Path]) -> Path:
    """The model folder of one generation after the other."""
    return paligemmas[request.param]
