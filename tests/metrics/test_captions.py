"""Caption scores against pycocoevalcap, image by image and resampled, and what happens where Java is missing."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.meteor import meteor as official_meteor
from pycocoevalcap.rouge.rouge import Rouge

from ftlib.metrics import meteor_spice
from ftlib.metrics.base import MetricResult
from ftlib.metrics.captions import measure
from ftlib.metrics.ptb.tokenizer import tokenize
from tests.metrics.stanford import PACKAGE, counted, public_example, stanford

KNOWN = {"BLEU-1": 0.5794, "BLEU-2": 0.4044, "BLEU-3": 0.2785, "BLEU-4": 0.1908, "ROUGE-L": 0.3963, "CIDEr-D": 0.5998}
WORDS = "a a a the the man woman dog surfboard wave riding on in of with two 5 1/2 U.S. sign's (red) don't , . and"
EXACT = 1e-9

References = dict[int, list[str]]
Predictions = dict[int, str]
Scores = dict[str, tuple[float, list[float]]]


@pytest.fixture
def no_java(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))


def made(seed: int, images: int) -> tuple[References, Predictions]:
    """Captions of all lengths from none on, over few words, so that they agree often."""
    draw = random.Random(seed)

    def caption() -> str:
        return " ".join(draw.choice(WORDS.split()) for _ in range(draw.choice([0, 1, 2, 3, 5, 8, 8, 8, 12, 30])))

    ids = draw.sample(range(1000), images)
    references = {image: [caption() for _ in range(draw.randint(1, 7))] for image in ids}
    predictions = {image: draw.choice([caption(), draw.choice(references[image])]) for image in reversed(ids)}
    return references, predictions


def official(references: References, predictions: Predictions, read: Any = tokenize, meteor: Any = None) -> Scores:
    """pycocoevalcap's corpus score and scores by image, from given tokens."""
    theirs = iter(read([caption for captions in references.values() for caption in captions]))
    truths = {image: [" ".join(next(theirs)) for _ in captions] for image, captions in references.items()}
    guessed = read([predictions[image] for image in references])
    guesses = {image: [" ".join(tokens)] for image, tokens in zip(references, guessed, strict=True)}
    bleu, by_image = Bleu(4).compute_score(truths, guesses, verbose=0)
    found: Scores = {f"BLEU-{n + 1}": (bleu[n], by_image[n]) for n in range(4)}
    for name, scorer in {"ROUGE-L": Rouge(), "CIDEr-D": Cider(), **({"METEOR": meteor} if meteor else {})}.items():
        found[name] = scorer.compute_score(truths, guesses)
    return found


def require_equal(found: MetricResult, expected: Scores) -> None:
    """The same corpus scores and the same scores of every image."""
    values = found.values()
    by_image = found.sample.values(np.eye(len(found.sample.groups)))
    for name, (corpus, images) in expected.items():
        assert values[name] == pytest.approx(corpus, abs=EXACT), name
        assert by_image[name] == pytest.approx(np.array(images), abs=EXACT), name


@pytest.mark.java
@pytest.mark.long
def test_equal_to_the_official_scores_of_the_public_example(monkeypatch: pytest.MonkeyPatch) -> None:
    example = public_example()
    release = json.loads((example / "references.json").read_text())
    references: References = {image["id"]: [] for image in release["images"]}
    for record in release["annotations"]:
        references[record["image_id"]].append(record["caption"])
    predictions = {one["image_id"]: one["caption"] for one in json.loads((example / "results.json").read_text())}
    expected = official(references, predictions, lambda captions: list(map(counted, stanford(captions))))
    monkeypatch.setenv("PATH", "")
    found = measure(references, predictions)
    require_equal(found, expected)
    assert {name: round(found.values()[name], 4) for name in KNOWN} == KNOWN
    assert found.headline == "CIDEr-D" and found.n == 1000
    assert found.rows == pytest.approx(expected["CIDEr-D"][1], abs=EXACT)


