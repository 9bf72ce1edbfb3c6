"""Elements escape whatever text they get."""

from __future__ import annotations

import pytest

from ftlib.reporting import html
from ftlib.reporting.html import group, tag


def test_text_and_attributes_are_escaped_and_elements_are_not() -> None:
    node = tag("p", "<b>&", tag("i", '"x"'), title="\"><script>'")
    assert node.markup == '<p title="&quot;&gt;&lt;script&gt;&#x27;">&lt;b&gt;&amp;<i>&quot;x&quot;</i></p>'


def test_markup_that_became_text_again_is_escaped() -> None:
    assert "<b>" not in tag("p", group(tag("b", "x")).markup).markup


def test_attribute_names() -> None:
    assert tag("img", class_="a", aria_label="b", tabindex=0).markup == '<img class="a" aria-label="b" tabindex="0">'


def test_half_a_surrogate_pair_can_be_written() -> None:
    assert tag("p", "a\ud800b").markup.encode("utf-8") == b"<p>a?b</p>"


@pytest.mark.parametrize("css", ["a{}</style><script>", "@import 'x';", "a { background: url(x.png) }"])
def test_style_sheet_cannot_close_its_element_or_load_anything(css: str) -> None:
    with pytest.raises(ValueError, match="style sheet"):
        html.style(css)


def test_table_aligns_by_column_and_names_rows() -> None:
    table = html.table("pets", "lr", ["pet", "legs"], [["cat", "4"]]).markup
    assert '<th scope="row" class="l">cat</th><td class="r">4</td>' in table
    assert 'class="scroll"' in table
