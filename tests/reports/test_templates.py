"""`ftlib report --templates`: some templates can be replaced, and none can run code."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from ftlib.reports.html import TEMPLATES
from ftlib.runs.run import Run
from tests.conftest import REPOSITORY

Ftlib = Callable[..., tuple[int, str, str]]
NAMES = sorted(path.name for path in TEMPLATES.iterdir())
DOCS = (REPOSITORY / "docs" / "reports.md").read_text()


def test_the_docs_name_every_template() -> None:
    named = re.findall(r"^\| `([\w.]+)` \|", DOCS.partition("## Templates")[2], re.MULTILINE)
    assert sorted([*named, "page.html.j2"]) == NAMES


@pytest.fixture
def folder(tmp_path: Path, finished: Run) -> Path:
    """For templates; the run pets is there to be reported."""
    (tmp_path / "templates").mkdir()
    return tmp_path / "templates"


def test_the_example_of_the_docs(folder: Path, finished: Run, ftlib: Ftlib) -> None:
    example = re.findall(r"```jinja\n(.*?)```", DOCS, re.DOTALL)
    name = re.findall(r"my-templates/([\w.]+)", example[0])[0]
    (folder / name).write_text(example[0])
    code, _, error = ftlib("report", "pets", "--templates", folder)
    assert code == 0, error
    page = finished.report.read_text()
    assert re.findall(r"<h2>(.*?)</h2>", page) == ["Scores", "Training"] and "ml-group@example.org" in page
    assert "valid accuracy 0.500 → 0.750" in page


def test_single_templates_are_replaced(
    folder: Path, finished: Run, ftlib: Ftlib, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others stay, and use those that were replaced."""
    assert ftlib("report", "pets")[0] == 0
    before = finished.report.read_text()
    macros = (TEMPLATES / "macros.html.j2").read_text()
    (folder / "macros.html.j2").write_text(macros.replace('class="note"', 'class="note mine"'))
    (folder / "report.css").write_text(".mine { color: teal; }")
    (folder / ".git").mkdir()
    monkeypatch.chdir(folder.parent)
    assert ftlib("report", "pets", "--templates", "templates")[0] == 0
    after = finished.report.read_text()
    assert "<style>.mine { color: teal; }</style>" in after and 'class="note"' not in after.replace(
        '<p class="note">From', ""
    )
    body = after.partition("</style>")[2].replace('class="note mine"', 'class="note"')
    made = r"Made .*? by"
    assert re.sub(made, "", body) == re.sub(made, "", before.partition("</style>")[2])


def test_the_policy_cannot_be_replaced(folder: Path, finished: Run, ftlib: Ftlib) -> None:
    (folder / "run.html.j2").write_text("<script>alert(1)</script>{{ name }}")
    assert ftlib("report", "pets", "--templates", folder)[0] == 0
    page = finished.report.read_text()
    assert page.index("Content-Security-Policy") < page.index("<style") < page.index("<script>")
    assert "default-src 'none'" in page
    (folder / "page.html.j2").write_text("{% include body %}")
    code, _, error = ftlib("report", "pets", "--templates", folder)
    assert code == 2 and f"{folder}/page.html.j2: there is no template with this name to replace" in error


@pytest.mark.parametrize("name", ["run.html", "Run.html.j2", "README.md", "old"])
def test_other_names_are_refused(folder: Path, ftlib: Ftlib, name: str) -> None:
    (folder / name).write_text("x")
    code, _, error = ftlib("report", "pets", "--templates", folder)
    assert code == 2 and f"{folder / name}: " in error
    assert f"Use one of: {', '.join(each for each in NAMES if each != 'page.html.j2')}" in " ".join(error.split())


@pytest.mark.parametrize(("name", "fault"), [("none", "no such folder"), (".", "contains no template")])
def test_a_folder_without_templates(folder: Path, ftlib: Ftlib, name: str, fault: str) -> None:
    (folder / ".git").mkdir()
    code, _, error = ftlib("report", "pets", "--templates", folder / name)
    assert code == 2 and f"{folder / name}: {fault}" in error


