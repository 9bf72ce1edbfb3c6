"""docs/config.md and the JSON Schema: every key with its meaning."""

from __future__ import annotations

from ftlib.config import reference
from tests.conftest import REPOSITORY

SCHEMA = reference.json_schema()


def test_the_page_is_what_the_schema_says() -> None:
    written = (REPOSITORY / "docs" / "config.md").read_text()
    assert written == reference.markdown(), "run `make config-docs`"


def test_every_key_is_on_the_page_with_its_meaning() -> None:
    page = reference.markdown()
    for section in [SCHEMA, *SCHEMA["$defs"].values()]:
        assert section["description"]
        for key in section["properties"]:
            rows = [line for line in page.splitlines() if line.startswith(f"| `{key}` |")]
            assert rows and all(line.split(" | ")[-1].strip(" |") for line in rows if key != "method"), key


def test_a_key_s_meaning_is_the_text_below_it() -> None:
    keep = SCHEMA["$defs"]["Checkpoint"]["properties"]["keep"]
    assert keep["description"] == "How many of the newest checkpoints are kept; the best is kept, too."
    assert "| `minutes` | number > 0 | `15.0` | Minutes between checkpoints. |" in reference.markdown()
    assert "| `valid` | number > 0 | `0.1` |" in reference.markdown()
