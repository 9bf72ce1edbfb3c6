"""Caption scores as the COCO caption evaluation computes them: BLEU-1 to 4, ROUGE-L, CIDEr-D, METEOR, SPICE.

BLEU, ROUGE-L and CIDEr-D need no Java; METEOR and SPICE are Java programs and run where these are installed.
Everything is counted once per image, so that resampling images computes corpus scores anew; CIDEr-D's document
frequencies stay those of all evaluated images.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from ftlib.metrics.base import Array, GroupedSums, MetricResult
from ftlib.metrics.meteor_spice import MetricUnavailable, add_meteor, add_spice
from ftlib.metrics.ptb.tokenizer import tokenize
from ftlib.metrics.scripts import is_unspaced, plain_characters

Image = TypeVar("Image", bound=Hashable)
RULE = "coco-caption/1"
HEADLINE = "CIDEr-D"
LONGEST = 4
"""Maximum length of n-grams in words."""

BY_CHARACTERS = (
    "These captions have no spaces between words and are compared by characters: not comparable with published scores, "
    "which use word tokenizers."
)
MAX_CIDER = 10.0
_BETA = 1.2
_ABOVE_ZERO = 1e-15
_BELOW_LINE = 1e-9
"""The official BLEU adds these to numerators and denominators."""


@dataclass(frozen=True)
class TokenizedCaptions:
    """The tokens of the evaluated images.

    Attributes:
        predictions: by image, shape (G,).
        references: by caption, shape (S,), grouped by image in the images' order.
        images: the image of every reference, shape (S,), as index into `predictions`.
    """

    predictions: list[list[str]]
    references: list[list[str]]
    images: Integers


def measure(references: Mapping[Image, Sequence[str]], predictions: Mapping[Image, str]) -> MetricResult:
    """Score one caption for each image.

    Args:
        references: image id → its captions, at least one.
        predictions: the same image ids → the generated caption.

    Returns:
        `BLEU-1` … `BLEU-4`, `ROUGE-L`, `CIDEr-D` and, where they can run, `METEOR` and `SPICE`, in 0…1 (CIDEr-D:
        0…10). Rows are the images' CIDEr-D, in the references' order. Sources: Papineni et al. 2002 (BLEU), Lin 2004
        (ROUGE-L), Vedantam et al. 2015 (CIDEr-D), Denkowski and Lavie 2014 (METEOR 1.5), Anderson et al. 2016
        (SPICE), all in the form of Chen et al. 2015, "Microsoft COCO Captions".
    """
    by_characters = is_unspaced(caption for captions in references.values() for caption in captions)
    tokens = tokenize_captions(references, predictions, plain_tokens if by_characters else tokenize)
    sums = GroupedSums(list(references))
    rows = add_caption_scores(sums, tokens)
    if by_characters:
        notes = dict.fromkeys(("METEOR", "SPICE"), "is for English captions only")
        rule = f"{RULE}, by characters"
        remarks = [BY_CHARACTERS, *_one_image(rows)]
        return MetricResult(rule, HEADLINE, "fraction", sums, len(predictions), rows, notes=notes, remarks=remarks)
    notes = {}
    programs: dict[str, Callable[[GroupedSums, list[list[str]], list[list[list[str]]]], None]]
    programs = {"METEOR": add_meteor, "SPICE": add_spice}
    by_image = [[tokens.references[index] for index in indices] for indices in _reference_ranges(tokens)]
    for name, run in programs.items():
        try:
            run(sums, tokens.predictions, by_image)
        except MetricUnavailable as reason:
            notes[name] = str(reason)
    return MetricResult(
        RULE, HEADLINE, "fraction", sums, n=len(predictions), rows=rows, notes=notes, remarks=_one_image(rows)
    )


def _one_image(rows: Sequence[float]) -> list[str]:
    if len(rows) > 1:
        return []
    return ["CIDEr-D of a single image is always 0: it weighs n-grams by how few of the evaluated images have them."]


def plain_tokens(captions: Sequence[str]) -> list[list[str]]:
    """The characters of captions in scripts without spaces, see `scripts.plain_characters`."""
    return [plain_characters(caption) for caption in captions]


def tokenize_captions(
    references: Mapping[Image, Sequence[str]],
    predictions: Mapping[Image, str],
    tokenize: Callable[[Sequence[str]], list[list[str]]] = tokenize,
) -> TokenizedCaptions:
    """Tokenize the captions of two files, images in the references' order, as the official evaluation does."""
    counts = [len(captions) for captions in references.values()]
    return TokenizedCaptions(
        predictions=tokenize([predictions[image] for image in references]),
        references=tokenize([caption for captions in references.values() for caption in captions]),
        images=np.repeat(np.arange(len(counts)), counts),
    )


