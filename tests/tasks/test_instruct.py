"""Generated texts from JSONL."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import sacrebleu

from ftlib.errors import UserError
from ftlib.tasks.instruct import score


def files(folder: Path) -> tuple[Path, Path]:
    asked = [{"id": 1, "references": ["the cat sat on the mat", "a cat"]}, {"id": 2, "suffix": "猫が座った"}]
    answered = [{"id": 2, "prediction": "猫は座った"}, {"id": 1, "prediction": "the cat sat on the red mat"}]
    for name, records in (("references", asked), ("predictions", answered)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)))
    return folder / "references.jsonl", folder / "predictions.jsonl"


@pytest.mark.parametrize("tokenize", ["13a", "char"])
def test_bleu_with_the_chosen_tokenizer(tmp_path: Path, tokenize: str) -> None:
    references, predictions = files(tmp_path)
    measured = score([references], predictions, tokenize=tokenize)
    streams = [["the cat sat on the mat", "猫が座った"], ["a cat", None]]
    theirs = sacrebleu.corpus_bleu(["the cat sat on the red mat", "猫は座った"], streams, tokenize=tokenize)
    assert measured.values()["BLEU"] == pytest.approx(theirs.score)
    assert f"tok:{tokenize}" in measured.rule
    assert measured.rows == pytest.approx([8 / 9, 0])


def test_unknown_tokenizer(tmp_path: Path) -> None:
    references, predictions = files(tmp_path)
    with pytest.raises(UserError, match=r"klingon: no such tokenizer(.|\n)*char"):
        score([references], predictions, tokenize="klingon")


def test_tokenizer_without_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "MeCab", None)
    references, predictions = files(tmp_path)
    with pytest.raises(UserError, match=r"ja-mecab(.|\n)*sacrebleu\[ja\]"):
        score([references], predictions, tokenize="ja-mecab")
