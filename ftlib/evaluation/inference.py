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

from ftlib.config.schema import Evaluation
from ftlib.core import files, jsonl, signals
from ftlib.core import log as core_log
from ftlib.core.redaction import redact_values
from ftlib.core.wait import wait_until
from ftlib.data.example import Example
from ftlib.data.images import image_path, open_image
from ftlib.evaluation.model import EvalModel
from ftlib.models.encoding import EncodedExample
from ftlib.models.registry import validate_image_columns

TIMEOUT_SECONDS = 600
_POLL_SECONDS = 2
T = TypeVar("T")
_PREFETCHED_BATCHES = 3

Prediction = dict[str, Any]
"""`id`, `text` (generated) or `likelihoods` (one number for each label), and `cut` if the question was too long."""

ImageFrame = tuple[str, int]
"""An image and which of its frames."""


def generate_predictions(
    model: EvalModel,
    settings: Evaluation,
    labels: Sequence[str],
    rows: Sequence[Example],
    prompts: Sequence[str],
    root: Path,
    folder: Path,
    label: str,
    max_pixels: int | None = None,
) -> list[Prediction] | None:
    """Answers in the order of the rows; None in a process that is not the first of its job.

    Args:
        labels: the closed set of answers, for `decode: choose`.
        prompts: of each row.
        root: what the images' paths are relative to.
        folder: the working folder; answers that it holds already are kept.
        label: of the progress.
        max_pixels: see `images.open_image`.

    Raises:
        UserError: rows without an image for a model that looks at one, or the other way round.
    """
    validate_image_columns(model.config.model, rows)
    rank, world_size = core_log.rank_and_world_size()
    found = _read(folder)
    batches = image_batches([row.image for row in rows], [len(prompt) for prompt in prompts], settings.batch_size)
    mine = [batch for batch in batches[rank::world_size] if any(rows[index].id not in found for index in batch)]
    log = folder / f"answers-{rank}-{os.getpid()}-{time.time_ns()}.jsonl"
    done = sum(row.id in found for row in rows)
    with core_log.progress(label, len(rows), done) as update:
        for batch, encoded in _encode_batches(mine, model, rows, prompts, root, max_pixels):
            answers = _predict_batch(model, settings, labels, encoded)
            _append(log, [{"id": rows[index].id, **answer} for index, answer in zip(batch, answers, strict=True)])
            signals.notify_host("checkpointed")
            done += len(batch)
            update(done, "")
    if rank:
        return None
    found = _all_predictions(folder, {row.id for row in rows})
    return [found[row.id] for row in rows]