def add_caption_scores(sums: GroupedSums, tokens: TokenizedCaptions) -> list[float]:
    """Add the metrics that need no Java: BLEU, ROUGE-L and CIDEr-D.

    Returns:
        Every image's CIDEr-D.
    """
    # The official programs split at any white space here, also at the no-break space in "5 1/2".
    sentences = [" ".join(sentence).split() for sentence in tokens.predictions + tokens.references]
    matches = [match(counts, tokens.images, len(tokens.predictions)) for counts in count_ngrams(sentences, LONGEST)]
    lengths = np.array([len(sentence) for sentence in sentences])
    _count_bleu(sums, matches, lengths, tokens.images)
    sums.add_ratio("ROUGE-L", rouge_l(tokens))
    scores = cider(matches, lengths, tokens.images)
    sums.add_ratio("CIDEr-D", scores)
    sums.limits["CIDEr-D"] = MAX_CIDER
    return scores.tolist()


def _count_bleu(sums: GroupedSums, matches: list[NgramMatches], lengths: Integers, images: Integers) -> None:
    groups = len(lengths) - len(images)
    own = lengths[:groups]
    correct = [sums.add_column(one.clipped()) for one in matches]
    guessed = [sums.add_column(np.maximum(0, own - order)) for order in range(len(matches))]
    length, closest = sums.add_column(own), sums.add_column(_closest_lengths(own, lengths[groups:], images))

    def combine(sums: Array) -> dict[str, Array]:
        precisions = (sums[:, correct] + _ABOVE_ZERO) / (sums[:, guessed] + _BELOW_LINE)
        ratio = (sums[:, length] + _ABOVE_ZERO) / (sums[:, closest] + _BELOW_LINE)
        brevity = np.exp(np.minimum(0, 1 - 1 / ratio))
        products = np.cumprod(precisions, axis=1)
        return {f"BLEU-{n + 1}": brevity * products[:, n] ** (1 / (n + 1)) for n in range(len(matches))}

    sums.add_derived(combine)


def _closest_lengths(own: Integers, lengths: Integers, images: Integers) -> Integers:
    """The reference length closest to each prediction's; in a tie the shorter one."""
    order = np.lexsort((lengths, np.abs(lengths - own[images]), images))
    first = np.searchsorted(images[order], np.arange(len(own)))
    found: Integers = lengths[order][first]
    return found


def rouge_l(tokens: TokenizedCaptions) -> list[float]:
    """ROUGE-L of every image, from the best precision and the best recall over its references, taken separately."""
    return [
        _rouge_l(prediction or [""], [tokens.references[index] or [""] for index in indices])
        for prediction, indices in zip(tokens.predictions, _reference_ranges(tokens), strict=True)
    ]


def _rouge_l(prediction: list[str], references: list[list[str]]) -> float:
    where: dict[str, int] = {}
    for index, token in enumerate(prediction):
        where[token] = where.get(token, 0) | 1 << index
    common = [_longest_common(where, len(prediction), reference) for reference in references]
    precision = max(common) / len(prediction)
    recall = max(length / len(reference) for length, reference in zip(common, references, strict=True))
    if not max(common):
        return 0.0
    return (1 + _BETA**2) * precision * recall / (recall + _BETA**2 * precision)


