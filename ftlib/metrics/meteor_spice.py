"""METEOR 1.5 and SPICE, run with the Java programs of pycocoevalcap (the extra `captions`).

Their input is tokens, and nothing is written into the package's folder, which may be read-only. METEOR prints
statistics of every image; its score is a function of their sums and is computed here, also for resampled images. SPICE
needs Stanford CoreNLP 3.6.0 in its folder, which is never downloaded here.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ftlib.metrics.base import Array, GroupedSums, divide

Sentences = Sequence[Sequence[str]]

_CORENLP = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")
_STATISTICS = 23
_ALPHA, _BETA, _GAMMA, _DELTA = 0.85, 0.2, 0.6, 0.75
_STAGES = np.array([1.0, 0.6, 0.8, 0.6])
"""METEOR's weights for equal words, equal stems, synonyms and paraphrases, for English."""


class MetricUnavailable(Exception):
    """Why a metric cannot be computed here."""


def find_missing(metric: str) -> str | None:
    """Why METEOR or SPICE cannot run here; None if it can, or for other metrics."""
    find = {"METEOR": _meteor_jar, "SPICE": _spice_jar}.get(metric)
    try:
        if find is not None:
            find()
            _java_program()
    except MetricUnavailable as reason:
        return str(reason)
    return None


def add_meteor(sums: GroupedSums, predictions: Sentences, references: Sequence[Sentences]) -> None:
    """Add METEOR.

    Args:
        sums: has a row for each image, shape (G,).
        predictions: tokens by image, shape (G,).
        references: the tokens of every reference, by image, shape (G,).

    Raises:
        MetricUnavailable: no Java, no pycocoevalcap, or the program failed.
    """
    jar = _meteor_jar()
    asked = "".join(
        " ||| ".join(["SCORE", *map(_plain, captions), _plain(prediction)]) + "\n"
        for prediction, captions in zip(predictions, references, strict=True)
    )
    paraphrases = jar.parent / "data" / "paraphrase-en.gz"  # which the program itself does not find beside a space
    printed = _java(
        ["-Xmx2G", "-jar", str(jar), "-", "-", "-stdio", "-l", "en", "-norm", "-a", str(paraphrases)], asked
    )
    answers = [line.split() for line in printed.splitlines()]
    answered = [answer for answer in answers if len(answer) == _STATISTICS]
    if len(answered) != len(predictions):
        raise MetricUnavailable(f"METEOR answered {len(answered)} of {len(predictions)} images")
    _add_meteor_statistics(sums, np.array(answered, dtype=np.float64))


def _plain(tokens: Sequence[str]) -> str:
    """A sentence without METEOR's separator of sentences."""
    return " ".join(tokens).replace("|||", "").replace("  ", " ")


def _add_meteor_statistics(sums: GroupedSums, statistics: Array) -> None:
    """Add METEOR's statistics, and its score as a function of their sums.

    Per image: words of prediction and reference, function words of both, then by stage the matched content words of
    both and matched function words of both, then chunks and matched words of both.
    """
    whole = (_matched(statistics) == statistics[:, :2]).all(axis=1) & (statistics[:, 20] == 1)
    statistics[whole, 20] = 0
    columns = [sums.add_column(column) for column in statistics.T]
    sums.add_derived(lambda sums: {"METEOR": _meteor(sums[:, columns])})


def _matched(sums: Array) -> Array:
    """Matched words of prediction and reference, shape (R, 2)."""
    found: Array = sums[:, 4:20].reshape(-1, 8, 2).sum(axis=1)
    return found


def _meteor(sums: Array) -> Array:
    function_words = sums[:, 2:4]
    lengths = _DELTA * (sums[:, :2] - function_words) + (1 - _DELTA) * function_words
    by_stage = sums[:, 4:20].reshape(-1, 4, 2, 2)  # stage, content or function, prediction or reference
    weights = _STAGES[:, None] * np.array([_DELTA, 1 - _DELTA])
    precision, recall = divide(np.einsum("rsfp,sf->rp", by_stage, weights), lengths).T
    mean = divide(precision * recall, (1 - _ALPHA) * recall + _ALPHA * precision)
    fragmented = divide(sums[:, 20], sums[:, 21:].sum(axis=1) / 2)
    whole = (_matched(sums) == sums[:, :2]).all(axis=1) & (sums[:, 20] == 1)
    penalty = _GAMMA * np.where(whole, 0, fragmented) ** _BETA
    return np.nan_to_num(np.maximum(mean * (1 - penalty), 0))


def add_spice(sums: GroupedSums, predictions: Sentences, references: Sequence[Sentences]) -> None:
    """Add SPICE, the mean of the images' F-scores; arguments as for `add_meteor`.

    Raises:
        MetricUnavailable: no Java, no pycocoevalcap, no CoreNLP, or the program failed.
    """
    jar = _spice_jar()
    images = [
        {"image_id": image, "test": " ".join(predictions[image]), "refs": [" ".join(one) for one in references[image]]}
        for image in range(len(predictions))
    ]
    with tempfile.TemporaryDirectory() as folder:
        asked, answered = Path(folder, "captions.json"), Path(folder, "scores.json")
        asked.write_text(json.dumps(images), encoding="utf-8")
        _java(["-Xmx8G", "-jar", str(jar), str(asked), "-out", str(answered), "-subset", "-silent"], "")
        if not answered.is_file():
            raise MetricUnavailable("SPICE left no scores")
        scores = {one["image_id"]: one["scores"]["All"]["f"] for one in json.loads(answered.read_text("utf-8"))}
    sums.add_ratio("SPICE", [float(scores[image]) for image in range(len(predictions))])


def _meteor_jar() -> Path:
    return _package_file("meteor", "meteor-1.5.jar")


def _spice_jar() -> Path:
    jar = _package_file("spice", "spice-1.0.jar")
    for name in _CORENLP:
        if not (jar.parent / "lib" / name).is_file():
            raise MetricUnavailable(f"{name} is not in {jar.parent / 'lib'}")
    return jar


def _package_file(folder: str, name: str) -> Path:
    found = importlib.util.find_spec("pycocoevalcap")
    if found is None or not found.submodule_search_locations:
        raise MetricUnavailable("pycocoevalcap is not installed (pip install 'ftlib[captions]')")
    path = Path(found.submodule_search_locations[0], folder, name)
    if not path.is_file():
        raise MetricUnavailable(f"pycocoevalcap lacks {folder}/{name}")
    return path


def _java(arguments: list[str], given: str) -> str:
    """The output of a Java program for a text on its standard input.

    Raises:
        MetricUnavailable: no Java, or the program failed.
    """
    command = [_java_program(), "-Dfile.encoding=UTF-8", *arguments]
    done = subprocess.run(command, input=given, capture_output=True, encoding="utf-8", errors="replace", check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise MetricUnavailable(f"Java failed: {said[0]}")
    return done.stdout


def _java_program() -> str:
    program = shutil.which("java")
    if program is None:
        raise MetricUnavailable("Java is not installed")
    return program
