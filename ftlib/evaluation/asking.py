"""Ask a model every question of a split, restartably.

Answers are appended to `answers-*.jsonl` in a working folder as they come, one line per row, a batch at a time; a
second run asks only the batches that are not there. Batches are cut in the same way every time, so that an answer does
not depend on when the first run died. With several processes (one Slurm task per GPU) each takes its share of the
batches, and the first one waits for the others' answers.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from ftlib import console, files, preemption
from ftlib.config import Evaluation
from ftlib.data.examples import Example
from ftlib.data.images import image_path, open_image
from ftlib.evaluation.subject import Subject
from ftlib.models.families import check_images
from ftlib.models.rows import Row

PATIENCE_SECONDS = 600
_POLL_SECONDS = 2
T = TypeVar("T")
_PREFETCHED_BATCHES = 3

Answer = dict[str, Any]
"""`id`, `text` (generated) or `likelihoods` (one number for each label), and `cut` if the question was too long."""

Shown = tuple[str, int]
"""An image and which of its frames."""


def ask(
    subject: Subject,
    settings: Evaluation,
    labels: Sequence[str],
    rows: Sequence[Example],
    prompts: Sequence[str],
    root: Path,
    folder: Path,
    label: str,
) -> list[Answer] | None:
    """Answers in the order of the rows; None in a process that is not the first of its job.

    Args:
        labels: the closed set of answers, for `decode: choose`.
        prompts: of each row.
        root: what the images' paths are relative to.
        folder: the working folder; answers that it holds already are kept.
        label: of the progress.

    Raises:
        UserError: rows without an image for a model that looks at one, or the other way round.
    """
    check_images(subject.config.model.family, rows)
    rank, world = console.ranks()
    found = _read(folder)
    batches = batches_by_image([row.image for row in rows], [len(prompt) for prompt in prompts], settings.batch_size)
    mine = [batch for batch in batches[rank::world] if any(rows[place].id not in found for place in batch)]
    log = folder / f"answers-{rank}-{os.getpid()}-{time.time_ns()}.jsonl"
    done = sum(row.id in found for row in rows)
    with console.progress(label, len(rows), done) as update:
        for batch, encoded in _encoded(mine, subject, rows, prompts, root):
            answers = _answer(subject, settings, labels, encoded)
            _append(log, [{"id": rows[place].id, **answer} for place, answer in zip(batch, answers, strict=True)])
            preemption.tell_host("checkpointed")
            done += len(batch)
            update(done, "")
    if rank:
        return None
    found = _all_answers(folder, {row.id for row in rows})
    return [found[row.id] for row in rows]


def batches_by_image(images: Sequence[str], lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Rows in batches: those of one image together, images of similar prompt length together, longest first.

    A row of text (image "") stands alone. The biggest batch thus fails at once or never.
    """
    groups: dict[str | int, list[int]] = {}
    for place, image in enumerate(images):
        groups.setdefault(image or place, []).append(place)
    batches: list[list[int]] = []
    for group in sorted(groups.values(), key=lambda group: -max(lengths[place] for place in group)):
        if not batches or len(batches[-1]) + len(group) > batch_size:
            batches.append([])
        for place in group:
            if len(batches[-1]) == batch_size:
                batches.append([])
            batches[-1].append(place)
    return batches


def _encoded(
    batches: Sequence[list[int]], subject: Subject, rows: Sequence[Example], prompts: Sequence[str], root: Path
) -> Iterator[tuple[list[int], list[Row]]]:
    """Batches with their rows ready; images are decoded by threads, a few batches ahead."""
    inputs = subject.inputs

    def load(shown: Shown, places: list[int]) -> list[Row]:
        image, frame = shown
        picture = open_image(image_path(root, image), frame) if image else None
        return inputs.prompt_rows([prompts[place] for place in places], picture)

    with ThreadPoolExecutor(max_workers=len(os.sched_getaffinity(0))) as pool:
        waiting = []
        for batch in [*batches, *[None] * _PREFETCHED_BATCHES]:
            if batch is not None:
                by_image: dict[Shown, list[int]] = {}
                for place in batch:
                    by_image.setdefault((rows[place].image, rows[place].frame), []).append(place)
                jobs = [pool.submit(load, shown, places) for shown, places in by_image.items()]
                waiting.append(([place for places in by_image.values() for place in places], jobs))
            if waiting and (batch is None or len(waiting) > _PREFETCHED_BATCHES):
                order, jobs = waiting.pop(0)
                yield order, [row for job in jobs for row in job.result()]