@pytest.mark.java
def test_equal_from_the_captions_on(monkeypatch: pytest.MonkeyPatch) -> None:
    references, predictions = made(99, 40)
    expected = official(references, predictions, lambda captions: list(map(counted, stanford(captions))))
    monkeypatch.setenv("PATH", "")
    require_equal(measure(references, predictions), expected)


@pytest.mark.parametrize("seed", range(25))
def test_equal_to_the_official_scores(seed: int, no_java: None) -> None:
    references, predictions = made(seed, [1, 2, 3, 10, 60][seed % 5])
    require_equal(measure(references, predictions), official(references, predictions))


def test_captions_without_any_word(no_java: None) -> None:
    references, predictions = {1: ["", "."], 2: ["a dog"]}, {1: "", 2: " . "}
    require_equal(measure(references, predictions), official(references, predictions))
    found = measure({1: [""]}, {1: ""}).values()  # the official CIDEr-D fails here; its ROUGE-L finds them equal
    assert found["CIDEr-D"] == found["BLEU-4"] == 0 and found["ROUGE-L"] == 1


def test_one_image_has_no_cider(no_java: None) -> None:
    assert measure({1: ["a dog"]}, {1: "a dog"}).values()["CIDEr-D"] == 0.0


def resampled(references: References, predictions: Predictions, drawn: list[int]) -> tuple[References, Predictions]:
    """A corpus with every image as often as it was drawn."""
    picked = [image for image, times in zip(references, drawn, strict=True) for _ in range(times)]
    return dict(enumerate(references[i] for i in picked)), dict(enumerate(predictions[i] for i in picked))


def test_resampling_computes_corpus_scores_anew(no_java: None) -> None:
    references, predictions = made(5, 12)
    found = measure(references, predictions)
    drawn = [3, 0, 1, 1, 0, 2, 1, 0, 0, 2, 1, 1]
    values = found.sample.values(np.array([drawn], float))
    expected = official(*resampled(references, predictions, drawn))
    for name in ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L"):
        assert values[name][0] == pytest.approx(expected[name][0], abs=EXACT)
    assert found.rows is not None
    assert values["CIDEr-D"][0] == pytest.approx(np.average(found.rows, weights=drawn), abs=EXACT)


@pytest.fixture
def meteor(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """pycocoevalcap's own METEOR. It does not find its paraphrases when a folder's name has a space, and it waits for
    ever to be destroyed after a failure.
    """

    def start(command: list[str], **settings: Any) -> subprocess.Popen[bytes]:
        return subprocess.Popen([*command, "-a", "data/paraphrase-en.gz"], **settings)

    monkeypatch.setattr(official_meteor, "subprocess", SimpleNamespace(Popen=start, PIPE=subprocess.PIPE))
    found = official_meteor.Meteor()
    yield found
    found.meteor_p.kill()
    found.meteor_p.wait()
    found.lock = threading.Lock()  # a failed comparison leaves it locked


@pytest.fixture
def package_beside_a_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where ftlib finds METEOR: Java resolves links, so that the program is a copy."""
    assert PACKAGE is not None
    folder = tmp_path / "a package" / "meteor"
    folder.mkdir(parents=True)
    shutil.copy(PACKAGE / "meteor" / "meteor-1.5.jar", folder)
    (folder / "data").symlink_to(PACKAGE / "meteor" / "data")
    monkeypatch.setattr(meteor_spice, "_package_file", lambda folder, name: tmp_path / "a package" / folder / name)
    return folder


@pytest.mark.java
def test_meteor_equals_the_official_one_and_its_resamples(meteor: Any, package_beside_a_space: Path) -> None:
    files = lambda: {path: path.stat().st_mtime_ns for path in package_beside_a_space.rglob("*")}  # noqa: E731
    before = files()
    references, predictions = made(7, 30)
    predictions |= {image: references[image][0] for image in list(references)[:3]}
    found = measure(references, predictions)
    require_equal(found, {"METEOR": official(references, predictions, meteor=meteor)["METEOR"]})
    drawn = [image % 3 for image in range(30)]
    expected = official(*resampled(references, predictions, drawn), meteor=meteor)["METEOR"][0]
    assert found.sample.values(np.array([drawn], float))["METEOR"][0] == pytest.approx(expected, abs=EXACT)
    assert found.sample.values(np.zeros((1, 30)))["METEOR"][0] == 0
    assert files() == before, "the package may be read-only"


def test_without_java_the_reason_is_told(no_java: None) -> None:
    found = measure({1: ["a dog"]}, {1: "a dog"})
    assert found.notes["METEOR"] == "Java is not installed"
    assert set(found.notes) == {"METEOR", "SPICE"} and not set(found.notes) & set(found.values())


def test_without_the_package_the_reason_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meteor_spice.importlib.util, "find_spec", lambda name: None)
    found = measure({1: ["a dog"]}, {1: "a dog"})
    assert all("pycocoevalcap is not installed" in found.notes[name] for name in ("METEOR", "SPICE"))


@pytest.fixture
def java(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Put another program in Java's place, and a package with all of SPICE's files."""
    for name in (
        "meteor/meteor-1.5.jar",
        "spice/spice-1.0.jar",
        *(f"spice/lib/{jar}" for jar in meteor_spice._CORENLP),
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.setattr(meteor_spice, "_package_file", lambda folder, name: tmp_path / folder / name)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)

    def install(script: str) -> None:
        (tmp_path / "java").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "java").chmod(0o755)

    return install


