"""Texts of users and models that are long and of a bad shape: whatever reads them takes about as long as they are.

Nearly all of these take some milliseconds; with a pattern that tries every way to divide a run of characters, or reads
on to the end for every token, they would take minutes to days.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from sacrebleu.metrics.bleu import BLEU

from ftlib.config import hf_fields, loader
from ftlib.core import out_of_memory
from ftlib.core import text as core_text
from ftlib.data import labels, location_tokens, prompts, split_names
from ftlib.data.sources.json_stream import parse_json
from ftlib.metrics import anls, captions, text, vqa_accuracy
from ftlib.metrics.ptb import tokenizer as ptb_tokenizer
from ftlib.tasks.base import official_id
from tests.limits import time_limit

N = 200_000
BOX = "<loc0001><loc0001><loc0005><loc0005>"
ALPACA = "### Response:\n"


def _asked(written: str) -> object:
    return prompts.escape_markers(ALPACA, {"prefix": written})


def _template(template: str) -> object:
    return prompts.escape_markers(template, {"prefix": "x"})


def _filled(template: str) -> object:
    return prompts.render(template, {"a": "x"})


def _vqa(answer: str) -> object:
    return vqa_accuracy.accuracies([answer], [[answer, "yes", "no"]])


def _squad(answer: str) -> object:
    return text.token_f1(answer, answer), text.normalize(answer)


def _caption(caption: str) -> object:
    return captions.measure({1: [caption], 2: ["b"]}, {1: caption, 2: "b"})


def _anls(answer: str) -> object:
    return anls.measure([answer], [["a short answer", answer[::-1][:200], answer]], ["a document"])


def _chooses(value: str) -> object:
    return hf_fields.find_training_errors({"optim": value, value: 1})


def _variables(value: str) -> object:
    return loader._expand(value, (), {}, [])


def _refused(line: str) -> None:
    with pytest.raises(ValueError, match="deep"):
        parse_json(line)


CASES: dict[str, tuple[Callable[[str], object], str]] = {
    "space behind a box": (location_tokens.parse_objects, BOX + " " * N + "<"),
    "space before a box": (location_tokens.parse_objects, " " * N + BOX + "<"),
    "many boxes": (location_tokens.parse_objects, (BOX + " " * 50 + "<;") * (N // 90)),
    "unclosed tokens": (location_tokens.find_errors, "<loc" * (N // 4)),
    "a long token": (location_tokens.find_errors, "<loc" + "9" * N + ">"),
    "a marker's hashes": (_asked, "#" * N),
    "hashes before space": (_asked, "##" + " " * N),
    "hashes in lines": (_asked, "## \n" * (N // 4)),
    "a marker without colon": (_asked, "## Response" + " " * N),
    "hashes, Alpaca": (prompts._escape_alpaca_markers, "#" * N),
    "a template's space": (_template, "## a" + " " * N + "{"),
    "a template's colons": (_template, "## a" + " :" * (N // 2) + "{"),
    "a template's hashes": (_template, "#" * N),
    "a template's fields": (_filled, "{a}" * (N // 3)),
    "a template's braces": (_filled, "{{" * (N // 2)),
    "media markers": (prompts._MEDIA_MARKER.search, "<imag" * (N // 5)),
    "commas, VQA": (_vqa, "1," * (N // 2)),
    "periods, VQA": (_vqa, "." * N),
    "marks, VQA": (_vqa, ';/[]"{} ' * (N // 8)),
    "words, SQuAD": (_squad, " ".join(map(str, range(N // 6)))),
    "articles, SQuAD": (_squad, "a the " * (N // 6)),
    "captions of the same words": (_caption, "a b " * (N // 8)),
    "captions of other words": (_caption, " ".join(map(str, range(N // 12)))),
    "ANLS": (_anls, "ab" * (N // 2)),
    "ANLS of noise": (_anls, "".join(random.Random(0).choices("abc", k=N // 4))),
    "words for splits": (split_names.split_from_name, "test" * (N // 4) + "q"),
    "capitals in names": (split_names.split_from_name, "A" * N + "a"),
    "marks in names": (split_names.split_from_name, "a" + "\u0300\u0316" * (N // 2)),
    "marks in labels": (lambda label: labels.suspicious_labels({label: 1}), "a" + "\u0300\u0316" * (N // 2)),
    "digits in labels": (lambda label: labels.suspicious_labels({label: 1}), "1" * N),
    "digits in ids": (official_id, "1" * N),
    "variables": (_variables, "${a" * (N // 3)),
    "a value of the config": (_chooses, "adamw_" * (N // 6)),
    "a message": (lambda words: out_of_memory.is_out_of_memory(RuntimeError(words)), "CUBLAS_STATUS" * (N // 13)),
    "deep JSON": (_refused, "[" * N),
    "digits in JSON": (parse_json, "1" * N),
}


@pytest.mark.parametrize("name", CASES)
def test_time_grows_with_the_length(name: str) -> None:
    function, written = CASES[name]
    with time_limit():
        function(written)


SHAPES = (
    "a,", "<!a", "<a b", "<a b='", "a. ", "a.", "a'", "a-", "a@", "1/", "1-", "1.", "www.", "http://,", "A&", "a\u00ad",
    "(", ". ", "&a", "&#1", "猫。", "a!", "\\*", "a\\/", "a. <!x", "a;.:", "'", "-",
)  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_captions_are_tokenized_in_time(shape: str) -> None:
    """Both ways: word by word, and character by character."""
    caption = shape * (N // 4 // len(shape))
    with time_limit():
        assert "".join(ptb_tokenizer.split([caption])[0]) or not caption.strip()
        ptb_tokenizer.tokenize([caption, caption])


@pytest.mark.parametrize("tokenizer", text.TOKENIZERS[:5])
@pytest.mark.parametrize("shape", [".", "a.", " ", "1,", "&quot;", "1-", "猫", "<skipped>-\n", "ab "])
def test_bleu_in_time(tokenizer: str, shape: str) -> None:
    with time_limit():
        BLEU(tokenize=tokenizer, effective_order=True).sentence_score(shape * (N // len(shape)), ["a b"])


@pytest.mark.parametrize("space", [" ", "\t\n", "\r\f\v"])
def test_space_around_boxes_and_labels(space: str) -> None:
    """ASCII's space is none of a label's; any other is."""
    (one,) = location_tokens.parse_objects(f"{space}{BOX}{space}a {space} cat{space}").objects
    assert one.label == f"a {space} cat"
    (one,) = location_tokens.parse_objects(f"{BOX}{space}\u00a0{space}").objects
    assert one.label == "\u00a0"
    assert location_tokens.parse_objects(f"\u00a0{BOX}").unreadable == 1


@pytest.mark.parametrize(
    ("line", "marker"),
    [
        ("### Response:", "### response :"),
        ("##\tIn put \t:\t", "#### in put:"),
        ("## a::", "## a::"),
        ("##é", "##\né："),
    ],
)
def test_markers_of_templates(line: str, marker: str) -> None:
    """Those that stand alone in a line, without the colon at its end."""
    assert prompts.escape_markers(f"x\n{line}\n{{a}}", {"a": f"y{marker} z"}) == {"a": f"y\\{marker} z"}
    assert prompts.escape_markers(f"x {line}", {"a": marker}) == {"a": marker}
    assert prompts.escape_markers(f"{line} {{a}}", {"a": marker}) == {"a": marker}


def test_marks_that_a_language_could_write_are_in_order() -> None:
    written = "e\u0316\u0301" * 5000
    assert core_text.normalize("NFC", written) == "\u00e9\u0316" * 5000
    endless = "e\u0301" + "\u0316" * 5000
    assert core_text.normalize("NFC", endless) == endless


def test_ids_are_numbers_where_a_release_could_have_them() -> None:
    assert official_id("000123") == 123
    assert official_id("a1") == "a1" and official_id(7) == 7 and official_id("9" * 5000) == "9" * 5000


def test_captions_longer_than_all_references() -> None:
    """No reference has an n-gram of four words."""
    found = captions.measure({1: ["a cat"], 2: ["a dog"]}, {1: "a cat on a red mat", 2: "a dog"})
    assert found.values()["BLEU-1"] == pytest.approx(0.5)
