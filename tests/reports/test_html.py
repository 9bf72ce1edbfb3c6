"""What templates print is escaped, and what they get is plain data."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
from markupsafe import Markup

from ftlib.core.paths import Site
from ftlib.data.location_tokens import LocatedObject, format_objects
from ftlib.reports import html, run_report, sweep_report
from ftlib.reports.html import TEMPLATES, make_environment, render_page
from ftlib.reports.tables import Table
from ftlib.runs.run import Run
from tests.conftest import REPOSITORY
from tests.reports.fake_runs import evaluate, record_of, row

NAMES = sorted(path.name for path in TEMPLATES.iterdir())
DOCS = (REPOSITORY / "docs" / "reports.md").read_text()
EVIL = "\"><script>'</style>&{{ 7*7 }}"
ESCAPED = "&#34;&gt;&lt;script&gt;&#39;&lt;/style&gt;&amp;{{ 7*7 }}"


def section(table: Table) -> str:
    body = make_environment().from_string('{% import "macros.html.j2" as m %}{{ m.section(content.title, content) }}')
    return render_page("t", body, content=table).partition("</style>")[2]


def test_tables_escape_and_align() -> None:
    page = section(Table(EVIL, "lr", [EVIL, "legs"], [[EVIL, "4"], ["cat", EVIL]], [EVIL]))
    assert page.count(ESCAPED) == 6 and "<script" not in page
    assert f'aria-label="{ESCAPED}"' in page
    assert f'<th scope="col" class="l">{ESCAPED}</th>' in page and f'<td class="r">{ESCAPED}</td>' in page


def test_half_a_surrogate_pair_can_be_written() -> None:
    page = section(Table("a\ud800b", "l", [], []))
    assert "<h2>a?b</h2>" in page and page.encode("utf-8")


def test_no_template_turns_escaping_off() -> None:
    for name in NAMES:
        text = (TEMPLATES / name).read_text()
        assert not re.search(r"\|\s*safe|autoescape|\|\s*attr\(|Markup", text), name
        assert not re.search(r"=\s*\{\{|<script|\son\w+=|https?:", text), (
            f"{name}: an attribute without quotes, or a script"
        )
    markup = [path.name for path in (REPOSITORY / "ftlib").rglob("*.py") if "markupsafe" in path.read_text()]
    assert markup == ["charts.py"]


def values(found: Any) -> Iterator[Any]:
    """What a template can reach."""
    if isinstance(found, dict):
        yield from values(list(found.values()))
    elif isinstance(found, (list, tuple)):
        for value in found:
            yield from values(value)
    elif isinstance(found, Table):
        yield from values([found.title, found.align, found.headers, found.rows, found.remarks])
    else:
        yield found


def keys(found: Any) -> Iterator[str]:
    """The names under which a template reaches it."""
    if isinstance(found, dict):
        yield from found
        found = list(found.values())
    if isinstance(found, (list, tuple)):
        for value in found:
            yield from keys(value)


@pytest.mark.parametrize("several", [False, True])
def test_templates_get_plain_data_which_the_docs_list(
    finished: Run, site: Site, monkeypatch: pytest.MonkeyPatch, several: bool
) -> None:
    """A Path, for example, would let a template read files."""
    box = format_objects([LocatedObject((0.1, 0.1, 0.9, 0.9), "cat")])
    evaluate(finished, "valid", "before", [row(1, box, box, facts={"mask": {"size": [9, 9], "counts": [40, 9, 32]}})])
    module = sweep_report if several else run_report
    given: dict[str, Any] = {}
    monkeypatch.setattr(module, "render_page", lambda title, body, templates, **context: given.update(context) or "")
    record = record_of(finished, site)
    sweep_report.render_sweep([record, record], 0.0) if several else run_report.render(record, 0.0)
    assert {type(value) for value in values(given)} <= {str, int, float, bool, type(None), Markup}
    assert all(value.startswith("<svg ") for value in values(given) if isinstance(value, Markup))
    lines = [line for line in DOCS.splitlines() if line.startswith("| `")]
    listed = re.findall(r"`(\w+)`", " ".join(line for line in lines if ("sweep.html.j2" in line) == several))
    assert set(keys(given)) - set(listed) == set()


def test_faults_of_the_package_are_no_users_mistake() -> None:
    with pytest.raises(html.TemplateNotFound):
        render_page("t", "none.html.j2")
