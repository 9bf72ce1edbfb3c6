"""The documentation: links, the index, messages that are quoted, and versions."""

from __future__ import annotations

import configparser
import re
from pathlib import Path

import pytest
import yaml

from ftlib import __version__
from ftlib.cli.main import COMMANDS
from ftlib.core.metric_table import markdown_table
from tests.conftest import REPOSITORY

PAGES = sorted([*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").glob("*.md")])
MESSAGES = re.findall(r"^Message: `(.+)`$", (REPOSITORY / "docs" / "troubleshooting.md").read_text(), re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_resolve(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"https?:", target):
            continue
        name, _, anchor = target.partition("#")
        linked = (page.parent / name).resolve() if name else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target


def test_the_index_lists_every_page_and_command() -> None:
    index = (REPOSITORY / "docs" / "index.md").read_text()
    listed = set(re.findall(r"\]\(([^)#\s]+)", index))
    assert {page.name for page in (REPOSITORY / "docs").glob("*.md")} - {"index.md"} <= listed
    rows = re.findall(r"^\| (`.+?) \|", index.partition("## Commands")[2], re.MULTILINE)
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row)} == set(COMMANDS)


@pytest.fixture(scope="module")
def printed() -> str:
    """The text of all programs, with literals that continue on the next line put together."""
    programs = [
        *(REPOSITORY / "ftlib").rglob("*.py"),
        *(REPOSITORY / "jobs").glob("*.sh"),
        REPOSITORY / "containers" / "build.sh",
    ]
    text = "\n".join(program.read_text() for program in programs)
    return re.sub(r'"[ \\]*\n\s*f?"|" \\\n\s*"', "", text)


@pytest.mark.parametrize("message", MESSAGES)
def test_messages_of_the_troubleshooting_page_are_those_of_the_code(message: str, printed: str) -> None:
    parts = [part.strip(" :;,.") for part in message.split("…")]
    assert any(len(part) >= 10 for part in parts)
    for part in parts:
        assert part in printed, part


def test_versions_agree() -> None:
    settings = configparser.ConfigParser(interpolation=None)
    settings.read(REPOSITORY / "setup.cfg")
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())
    assert settings["metadata"]["version"] == citation["version"] == __version__
    assert citation["license"] == settings["metadata"]["license"]
    assert f"\n## [{__version__}]" in (REPOSITORY / "CHANGELOG.md").read_text()


def test_files_that_the_architecture_page_names_exist() -> None:
    page = (REPOSITORY / "docs" / "architecture.md").read_text()
    named = set(re.findall(r"[a-z_]+/[a-z_]+\.(?:py|sh)", page))
    assert len(named) > 30
    assert not [name for name in named if not any((REPOSITORY / top / name).is_file() for top in ("ftlib", "."))]


def test_the_table_of_metrics_is_the_programs() -> None:
    assert markdown_table() in (REPOSITORY / "docs" / "evaluation.md").read_text()
