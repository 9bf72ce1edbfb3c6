"""The page on methods tells what the planner says of models and GPUs."""

from __future__ import annotations

import pytest

from tests.memory.methods_table import PAGE, with_tables


@pytest.mark.long
def test_the_tables_of_models_and_gpus_are_the_planners() -> None:
    page = PAGE.read_text()
    assert with_tables(page) == page, "python -m tests.memory.methods_table writes them anew"
