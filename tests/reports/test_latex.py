"""The LaTeX table: its numbers, their sources, and text that LaTeX would take for markup."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from ftlib.core.paths import Site
from ftlib.reports.latex import escape
from tests.reports.test_sweep_report import _member

Ftlib = Callable[..., tuple[int, str, str]]


def test_the_table_of_a_sweep(site: Site, tmp_path: Path, ftlib: Ftlib) -> None:
    runs = [_member(site, tmp_path, 8 - seed, 5 + seed, seed=seed) for seed in (0, 1)]
    assert ftlib("report", "pets", "-o", tmp_path / "p.html", "--latex")[0] == 0
    text = (tmp_path / "p.tex").read_text()
    row = next(line for line in text.splitlines() if " & 2 of 2 & " in line)
    assert r"0.750 $\pm$ 0.071 & 0.550 $\pm$ 0.071 & 0.000--1.000 & 10 & -- & 0.00" in row
    for run, valid, test in zip(runs, ("0.8", "0.7"), ("0.5", "0.6"), strict=True):
        assert f"% pets/{run.folder.name}: seed" in text
        assert f"valid after training: accuracy {valid}, n 10, eval/jsonl/valid/after/scores.json" in text
        assert f"test after training: accuracy {test}, n 10" in text
    assert "torch 2.9.1" in text and "scikit-learn" in text and "max\\_new\\_tokens 16" in text
    assert text.count("{table}") == 2 and not re.search(r"(?<![\\%])[_#&](?![ _])", re.sub(r"(?m)^%.*$", "", text))


def test_a_single_run_has_the_interval_of_its_score(site: Site, tmp_path: Path, ftlib: Ftlib) -> None:
    _member(site, tmp_path, 8, 5)
    assert ftlib("report", "pets", "-o", tmp_path / "p.html", "--latex")[0] == 0
    assert "& 1 of 1 & 0.800 & 0.500 & 0.237--0.763 & 10 &" in (tmp_path / "p.tex").read_text()


def test_markup_is_text() -> None:
    assert escape("50 % of a_b & {x} #1 \\") == "50 \\% of a\\_b \\& \\{x\\} \\#1 \\textbackslash{}"