def image_batches(images: Sequence[str], lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Rows in batches: those of one image together, images of similar prompt length together, longest first.

    A row of text (image "") stands alone. The biggest batch thus fails at once or never.
    """
    groups: dict[str | int, list[int]] = {}
    for index, image in enumerate(images):
        groups.setdefault(image or index, []).append(index)
    batches: list[list[int]] = []
    for group in sorted(groups.values(), key=lambda group: -max(lengths[index] for index in group)):
        if not batches or len(batches[-1]) + len(group) > batch_size:
            batches.append([])
        for index in group:
            if len(batches[-1]) == batch_size:
                batches.append([])
            batches[-1].append(index)
    return batches


def _encode_batches(
    batches: Sequence[list[int]],
    model: EvalModel,
    rows: Sequence[Example],
    prompts: Sequence[str],
    root: Path,
    max_pixels: int | None,
) -> Iterator[tuple[list[int], list[EncodedExample]]]:
    """Batches with their rows ready; images are decoded by threads, a few batches ahead."""
    processor = model.processor

    def load(image_frame: ImageFrame, indices: list[int]) -> list[EncodedExample]:
        image, frame = image_frame
        digest = rows[indices[0]].digest
        picture = open_image(image_path(root, image), frame, digest, max_pixels) if image else None
        return processor.encode_prompts([prompts[index] for index in indices], picture)

    with ThreadPoolExecutor(max_workers=len(os.sched_getaffinity(0))) as pool:
        waiting = []
        for batch in [*batches, *[None] * _PREFETCHED_BATCHES]:
            if batch is not None:
                by_image: dict[ImageFrame, list[int]] = {}
                for index in batch:
                    by_image.setdefault((rows[index].image, rows[index].frame), []).append(index)
                jobs = [pool.submit(load, image_frame, indices) for image_frame, indices in by_image.items()]
                waiting.append(([index for indices in by_image.values() for index in indices], jobs))
            if waiting and (batch is None or len(waiting) > _PREFETCHED_BATCHES):
                order, jobs = waiting.pop(0)
                yield order, [row for job in jobs for row in job.result()]


def _predict_batch(
    model: EvalModel, settings: Evaluation, labels: Sequence[str], rows: Sequence[EncodedExample]
) -> list[Prediction]:
    if settings.decode == "choose":
        answers = [{"likelihoods": numbers} for numbers in model.label_loglikelihoods(rows, labels).tolist()]
    else:
        answers = [{"text": text} for text in model.generate(rows, settings)]
    return [
        answer | noted for answer, noted in zip(answers, _truncation_notes(model, settings, labels, rows), strict=True)
    ]


def _truncation_notes(
    model: EvalModel, settings: Evaluation, labels: Sequence[str], rows: Sequence[EncodedExample]
) -> list[Prediction]:
    """What to note of rows whose beginning had to be left out."""
    if model.processor.max_length is None:
        return [{}] * len(rows)
    choosing = settings.decode == "choose"
    room = max(len(model.processor.encode_answer(label)) for label in labels) if choosing else 1
    return [{"cut": True} if len(row.input_ids) + room > model.processor.max_length else {} for row in rows]


def scratch_dir(folder: Path, settings: dict[str, Any], over: Callable[[], bool] = lambda: False) -> Path:
    """Where answers to these questions are kept until all are there; answers to other questions are thrown away.

    Args:
        over: says whether another process has answered and scored everything, and the folder is gone for good.

    Raises:
        RuntimeError: see `wait_for_tasks`.
    """
    note = folder / "questions.json"
    if core_log.rank_and_world_size()[0] == 0:
        if folder.exists() and not (note.exists() and files.read_json(note) == settings):
            shutil.rmtree(folder)
        if not folder.exists():
            files.write_json(note, settings)
    wait_for_tasks(lambda: _is_note_of(note, settings) or over(), str(folder))
    return folder


def _is_note_of(note: Path, settings: dict[str, Any]) -> bool:
    try:
        return bool(files.read_json(note) == settings)
    except FileNotFoundError:  # removed as soon as everything is answered
        return False


def wait_for_tasks(find: Callable[[], T | None], label: str) -> T:
    """Wait for what another process of this job makes.

    Raises:
        RuntimeError: it did not come within ten minutes.
    """
    if not (found := wait_until(find, _POLL_SECONDS, TIMEOUT_SECONDS)):
        raise RuntimeError(f"{label}: the other tasks of this job did not make it in {TIMEOUT_SECONDS} s")
    return found


def _append(log: Path, answers: Sequence[Prediction]) -> None:
    """A batch in one write. URLs of the data stay as they are: what is scored must be what was answered."""
    with files.storage_errors(log), log.open("a", encoding="utf-8") as file:
        kept = ({**redact_values(answer, urls=False), "id": answer["id"]} for answer in answers)
        file.write("".join(json.dumps(answer, ensure_ascii=False) + "\n" for answer in kept))


def _read(folder: Path) -> dict[str, Prediction]:
    """All answers so far; lines that a killed writer left torn do not count."""
    return {
        answer["id"]: answer for log in sorted(folder.glob("answers-*.jsonl")) for answer in jsonl.read_jsonl_log(log)
    }


def count_predictions(folder: Path) -> int:
    """How many answers a working folder has so far."""
    return len(_read(folder))


def _all_predictions(folder: Path, ids: set[str]) -> dict[str, Prediction]:
    """The answers once those of all `ids` are there, which other processes of this job may still be writing.

    Raises:
        RuntimeError: nothing new came for ten minutes.
    """
    found = _read(folder)
    while not ids <= found.keys():
        known = len(found)
        wait_for_tasks(lambda known=known: len(_read(folder)) > known, str(folder))  # type: ignore[misc]
        found = _read(folder)
    return found
