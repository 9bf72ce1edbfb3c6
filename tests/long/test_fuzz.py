"""Fuzzing of all readers of data, guided by coverage. Run by `make long`, for `FTLIB_FUZZ_SECONDS` (default 300).

Hypothesis makes a case of any byte string (`fuzz_one_input`). Byte strings with which a case went through a branch of
`ftlib.data` that none had gone through before are kept, and the next ones are made of them: changed in a few places, or
put together from two. coverage.py tells the branches.
"""

from __future__ import annotations

import json
import os
import random
import time
import traceback
from pathlib import Path

import coverage
import pytest
from hypothesis import given

from tests.conftest import REPOSITORY
from tests.data.fuzz_cases import Case, cases
from tests.data.fuzz_checks import check
from tests.data.test_fuzz import SETTINGS, WHOLE

SECONDS = float(os.environ.get("FTLIB_FUZZ_SECONDS", "300"))
FOLDER = REPOSITORY / "ftlib" / "data"
LONGEST = 4096
"""Bytes of a case; what it does not need is cut off."""


@SETTINGS
@given(cases(), WHOLE)
def read(case: Case, whole: bool) -> None:
    """What is fuzzed."""
    check(case, whole)


def changed(corpus: list[bytes], chance: random.Random) -> bytes:
    """A new byte string from those that are kept; now and then one of its own."""
    if not corpus or chance.random() < 0.05:
        return chance.randbytes(LONGEST)
    # the latest have been tried least
    found = bytearray(corpus[max(chance.randrange(len(corpus)), chance.randrange(len(corpus)))])
    if chance.random() < 0.2:
        place = chance.randrange(len(found) + 1)
        found[place:] = chance.choice(corpus)[place:]
    for _ in range(chance.choice((1, 1, 2, 4, 8))):
        place, change = chance.randrange(len(found) + 1), chance.random()
        if change < 0.6:
            found[place : place + 1] = chance.randbytes(1)
        elif change < 0.8:
            found[place:place] = chance.randbytes(chance.choice((1, 2, 8)))
        elif change < 0.9:
            del found[place : place + chance.choice((1, 2, 8))]
        else:
            found[place:] = chance.randbytes(len(found) - place)
    return bytes(found) + chance.randbytes(LONGEST - min(LONGEST, len(found)))


@pytest.mark.long
def test_readers_guided_by_coverage(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    chance = random.Random(os.environ.get("FTLIB_FUZZ_SEED", "0"))
    measured = coverage.Coverage(data_file=None, branch=True, source=[str(FOLDER)], config_file=False)
    corpus: list[bytes] = []
    faults: dict[str, str] = {}
    executions = known = 0
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        used = None
        measured.start()
        try:
            used = read.hypothesis.fuzz_one_input(changed(corpus, chance))  # type: ignore[attr-defined]
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            faults.setdefault(f"{type(error).__name__} in {place.filename}:{place.lineno}", traceback.format_exc())
        finally:
            measured.stop()
        executions += 1
        found = measured.get_data()
        branches = sum(len(found.arcs(name) or ()) for name in found.measured_files())
        if branches > known and used is not None:
            corpus.append(used)
        known = branches
    tell(measured, tmp_path / "coverage.json")
    print(f"{executions:,} executions, {len(corpus):,} of them kept for new branches", flush=True)
    assert not faults, "\n\n".join(f"{what}\n{text}" for what, text in faults.items())
    assert len(corpus) > 20


def tell(measured: coverage.Coverage, path: Path) -> None:
    """Print how many branches of each module were taken."""
    measured.json_report(outfile=str(path))
    report = json.loads(path.read_text())
    for name, entry in [*report["files"].items(), ("total", {"summary": report["totals"]})]:
        taken, of = entry["summary"]["covered_branches"], entry["summary"]["num_branches"]
        if of:
            print(f"{os.path.relpath(name, FOLDER) if name != 'total' else name}: {taken} of {of} branches", flush=True)