FAULTS = {
    "{% if %}": "Expected an expression, got 'end of statement block'",
    "{{ nme }}": "'nme' is undefined",
    "{{ scores.nme }}": "has no attribute 'nme'",
    "{% include 'footer.html.j2' %}": "there is no template footer.html.j2",
    "{{ ''.__class__.__mro__ }}": "access to attribute '__class__' of 'str' object is unsafe",
    "{{ ''|attr('__class__') }}": "access to attribute '__class__' of 'str' object is unsafe",
    "{{ '{0.__class__}'.format(name) }}": "access to attribute '__class__' of 'str' object is unsafe",
    "{{ cycler.__init__.__globals__.os.popen('id') }}": "is unsafe",
    "{% for i in range(999999999) %}{% endfor %}": "Range too big",
    "{% set _ = scores.rows.clear() %}": "access to attribute 'clear' of 'list' object is unsafe",
    "{{ 1 + name }}": "unsupported operand",
    "{{ 1 / 0 }}": "division by zero",
    "{% include 'run.html.j2' %}": "recursion",
    "{% import 'macros.html.j2' as m %}{{ m.nothing() }}": "has no attribute 'nothing'",
    "{% import 'macros.html.j2' as m %}{{ m.table(5) }}": "has no attribute 'headers'",
}


@pytest.mark.parametrize("text", FAULTS)
def test_faults_are_the_users_mistake(folder: Path, finished: Run, ftlib: Ftlib, text: str) -> None:
    (folder / "run.html.j2").write_text(f"<main>\n{text}\n</main>")
    code, out, error = ftlib("report", "pets", "--templates", folder)
    assert (code, out) == (2, "") and "Traceback" not in error
    said = " ".join(error.split())
    assert f"{folder}/run.html.j2:2: " in said and FAULTS[text] in said
    assert not finished.report.exists()


def test_a_macro_that_is_missing_is_told_where_it_is_used(folder: Path, ftlib: Ftlib) -> None:
    (folder / "macros.html.j2").write_text("")
    code, _, error = ftlib("report", "pets", "--templates", folder)
    assert code == 2 and f"{TEMPLATES}/run.html.j2:7: " in error and "'note'" in error


def test_a_template_that_is_no_text(folder: Path, ftlib: Ftlib) -> None:
    (folder / "run.html.j2").write_bytes(b"\xff\xfe")
    code, _, error = ftlib("report", "pets", "--templates", folder)
    assert code == 2 and f"{folder}/run.html.j2: not UTF-8" in error
    (folder / "run.html.j2").unlink()
    (folder / "run.html.j2").mkdir()
    code, _, error = ftlib("report", "pets", "--templates", folder)
    assert code == 2 and f"{folder}/run.html.j2: " in error and "Is a directory" in error


def test_no_link_is_followed(folder: Path, finished: Run, ftlib: Ftlib) -> None:
    """It could lead to a file that its author may not read, but who makes the report may."""
    secret = folder.parent / "secret"
    secret.write_text("planted")
    (folder / "report.css").symlink_to(secret)
    code, _, error = ftlib("report", "pets", "--templates", folder)
    assert code == 2 and f"{folder}/report.css: is a symbolic link" in error and not finished.report.exists()
    (folder / "report.css").rename(folder / ".hidden")
    (folder / "run.html.j2").write_text("{% include '.hidden' %}")
    code, _, error = ftlib("report", "pets", "--templates", folder)
    assert code == 2 and "run.html.j2:1: there is no template .hidden" in error


def test_no_template_is_taken_from_a_run(finished: Run, ftlib: Ftlib, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in (finished.folder, finished.folder.parent):
        for name in NAMES:
            for path in (place / name, place / "templates" / name):
                path.parent.mkdir(exist_ok=True)
                path.write_text("planted")
    monkeypatch.chdir(finished.folder)
    assert ftlib("report", "pets")[0] == 0
    assert "planted" not in finished.report.read_text()
