"""CPU seconds and memory of scoring all of VQAv2's validation split: `python tests/benchmarks/vqa.py`.

Files of the release's size and shape (214,354 questions about 40,504 images, ten answers each) are made in a temporary
folder and scored in a process of its own. Reading and scoring are to take 10 seconds of one core and 1 GB at most.
"""

from __future__ import annotations

import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

QUESTIONS, IMAGES, TYPES = 214_354, 40_504, 65
NAMES = ("questions.json", "annotations.json", "results.json")


def make_files(folder: Path) -> None:
    """Answers of different frequency, with capitals, punctuation, articles, numbers and contractions among them."""
    draw = random.Random(0)
    words = [f"word{number}" for number in range(20_000)]
    common = ["yes", "no", "2", "two", "The dog.", "black-and-white", "dont know", "1,000", "on the table"]
    kinds = ["what is the", "is there a", "how many", *(f"type {number}" for number in range(TYPES - 3))]
    questions, annotations, results = [], [], []
    for number in range(QUESTIONS):
        image = draw.randrange(IMAGES) * 14
        identity = 262_148_000 + number
        few = [draw.choice(common) if draw.random() < 0.6 else draw.choice(words) for _ in range(draw.randint(1, 4))]
        answers = [
            {"answer": draw.choice(few), "answer_confidence": draw.choice(("yes", "maybe", "no")), "answer_id": person}
            for person in range(1, 11)
        ]
        kind, sort = draw.choice(kinds), draw.choice(("yes/no", "number", "other"))
        best = {"question_type": kind, "answer_type": sort, "multiple_choice_answer": few[0]}
        annotations.append({**best, "answers": answers, "image_id": image, "question_id": identity})
        text = " ".join(draw.choices(words, k=6)) + "?"
        questions.append({"image_id": image, "question": text, "question_id": identity})
        results.append({"question_id": identity, "answer": draw.choice([*few, "red"])})
    contents = ({"info": {}, "questions": questions}, {"info": {}, "annotations": annotations}, results)
    for name, content in zip(NAMES, contents, strict=True):
        with (folder / name).open("w") as file:
            json.dump(content, file)


def run(folder: Path) -> None:
    """Score the files and print what it took."""
    from ftlib.data.sources.vqav2 import score
    from ftlib.metrics.uncertainty import confidence_intervals

    start = time.process_time()
    measured = score([folder / NAMES[0], folder / NAMES[1]], folder / NAMES[2])
    accuracy = measured.values()["accuracy"]
    seconds = time.process_time() - start
    print(f"accuracy {accuracy:.2f} of {measured.n}: {seconds:.1f} s of CPU, peak {_peak():.0f} MB")
    start = time.process_time()
    low, high = confidence_intervals(measured)["accuracy"] or (float("nan"), float("nan"))
    print(f"intervals ({low:.2f}–{high:.2f}): {time.process_time() - start:.1f} s of CPU, peak {_peak():.0f} MB")


def _peak() -> float:
    """Peak resident memory of this process in MB (Linux counts in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


if __name__ == "__main__":
    if len(sys.argv) > 1:
        run(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as name:
            make_files(Path(name))
            subprocess.run([sys.executable, __file__, name], check=True)