def _longest_common(where: dict[str, int], width: int, tokens: list[str]) -> int:
    """Length of the longest common subsequence, with a row of the table as one integer (Hyyrö 2004).

    Args:
        where: token → bits at its positions in the other sentence.
        width: length of the other sentence.
    """
    full = (1 << width) - 1
    row = full
    for token in tokens:
        found = row & where.get(token, 0)
        row = (row + found | row - found) & full
    return width - row.bit_count()


def _reference_ranges(tokens: TokenizedCaptions) -> list[range]:
    """The indices of every image's references."""
    ends = np.searchsorted(tokens.images, np.arange(len(tokens.predictions) + 1))
    return [range(first, last) for first, last in itertools.pairwise(ends)]


# CIDEr-D: agreement of a caption with its references, with TF-IDF weights of n-grams.
#
# Source: Vedantam et al. 2015, "CIDEr: Consensus-based image description evaluation", in the form of the COCO caption
# evaluation.

_SIGMA = 6.0


def cider(matches: list[NgramMatches], lengths: Integers, images: Integers) -> Array:
    """CIDEr-D of every image.

    The weight of an n-gram is its count times log(images / images with it in a reference). For each n-gram length this
    is the cosine of prediction and reference, with the prediction's weights clipped to the reference's, times a
    Gaussian of the difference in length (in bigrams); averaged over n-gram lengths and references, times 10.

    Args:
        matches: the n-grams by their length.
        lengths: number of words of the predictions, then of the references, shape (G + S,).
        images: the image of every reference, shape (S,).

    Returns:
        Shape (G,), in 0…10; all 0 for a single image, where all weights are 0.
    """
    groups = len(lengths) - len(images)
    bigrams = np.maximum(0, lengths - 1)
    gaussian = np.exp(-((bigrams[images] - bigrams[groups:]) ** 2) / (2 * _SIGMA**2))
    cosines = np.mean([_cosines(one, images) for one in matches], axis=0)
    found: Array = 10 * np.bincount(images, cosines * gaussian, groups) / np.bincount(images, minlength=groups)
    return found


def _cosines(one: NgramMatches, images: Integers) -> Array:
    """Per reference, shape (S,)."""
    own, others = one.predicted, one.referenced
    documents = np.bincount(one.keys % max(own.kinds, 1), minlength=own.kinds)
    rarity = np.log(one.images) - np.log(np.maximum(1, documents))
    own_weights, weights = own.counts * rarity[own.ngrams], others.counts * rarity[others.ngrams]
    places, there = find(own.sentences * own.kinds + own.ngrams, images[others.sentences] * own.kinds + others.ngrams)
    common = np.zeros(len(weights))
    common[there] = np.minimum(own_weights[places[there]], weights[there]) * weights[there]
    products = np.bincount(others.sentences, common, len(images)).astype(np.float64)
    norms = _norms(own, own_weights, one.images)[images] * _norms(others, weights, len(images))
    return np.divide(products, norms, out=products, where=norms != 0)


def _norms(counts: NgramCounts, weights: Array, sentences: int) -> Array:
    found: Array = np.sqrt(np.bincount(counts.sentences, weights**2, sentences))
    return found


# Counts of n-grams in many sentences at once.

Integers = NDArray[np.int64]


@dataclass(frozen=True)
class NgramCounts:
    """The n-grams of one length, with an entry for every sentence in which they occur.

    Attributes:
        sentences: index of the sentence, shape (K,), ascending.
        ngrams: number of the n-gram, shape (K,), ascending in every sentence.
        counts: occurrences in the sentence, shape (K,).
        kinds: upper bound of the numbers.
    """

    sentences: Integers
    ngrams: Integers
    counts: Integers
    kinds: int

    def of(self, first: int, last: int) -> NgramCounts:
        """The counts of the sentences `first` … `last` - 1, renumbered from 0."""
        start, stop = np.searchsorted(self.sentences, (first, last))
        return NgramCounts(
            self.sentences[start:stop] - first, self.ngrams[start:stop], self.counts[start:stop], self.kinds
        )


