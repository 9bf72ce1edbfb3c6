"""Texts in scripts that do not separate words by spaces: Japanese, Chinese, Thai, Lao, Burmese, Khmer."""

from __future__ import annotations

import importlib.util
import re
import unicodedata
from collections.abc import Iterable

_UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\uff66-\uff9f]")
_KANA = re.compile("[\u3040-\u30ff\uff66-\uff9f]")


def is_unspaced(texts: Iterable[str]) -> bool:
    """Whether more than half of the characters are of such a script."""
    written = "".join(texts)
    return 2 * len(_UNSPACED.findall(written)) > len(written)


def choose_tokenizer(texts: Iterable[str]) -> str:
    """sacrebleu's tokenizer for texts: "13a", or "char", or for Japanese "ja-mecab" where it is installed."""
    texts = list(texts)
    if not is_unspaced(texts):
        return "13a"
    japanese = _KANA.search("".join(texts)) is not None
    installed = all(importlib.util.find_spec(name) for name in ("MeCab", "ipadic"))
    return "ja-mecab" if japanese and installed else "char"


def plain_characters(text: str) -> list[str]:
    """The characters of a text for comparison: lower case, full-width forms as half-width ones, no punctuation."""
    folded = unicodedata.normalize("NFKC", text).lower()
    return [letter for letter in folded if not letter.isspace() and unicodedata.category(letter)[0] not in "PC"]