def test_a_program_that_fails_is_told(java: Callable[[str], None]) -> None:
    java("echo 'Error: out of memory' >&2; exit 1")
    found = measure({1: ["a dog"]}, {1: "a dog"})
    assert found.notes == dict.fromkeys(("METEOR", "SPICE"), "Java failed: Error: out of memory")
    java("exit 0")
    found = measure({1: ["a dog"]}, {1: "a dog"})
    assert found.notes["METEOR"] == "METEOR answered 0 of 1 images"
    assert found.notes["SPICE"] == "SPICE left no scores"
    java("echo one two")
    assert measure({1: ["a dog"]}, {1: "a dog"}).notes["METEOR"] == "METEOR answered 0 of 1 images"


def test_spice_is_the_mean_of_the_images_scores(java: Callable[[str], None]) -> None:
    answer = json.dumps([{"image_id": image, "scores": {"All": {"f": f}}} for image, f in ((1, 0.25), (0, 0.75))])
    java(f"""case "$*" in *spice*) ;; *) exit 1;; esac
for word; do [ "$before" = -out ] && echo '{answer}' > "$word"; before=$word; done""")
    found = measure({"x": ["a dog"], "y": ["a cat"]}, {"y": "a cat", "x": "a dog"})
    assert found.values()["SPICE"] == 0.5 and "SPICE" not in found.notes
    assert list(found.sample.values(np.eye(2))["SPICE"]) == [0.75, 0.25]


def test_spice_is_never_downloaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(meteor_spice, "_package_file", lambda folder, name: tmp_path / name)
    monkeypatch.setattr(
        meteor_spice, "_java", lambda arguments, given: pytest.fail("started") if "Xmx8G" in arguments[0] else ""
    )
    assert "stanford-corenlp-3.6.0.jar is not in" in measure({1: ["a dog"]}, {1: "a dog"}).notes["SPICE"]


def test_captions_without_spaces_are_compared_by_characters_and_say_so() -> None:
    told = {1: ["\u732b\u304c\u30de\u30c3\u30c8\u306e\u4e0a"], 2: ["\u72ac\u304c\u5ead\u3067\u8d70\u308b"]}
    found = measure(told, {1: "\u732b\u304c\u30de\u30c3\u30c8", 2: told[2][0]})
    assert found.rule == "coco-caption/1, by characters" and 0.5 < found.values()["BLEU-1"] < 1
    assert "compared by characters" in found.remarks[0] and "English" in found.notes["METEOR"]


def test_cider_of_one_image_is_explained() -> None:
    found = measure({1: ["a cat on a mat"]}, {1: "a cat on a mat"})
    assert found.values()["CIDEr-D"] == 0 and "single image" in found.remarks[0]
