"""PaliGemma's inputs with Gemma's real tokenizer are the ids of its authors' code.

The rule is that of big_vision (models/proj/paligemma, pp/ops_text.py): bos + prefix, a newline that is tokenized by
itself, suffix + eos. The ids of a text are computed here by SentencePiece's own BPE, from the pieces and their order
alone; ids that the authors' documentation names are literal.
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
from PIL import Image

from ftlib.models.big_vision import Layout, load_tokenizer, make_processor
from ftlib.models.paligemma import PaliGemmaInputProcessor
from tests.real.downloads import gemma_tokenizer

pytestmark = pytest.mark.real
BOS, EOS, NEWLINE, FIRST_LOC, FIRST_SEG, IMAGE_ID = 2, 1, 108, 256_000, 257_024, 257_152
SPACE = "\u2581"


class Bpe:
    """SentencePiece's BPE: neighbours are joined in the order of the merges, unknown characters become bytes."""

    def __init__(self, path: Path) -> None:
        model = json.loads(path.read_text(encoding="utf-8"))["model"]
        self.ids: dict[str, int] = model["vocab"]
        pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"])
        self.ranks = {(left, right): rank for rank, (left, right) in enumerate(pairs)}

    def encode(self, text: str) -> list[int]:
        """Gemma adds no blank in front (add_dummy_prefix is off) and removes none."""
        pieces = list(text.replace(" ", SPACE))
        while True:
            known = [(self.ranks[pair], at) for at, pair in enumerate(pairwise(pieces)) if pair in self.ranks]
            if not known:
                break
            at = min(known)[1]
            pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
        return [number for piece in pieces for number in self._ids(piece)]

    def _ids(self, piece: str) -> list[int]:
        if piece in self.ids:
            return [self.ids[piece]]
        return [self.ids[f"<0x{byte:02X}>"] for byte in piece.encode()]


@pytest.fixture(scope="module")
def bpe() -> Bpe:
    return Bpe(gemma_tokenizer())


@pytest.fixture(scope="module")
def inputs() -> PaliGemmaInputProcessor:
    path = gemma_tokenizer()
    layout = Layout([], {"V": 257_152, "P": 14, "S": 256}, gemma2=False)
    return PaliGemmaInputProcessor(make_processor(load_tokenizer(path), layout, path), None)


PROMPTS = [
    "caption en",
    "answer en Where is the cow standing?",
    "answer de Wie viele Äpfel liegen auf dem Tisch?",
    "answer fr Où est le garçon ?",
    "answer ja 猫は何匹いますか",
    "answer zh 图片里有什么？",
    "answer ar ما هذا؟",
    "answer hi यह क्या है?",
    "answer th นี่คืออะไร",
    "  two leading blanks and  two inside",
    "12,345 items 🦙 \U0001fae8",
    "detect cat ; dog",
    "",
]


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("answer", ["yes", " a leading blank", "Zwei Äpfel", "猫", "two\nlines"])
def test_prompt_and_answer(bpe: Bpe, inputs: PaliGemmaInputProcessor, prompt: str, answer: str) -> None:
    row = inputs.encode_train(prompt, Image.new("RGB", (8, 8)), answer)
    expected = [*bpe.encode(prompt), NEWLINE], [*bpe.encode(answer), EOS]
    assert row.input_ids == [*[IMAGE_ID] * 256, BOS, *expected[0], *expected[1]]
    assert row.n_labels == len(expected[1])


def test_locations_and_segments(bpe: Bpe, inputs: PaliGemmaInputProcessor) -> None:
    answer = "<loc0000><loc0123><loc1023><loc0512> cat ; <seg000><seg127> dog"
    expected = [FIRST_LOC, FIRST_LOC + 123, FIRST_LOC + 1023, FIRST_LOC + 512, *bpe.encode(" cat ; ")]
    expected += [FIRST_SEG, FIRST_SEG + 127, *bpe.encode(" dog"), EOS]
    assert inputs.encode_answer(answer) == expected
    assert inputs.decode(expected) == answer
    (row,) = inputs.encode_prompts(["segment <loc0001>"], Image.new("RGB", (8, 8)))
    assert row.input_ids[256:] == [BOS, *bpe.encode("segment "), FIRST_LOC + 1, NEWLINE]


def test_special_tokens_in_a_text_stay_text(bpe: Bpe, inputs: PaliGemmaInputProcessor) -> None:
    ids = inputs.encode_answer("a<eos>b<image>")
    assert IMAGE_ID not in ids and ids.count(EOS) == 1 and ids[-1] == EOS


def test_ids_that_are_known(bpe: Bpe, inputs: PaliGemmaInputProcessor) -> None:
    words = inputs.tokenizer.get_vocab()
    assert (words["<bos>"], words["<eos>"], words["<pad>"], words["\n"]) == (BOS, EOS, 0, NEWLINE)
    assert len(inputs.tokenizer) == IMAGE_ID + 1
