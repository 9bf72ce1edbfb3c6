"""2,000 spoilt datasets and result files over all readers, the same in each run: see `fuzz_checks` for what must hold.

`make long` goes on from here, led by the branches that a case reaches.
"""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.data.fuzz_cases import KINDS, Case, cases
from tests.data.fuzz_checks import check

EXAMPLES = dict.fromkeys(KINDS, 93) | {"parquet": 30, "hub_text": 30}
"""`datasets` takes ten times as long as any other reader."""

SETTINGS = settings(database=None, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
WHOLE = st.integers(0, 9).map(lambda number: number == 9)
"""Whether a case is prepared, too."""


def test_there_are_enough() -> None:
    assert sum(EXAMPLES.values()) >= 2000


@pytest.mark.parametrize("kind", KINDS)
def test_spoilt_data(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found: Counter[str] = Counter()

    @settings(SETTINGS, max_examples=EXAMPLES[kind])
    @given(cases(kind), WHOLE)
    def read(case: Case, whole: bool) -> None:
        found[check(case, whole)] += 1

    read()
    assert found["rows"] + found["scores"] >= EXAMPLES[kind] // 20
