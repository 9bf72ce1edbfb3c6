"""Prompt templates."""

import pytest

from ftlib.data.prompts import render
from ftlib.errors import UserError


def test_fields_are_filled_and_their_braces_left_alone() -> None:
    assert render("answer en {question} {{x}}", {"question": "what is {this}?"}) == "answer en what is {this}? {x}"


@pytest.mark.parametrize("template", ["{", "{a.b}", "{a!r}", "{a:>5}", "{0}", "{}"])
def test_only_plain_names_in_braces(template: str) -> None:
    with pytest.raises(UserError):
        render(template, {"a": "x", "0": "x"})


def test_unknown_fields_are_named() -> None:
    with pytest.raises(UserError, match="names question, but the rows have only: prefix"):
        render("{question}", {"prefix": "x"})