def _answer(subject: Subject, settings: Evaluation, labels: Sequence[str], rows: Sequence[Row]) -> list[Answer]:
    if settings.decode == "choose":
        answers = [{"likelihoods": numbers} for numbers in subject.weigh(rows, labels).tolist()]
    else:
        answers = [{"text": text} for text in subject.answer(rows, settings)]
    return [answer | noted for answer, noted in zip(answers, _cuts(subject, settings, labels, rows), strict=True)]


def _cuts(subject: Subject, settings: Evaluation, labels: Sequence[str], rows: Sequence[Row]) -> list[Answer]:
    """What to note of rows whose beginning had to be left out."""
    if subject.inputs.limit is None:
        return [{}] * len(rows)
    choosing = settings.decode == "choose"
    room = max(len(subject.inputs.answer_ids(label)) for label in labels) if choosing else 1
    return [{"cut": True} if len(row.ids) + room > subject.inputs.limit else {} for row in rows]


def working_folder(folder: Path, questions: dict[str, Any], over: Callable[[], bool] = lambda: False) -> Path:
    """Where answers to these questions are kept until all are there; answers to other questions are thrown away.

    Args:
        over: says whether another process has answered and scored everything, and the folder is gone for good.

    Raises:
        RuntimeError: see `wait_for`.
    """
    note = folder / "questions.json"
    if console.ranks()[0] == 0:
        if folder.exists() and not (note.exists() and files.read_json(note) == questions):
            shutil.rmtree(folder)
        if not folder.exists():
            files.write_json(note, questions)
    wait_for(lambda: _has(note, questions) or over(), str(folder))
    return folder


def _has(note: Path, questions: dict[str, Any]) -> bool:
    try:
        return bool(files.read_json(note) == questions)
    except FileNotFoundError:  # removed as soon as everything is answered
        return False


def wait_for(look: Callable[[], T | None], what: str) -> T:
    """Look again and again for what another process of this job is making.

    Raises:
        RuntimeError: it did not come within ten minutes.
    """
    start = time.monotonic()
    while not (found := look()):
        if time.monotonic() - start > PATIENCE_SECONDS:
            raise RuntimeError(f"{what}: the other tasks of this job did not make it in {PATIENCE_SECONDS} s")
        time.sleep(_POLL_SECONDS)
    return found


def _append(log: Path, answers: Sequence[Answer]) -> None:
    """A batch in one write."""
    with files.storage_errors(log), log.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers))


def _read(folder: Path) -> dict[str, Answer]:
    """All answers so far; lines that a killed writer left torn do not count."""
    return {
        answer["id"]: answer for log in sorted(folder.glob("answers-*.jsonl")) for answer in files.read_jsonl_log(log)
    }


def count_answers(folder: Path) -> int:
    """How many answers a working folder has so far."""
    return len(_read(folder))


def _all_answers(folder: Path, ids: set[str]) -> dict[str, Answer]:
    """The answers once those of all `ids` are there, which other processes of this job may still be writing.

    Raises:
        RuntimeError: nothing new came for ten minutes.
    """
    found = _read(folder)
    while not ids <= found.keys():
        known = len(found)
        wait_for(lambda known=known: len(_read(folder)) > known, str(folder))  # type: ignore[misc]
        found = _read(folder)
    return found
