"""Resumable inference over a split.

Predictions are appended to `answers-*.jsonl` in a scratch folder, one line per row, group by group; a restart computes
only missing groups. Groups are always formed in the same way, so that a prediction does not depend on interruptions.
A group is a batch, or several if answers may be long: rows of later ones take the places of those that end.
With several processes (one Slurm task per GPU) each computes its share of the groups, and the first one collects all
predictions.
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
from ftlib.data.example import Example, ImageFile
from ftlib.data.images import open_row_images
from ftlib.evaluation.model import EvalModel
from ftlib.metrics.answers import LENGTH, STOP, answer_confidence
from ftlib.models.encoding import EncodedExample
from ftlib.models.generation import GeneratedAnswer, token_ends
from ftlib.models.registry import validate_image_columns

TIMEOUT_SECONDS = 600
_POLL_SECONDS = 2
T = TypeVar("T")
_PREFETCHED_BATCHES = 3
_BATCHES_TOGETHER, _WITH_IMAGES = 4, 2
"""How many batches are answered together, where answers may have more than `_SHORT_ANSWER` tokens: with images no more
than fit into memory beside those that are prefetched. Of answers whose lengths are distributed exponentially, four
batches of 16 rows take half as many steps then, two batches two thirds."""
_LEAST_GROUPS = 8
"""Several tasks of a job have their share of the groups, which do not depend on how many tasks there are."""
_SHORT_ANSWER = 16
"""Batches of such answers are answered one by one: most of their time is spent on reading prompts."""

Prediction = dict[str, Any]
"""`id`; of a generated answer `text`, `finish_reason` and `confidence` (see `describe_confidence`), else `likelihoods`,
one number for each label; `cut` if the prompt was truncated."""

AnswerFields = Callable[[str, Sequence[int], Sequence[float]], dict[str, Any]]
"""See `tasks.base.Task.answer_fields`."""


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
    answer_fields: AnswerFields | None = None,
) -> list[Prediction] | None:
    """Return predictions in the order of the rows; None in all processes of a job except the first.

    Args:
        labels: the closed set of answers, for `decode: choose`.
        prompts: of each row.
        root: the folder to which image paths are relative.
        folder: the scratch folder; its existing predictions are reused.
        label: label of the progress.
        max_pixels: see `images.open_image`.
        answer_fields: of the task.

    Raises:
        UserError: rows without an image for a model that needs one, or with an image for a text model.
    """
    validate_image_columns(model.config.model, rows)
    rank, world_size = core_log.rank_and_world_size()
    if found := _read(folder):
        signals.mark_resumable()
    greedy = settings.decode == "generate" and settings.num_beams == 1 and not settings.generation
    long = greedy and settings.max_new_tokens > _SHORT_ANSWER
    most = _WITH_IMAGES if any(row.images for row in rows) else _BATCHES_TOGETHER
    together = max(1, min(most, len(rows) // (_LEAST_GROUPS * settings.batch_size))) if long else 1
    batches = image_batches(
        ["\n".join(row.images) for row in rows], [len(prompt) for prompt in prompts], settings.batch_size * together
    )
    mine = [batch for batch in batches[rank::world_size] if any(rows[index].id not in found for index in batch)]
    log = folder / f"answers-{rank}-{os.getpid()}-{time.time_ns()}.jsonl"
    done = sum(row.id in found for row in rows)
    with core_log.progress(label, len(rows), done) as update:
        ahead = max(1, _PREFETCHED_BATCHES // together)
        for batch, encoded in _encode_batches(mine, model, rows, prompts, root, max_pixels, ahead):
            answers = _predict_batch(model, settings, labels, encoded, answer_fields)
            _append(log, [{"id": rows[index].id, **answer} for index, answer in zip(batch, answers, strict=True)])
            signals.notify_host("checkpointed")
            signals.mark_resumable()
            done += sum(rows[index].id not in found for index in batch)
            update(done, "")
    if rank:
        return None
    found = _all_predictions(folder, {row.id for row in rows})
    return [found[row.id] for row in rows]


def image_batches(images: Sequence[str], lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Batch rows: rows of the same images together, images of similar prompt length together, longest first.

    Rows of text (image "") are not grouped. The largest batch comes first, so running out of memory shows at once.
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
    ahead: int,
) -> Iterator[tuple[list[int], list[EncodedExample]]]:
    """Yield batches with encoded rows; threads decode images so many batches ahead."""
    processor = model.processor

    def load(indices: list[int]) -> list[EncodedExample]:
        images = open_row_images(root, rows[indices[0]], max_pixels)
        return processor.encode_prompts([prompts[index] for index in indices], images)

    with ThreadPoolExecutor(max_workers=len(os.sched_getaffinity(0))) as pool:
        waiting = []
        for batch in [*batches, *[None] * ahead]:
            if batch is not None:
                by_image: dict[tuple[ImageFile, ...], list[int]] = {}
                for index in batch:
                    by_image.setdefault(rows[index].image_files, []).append(index)
                jobs = [pool.submit(load, indices) for indices in by_image.values()]
                waiting.append(([index for indices in by_image.values() for index in indices], jobs))
            if waiting and (batch is None or len(waiting) > ahead):
                order, jobs = waiting.pop(0)
                yield order, [row for job in jobs for row in job.result()]


def _predict_batch(
    model: EvalModel,
    settings: Evaluation,
    labels: Sequence[str],
    rows: Sequence[EncodedExample],
    answer_fields: AnswerFields | None,
) -> list[Prediction]:
    if settings.decode == "choose":
        answers = [{"likelihoods": numbers} for numbers in model.label_loglikelihoods(rows, labels).tolist()]
    else:
        answers = [
            {
                "text": one.text,
                "finish_reason": STOP if one.ended else LENGTH,
                "confidence": describe_confidence(model, one, answer_fields),
            }
            for one in model.generate(rows, settings)
        ]
    return [
        answer | noted for answer, noted in zip(answers, _truncation_notes(model, settings, labels, rows), strict=True)
    ]


def describe_confidence(
    model: EvalModel, answer: GeneratedAnswer, answer_fields: AnswerFields | None
) -> dict[str, Any]:
    """Return how sure an answer is: the fields of `answer_confidence`, and those of the task."""
    found = answer_confidence(answer.logprobs)
    if answer_fields is None or not answer.token_ids:
        return found
    return found | answer_fields(answer.text, token_ends(model.processor, answer), answer.logprobs)


def _truncation_notes(
    model: EvalModel, settings: Evaluation, labels: Sequence[str], rows: Sequence[EncodedExample]
) -> list[Prediction]:
    """Return the fields that mark truncated prompts."""
    if model.processor.max_length is None:
        return [{}] * len(rows)
    choosing = settings.decode == "choose"
    room = max(len(model.processor.encode_answer(label)) for label in labels) if choosing else 1
    return [{"cut": True} if len(row.input_ids) + room > model.processor.max_length else {} for row in rows]


def scratch_dir(folder: Path, settings: dict[str, Any], over: Callable[[], bool] = lambda: False) -> Path:
    """Return the scratch folder for predictions with these settings; predictions with other settings are deleted.

    Args:
        over: returns whether another process has finished the evaluation, so that the folder no longer exists.

    Raises:
        RuntimeError: see `wait_for_tasks`.
    """
    note = folder / "questions.json"
    if core_log.rank_and_world_size()[0] == 0:
        if folder.exists() and not (note.exists() and files.read_json(note) == settings):
            shutil.rmtree(folder)
        if not folder.exists():
            files.write_json(note, settings, urls=False)
    wait_for_tasks(lambda: _is_note_of(note, settings) or over(), str(folder))
    return folder


def _is_note_of(note: Path, settings: dict[str, Any]) -> bool:
    try:
        return bool(files.read_json(note) == settings)
    except FileNotFoundError:  # removed when the evaluation is complete
        return False


def wait_for_tasks(find: Callable[[], T | None], label: str) -> T:
    """Wait for the result of another process of this job.

    Raises:
        RuntimeError: no result within ten minutes.
    """
    if not (found := wait_until(find, _POLL_SECONDS, TIMEOUT_SECONDS)):
        raise RuntimeError(f"{label}: the other tasks of this job did not finish in {TIMEOUT_SECONDS} s")
    return found


def _append(log: Path, answers: Sequence[Prediction]) -> None:
    """Append a batch with one write. URLs are not masked, because predictions are scored unchanged."""
    with files.storage_errors(log), log.open("a", encoding="utf-8") as file:
        kept = ({**redact_values(answer, urls=False), "id": answer["id"]} for answer in answers)
        file.write("".join(json.dumps(answer, ensure_ascii=False) + "\n" for answer in kept))


def _read(folder: Path) -> dict[str, Prediction]:
    """Return all predictions so far; incomplete lines of killed processes are ignored."""
    return {
        answer["id"]: answer for log in sorted(folder.glob("answers-*.jsonl")) for answer in jsonl.read_jsonl_log(log)
    }


def count_predictions(folder: Path) -> int:
    """Return the number of predictions in a scratch folder."""
    return len(_read(folder))


def _all_predictions(folder: Path, ids: set[str]) -> dict[str, Prediction]:
    """Wait for the predictions of all `ids` by other processes of this job, and return them.

    Raises:
        RuntimeError: no new predictions for ten minutes.
    """
    found = _read(folder)
    while not ids <= found.keys():
        known = len(found)
        wait_for_tasks(lambda known=known: len(_read(folder)) > known, str(folder))  # type: ignore[misc]
        found = _read(folder)
    return found
