"""Time of caption scores: ftlib against pycocoevalcap, on the same files, one after the other, tokenizers included.

    python tests/benchmarks/captions.py [IMAGES]

Made are a release file of IMAGES (default 40,000) images with 5 captions each and a result file. Both sides read
these files and compute BLEU-1 … 4, ROUGE-L and CIDEr-D, and must agree. METEOR and SPICE are the same Java programs on
both sides and are left out. ftlib uses one process and one core; the official tokenizer, a Java program, may use more.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

Scores = dict[str, float]
NAMES = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "CIDEr-D")
PARTS = (
    ("A", "The", "Two", "Some", "There is a", "This is a", "An old", "A young", "A small white", "Several"),
    ("man", "woman", "dog", "cat", "train", "child", "group of people", "couple of zebras", "red double-decker bus"),
    ("sitting", "standing", "riding", "walking", "that's parked", "holding a sign", "looking", "playing", "flying"),
    ("on", "in front of", "next to", "near", "under", "on top of", "behind", "across", "by"),
    ("a", "the", "its", "their", "some", "a big", "a wooden", "an empty"),
    ("bench", "street", "field", "kitchen table", "surfboard", "building", "tree", "park", "beach", "$5 sign", "bed"),
    ("", ".", " .", " with a kite.", " at night", ", while it's raining", " (black and white)", " in the background"),
)
"""What captions are made of."""


def caption(draw: random.Random) -> str:
    """A caption of COCO's length and manner, now and then with a word that no other has."""
    text = " ".join(draw.choice(part) for part in PARTS[:-1]) + draw.choice(PARTS[-1])
    if draw.random() < 0.2:
        text = f"{text} {''.join(draw.choice('aeioubcdfglmnprst') for _ in range(draw.randint(3, 9)))}"
    return text


def make(folder: Path, images: int) -> None:
    """Write `references.json` and `results.json`."""
    draw = random.Random(0)
    listed = [{"id": image, "file_name": f"{image:012}.jpg"} for image in range(images)]
    captions = [{"id": n, "image_id": n // 5, "caption": caption(draw)} for n in range(5 * images)]
    results = [{"image_id": image, "caption": caption(draw)} for image in range(images)]
    release = {"info": {}, "type": "captions", "licenses": [], "images": listed, "annotations": captions}
    (folder / "references.json").write_text(json.dumps(release))
    (folder / "results.json").write_text(json.dumps(results))


def ours(folder: Path) -> Scores:
    """ftlib, without the Java programs."""
    from ftlib.data.sources.coco_captions import read_captions, read_results
    from ftlib.metrics.base import GroupedSums
    from ftlib.metrics.captions import add_caption_scores, tokenize_captions

    references = {image.image_id: image.captions for image in read_captions(folder / "references.json")}
    totals = GroupedSums(list(references))
    add_caption_scores(totals, tokenize_captions(references, read_results(folder / "results.json")))
    found = totals.combine(totals.per_group.sum(axis=0, keepdims=True))
    return {name: float(found[name][0]) for name in NAMES}


def theirs(folder: Path) -> Scores:
    """pycocoevalcap, as its own example calls it."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer
    from pycocotools.coco import COCO

    truths = COCO(str(folder / "references.json"))
    results = truths.loadRes(str(folder / "results.json"))
    images = results.getImgIds()
    references = PTBTokenizer().tokenize({image: truths.imgToAnns[image] for image in images})
    predictions = PTBTokenizer().tokenize({image: results.imgToAnns[image] for image in images})
    found = [scorer.compute_score(references, predictions)[0] for scorer in (Bleu(4), Rouge(), Cider())]
    return dict(zip(NAMES, [*found[0], *map(float, found[1:])], strict=True))


def timed(name: str, run: Callable[[Path], Scores], folder: Path) -> tuple[Scores, float, float]:
    """The scores, seconds of wall time, and seconds of all cores, those of the processes it started included."""
    start, start_cores = time.perf_counter(), sum(os.times()[:4])
    with contextlib.redirect_stdout(io.StringIO()):
        scores = run(folder)
    seconds, cores = time.perf_counter() - start, sum(os.times()[:4]) - start_cores
    print(f"{name:14} {seconds:7.1f} s wall {cores:7.1f} s CPU   " + shown(scores), flush=True)
    return scores, seconds, cores


def shown(scores: Scores) -> str:
    """Scores in four digits."""
    return ", ".join(f"{name} {value:.4f}" for name, value in scores.items())


def main() -> int:
    """Make the files, time both sides, compare."""
    images = int(sys.argv[1]) if len(sys.argv) > 1 else 40_000
    java = subprocess.run(["java", "-version"], capture_output=True, text=True, check=True).stderr.splitlines()[0]
    print(f"{images} images, 5 references each; {os.cpu_count()} cores, {platform.machine()}, {java}")
    print(f"Python {platform.python_version()}, numpy {version('numpy')}, pycocoevalcap {version('pycocoevalcap')}")
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder), images)
        found, *seconds = timed("ftlib", ours, Path(folder))
        expected, *official_seconds = timed("pycocoevalcap", theirs, Path(folder))
    difference = max(abs(found[name] - expected[name]) for name in NAMES)
    wall, cores = (theirs_s / ours_s for theirs_s, ours_s in zip(official_seconds, seconds, strict=True))
    print(f"ratio          {wall:7.1f} × wall {cores:7.1f} × CPU   largest difference {difference:.1e}")
    return 0 if difference < 1e-9 else 1


if __name__ == "__main__":
    sys.exit(main())
