"""Exact match and token F1 against a literal reading of SQuAD's rules; BLEU against sacrebleu."""

from __future__ import annotations

import random
from itertools import zip_longest

import numpy as np
import pytest
import sacrebleu

from ftlib.metrics.scripts import choose_tokenizer
from ftlib.metrics.text import measure, normalize, strict, token_f1
from ftlib.metrics.uncertainty import confidence_intervals

WORDS = ["the", "a", "Cat", "cat,", "sat", "on", "An", "mat.", "(dog)", "theatre", "don't", "3.5", "–", "猫"]


def random_rows(seed: int, most: int = 3) -> tuple[list[str], list[list[str]]]:
    draw = random.Random(seed)

    def text() -> str:
        return " ".join(draw.choice(WORDS) for _ in range(draw.randrange(12)))

    references = [[text() for _ in range(draw.randint(1, most))] for _ in range(30)]
    predictions = [draw.choice([text(), one[0], one[-1] + " cat", one[0][3:]]) for one in references]
    return predictions, references


def literal_words(text: str) -> list[str]:
    kept = "".join(c for c in text.lower() if c not in "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~")
    return [word for word in kept.split() if word not in ("a", "an", "the")]


def literal_f1(prediction: str, reference: str) -> float:
    found, wanted = literal_words(prediction), literal_words(reference)
    if not found or not wanted:
        return 1.0 if found == wanted else 0.0
    left = list(wanted)
    shared = 0
    for word in found:
        if word in left:
            left.remove(word)
            shared += 1
    if not shared:
        return 0.0
    precision, recall = shared / len(found), shared / len(wanted)
    return 2 * precision * recall / (precision + recall)


def corpus_bleu(predictions: list[str], references: list[list[str]], tokenize: str) -> float:
    streams = [list(stream) for stream in zip_longest(*references)]
    return float(sacrebleu.corpus_bleu(predictions, streams, tokenize=tokenize).score)


@pytest.mark.parametrize("seed", range(10))
def test_exact_match_and_f1_follow_the_rules(seed: int) -> None:
    predictions, references = random_rows(seed)
    measured = measure(predictions, references)
    f1s = [max(literal_f1(p, one) for one in accepted) for p, accepted in zip(predictions, references, strict=True)]
    exact = [
        literal_words(p) in map(literal_words, accepted) for p, accepted in zip(predictions, references, strict=True)
    ]
    assert measured.rows == pytest.approx(f1s)
    assert measured.values()["token F1"] == pytest.approx(100 * np.mean(f1s))
    assert measured.values()["exact match"] == pytest.approx(100 * np.mean(exact))


def test_normal_form() -> None:
    assert normalize(" The  cat, a\tdog & an\nowl. ") == "cat dog owl"
    assert normalize("theatre-a the.") == "theatrea"
    assert normalize("a猫") == "a猫"
    assert normalize("cat–the–dog") == "cat– –dog"
    assert (token_f1("the", "a"), token_f1("the", "cat"), token_f1("", "cat")) == (1, 0, 0)
    assert token_f1("cat cat dog", "cat owl") == pytest.approx(0.4)


@pytest.mark.parametrize("tokenize", ["13a", "char", "intl", "none", "zh"])
@pytest.mark.parametrize("seed", range(6))
def test_bleu_equals_sacrebleu(seed: int, tokenize: str) -> None:
    predictions, references = random_rows(seed, most=1 + seed % 3)
    measured = measure(predictions, references, tokenize=tokenize)
    assert measured.values()["BLEU"] == pytest.approx(corpus_bleu(predictions, references, tokenize), abs=1e-9)


@pytest.mark.parametrize(
    ("predictions", "references"),
    [
        (["cat"], [["cat"]]),
        (["cat sat"], [["cat lay on it"]]),
        (["x y z u v"], [["x q z r v"]]),
        (["cat sat mat dog"], [["cat mat sat dog"]]),
        (["x"], [["y"]]),
        ([""], [["cat"]]),
        (["", "the cat sat on the mat"], [["a"], ["the cat sat on the mat", "a mat"]]),
        (["the cat sat on a mat"], [["the cat sat on a very large mat of mine"]]),
    ],
)
def test_bleu_of_small_corpora_equals_sacrebleu(predictions: list[str], references: list[list[str]]) -> None:
    ours = measure(predictions, references).values()["BLEU"]
    assert ours == pytest.approx(corpus_bleu(predictions, references, "13a"), abs=1e-9)