def count_ngrams(sentences: Sequence[Sequence[str]], longest: int) -> list[NgramCounts]:
    """Count the n-grams of 1, 2, … `longest` words; equal n-grams have equal numbers in all sentences."""
    numbers: dict[str, int] = {}
    words = np.array([numbers.setdefault(word, len(numbers)) for sentence in sentences for word in sentence], np.int64)
    owners = np.repeat(np.arange(len(sentences)), [len(sentence) for sentence in sentences])
    kinds, starts, ngrams = len(numbers), np.arange(len(words)), words
    found = [_count(owners, ngrams, kinds)]
    for length in range(2, longest + 1):
        whole = starts + length - 1 < len(words)
        starts, ngrams = starts[whole], ngrams[whole]
        whole = owners[starts] == owners[starts + length - 1]
        starts, ngrams = starts[whole], ngrams[whole]
        distinct, ngrams = np.unique(ngrams * len(numbers) + words[starts + length - 1], return_inverse=True)
        kinds = len(distinct)
        found.append(_count(owners[starts], ngrams, kinds))
    return found


def _count(owners: Integers, ngrams: Integers, kinds: int) -> NgramCounts:
    keys, counts = np.unique(owners * max(kinds, 1) + ngrams, return_counts=True)
    return NgramCounts(keys // max(kinds, 1), keys % max(kinds, 1), counts, kinds)


@dataclass(frozen=True)
class NgramMatches:
    """The n-grams of one length in predictions and in their references.

    Attributes:
        predicted: of the predictions; sentences are images.
        referenced: of the references.
        keys: image · kinds + n-gram, for each n-gram in any reference of an image, shape (J,), ascending.
        most: its largest count in one reference, shape (J,).
        images: number of images.
    """

    predicted: NgramCounts
    referenced: NgramCounts
    keys: Integers
    most: Integers
    images: int

    def clipped(self) -> Integers:
        """Per image, the number of predicted n-grams in references, clipped to the largest count in one of them."""
        own = self.predicted
        if not len(self.keys):  # no reference has any word
            return np.zeros(self.images, dtype=np.int64)
        places, there = find(self.keys, own.sentences * own.kinds + own.ngrams)
        agreed = np.zeros(len(there), np.int64)
        agreed[there] = np.minimum(own.counts[there], self.most[places[there]])
        found: Integers = np.bincount(own.sentences, agreed, self.images).astype(np.int64)
        return found


def match(counts: NgramCounts, images: Integers, predictions: int) -> NgramMatches:
    """Match the n-grams of predictions, which come first, with those of references.

    Args:
        images: the image of every reference, shape (S,).
        predictions: number of predictions, one for each image.
    """
    predicted = counts.of(0, predictions)
    referenced = counts.of(predictions, predictions + len(images))
    every = images[referenced.sentences] * counts.kinds + referenced.ngrams
    order = np.argsort(every, kind="stable")
    keys, starts = np.unique(every[order], return_index=True)
    most = np.maximum.reduceat(referenced.counts[order], starts) if len(keys) else keys
    return NgramMatches(predicted, referenced, keys, most, predictions)


def find(keys: Integers, wanted: Integers) -> tuple[Integers, NDArray[np.bool_]]:
    """Search values in an ascending array.

    Returns:
        Their indices (any valid one where a value is missing) and whether they were found.
    """
    if not len(keys):
        return np.zeros(len(wanted), np.int64), np.zeros(len(wanted), bool)
    places = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return places, keys[places] == wanted