def test_a_weight_is_a_number_of_copies() -> None:
    predictions, references = random_rows(1)
    measured = measure(predictions, references, groups=[n // 3 for n in range(30)])
    weights = np.random.default_rng(0).integers(0, 4, size=10)
    copies = [n for n in range(30) for _ in range(weights[n // 3])]
    copied = corpus_bleu([predictions[n] for n in copies], [references[n] for n in copies], "13a")
    values = measured.sample.values(weights[None].astype(float))
    assert values["BLEU"][0] == pytest.approx(copied, abs=1e-9)
    found = confidence_intervals(measured)["BLEU"]
    assert found and found[0] < measured.values()["BLEU"] < found[1]


@pytest.mark.parametrize(("counts", "said"), [([1, 1], "nrefs:1|"), ([2, 2], "nrefs:2|"), ([1, 3, 2], "nrefs:var|")])
def test_signature_is_sacrebleus(counts: list[int], said: str) -> None:
    references = [[f"word {n}" for n in range(count)] for count in counts]
    bleu = sacrebleu.BLEU(tokenize="char")
    bleu.corpus_score(["word"] * len(counts), [list(stream) for stream in zip_longest(*references)])
    measured = measure(["word"] * len(counts), references, tokenize="char")
    assert measured.tables["BLEU"]["signature"] == str(bleu.get_signature())
    assert said in measured.rule and "tok:char" in measured.rule


@pytest.mark.parametrize(
    ("answer", "reference"), [("-3", "3"), ("1.5", "15"), ("1/2", "12"), ("", "A"), ("the", "A"), ("cat!", "cat")]
)
def test_the_strict_match_keeps_what_squad_drops(answer: str, reference: str) -> None:
    found = measure([answer], [[reference]]).values()
    assert (found["exact match"], found["strict match"]) == (100, 0)


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        ("a.", "A"),
        ("\u22123", "-3"),
        ("1,000", "1000"),
        ("1.50", "1.5"),
        (" Two  cats ", "two cats"),
        ("+3.", "3"),
        ("", ""),
    ],
)
def test_the_strict_match_takes_other_spellings_of_the_same_answer(answer: str, reference: str) -> None:
    assert measure([answer], [[reference]]).values()["strict match"] == 100
    assert not isinstance(strict("1,00"), type(strict("1"))) and strict("1.2.3") == "1.2.3"


JAPANESE = [
    "\u732b\u304c\u30de\u30c3\u30c8\u306e\u4e0a\u306b\u3044\u307e\u3059\u3002",
    "\u72ac\u306f\u5ead\u3067\u8d70\u3063\u3066\u3044\u308b",
]


def test_texts_without_spaces_are_compared_by_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    answers = [JAPANESE[0].replace("\u3002", "\uff01"), JAPANESE[1].replace("\u5ead", "\u9053")]
    found = measure(answers, [[one] for one in JAPANESE])
    values = found.values()
    assert values["exact match"] == 50 and 90 < values["token F1"] < 100 and values["BLEU"] > 50
    assert "by characters" in found.rule and "tok:char" in found.rule
    assert "compare characters" in found.remarks[0]
    spaced = measure(answers, [[one] for one in JAPANESE], tokenize="13a")
    assert "13a separates words at spaces" in spaced.remarks[1] and spaced.values()["BLEU"] == 0


def test_full_width_forms_are_the_same_characters() -> None:
    found = measure(["\uff21\uff11\u756a"], [["A1\u756a\u30db\u30fc\u30e0"]])
    assert found.values()["token F1"] == pytest.approx(100 * 2 * 3 / 9)


def test_mecab_reads_japanese_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert choose_tokenizer(JAPANESE) == "ja-mecab"
    assert choose_tokenizer(["\u732b\u5728\u57ab\u5b50\u4e0a"]) == "char"
    assert choose_tokenizer(["a cat", "\u732b"]) == "13a"


def test_a_bleu_of_zero_is_explained() -> None:
    assert any("no four tokens" in remark for remark in measure(["red", "two"], [["red"], ["two"]]).remarks)
