"""Tasks: how an answer is read, which metrics judge it and what a challenge server takes.

A new task is a few lines in `TASKS`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ftlib.config_base import LOSS
from ftlib.data import expected
from ftlib.data.examples import Bad, Example
from ftlib.data.expected import VQA_PEOPLE
from ftlib.errors import UserError

if TYPE_CHECKING:
    from ftlib.metrics.totals import Measured

_UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]")
"""Thai, Lao, Burmese, Khmer, kana and Han."""

Record = dict[str, Any]
"""A line of predictions.jsonl: id, image, prompt, prediction, references and, from the dataset, facts.

Of a mixture also `dataset`, the part that a row comes from; its id then begins with the part's name.
"""


def by_dataset(records: Sequence[Record]) -> dict[str, list[Record]]:
    """The rows of each part of a mixture, as they were without the others; none if the rows are of no mixture."""
    found: dict[str, list[Record]] = {}
    for record in records:
        if name := record.get("dataset"):
            own = {field: value for field, value in record.items() if field != "dataset"}
            found.setdefault(name, []).append(own | {"id": record["id"].removeprefix(f"{name}/")})
    return found


@dataclass(frozen=True)
class Task:
    """A task.

    Attributes:
        columns: the metrics of tables, the one that stands for all others first.
        lower_is_better: those of its metrics that are errors; of all others higher is better.
        parse: generated text → answer.
        measure: (records, the dataset's labels, the positive label if one is named) → findings.
        submission: records → the challenge's result file, as JSON; None where the rows lack what it needs.
        fault: row of a dataset → why its answers could not be learned or judged; "" if they can.
        closed: whether the answers are a closed set.
    """

    columns: tuple[str, ...]
    parse: Callable[[str], str]
    measure: Callable[[Sequence[Record], Sequence[str], str | None], Measured]
    submission: Callable[[Sequence[Record]], Any] | None = None
    fault: Callable[[Example], str] | None = None
    closed: bool = False
    lower_is_better: tuple[str, ...] = ()

    def higher_is_better(self, metric: str) -> bool:
        """The direction of one of its metrics, or of the loss."""
        return metric not in (*self.lower_is_better, LOSS)

    def checked(self, row: Example | Bad) -> Example | Bad:
        """The row, or the record that it is no use as."""
        if isinstance(row, Bad) or self.fault is None or not (reason := self.fault(row)):
            return row
        return Bad(row.place, reason)


def _classification(records: Sequence[Record], labels: Sequence[str], positive: str | None) -> Measured:
    from ftlib.metrics import classification

    return classification.measure(
        [record["prediction"] for record in records],
        [record["references"][0] for record in records],
        labels,
        [record["image"] for record in records],
        positive,
    )


def _vqa(records: Sequence[Record], labels: Sequence[str], positive: str | None) -> Measured:
    from ftlib.metrics import vqa

    for record in records:
        if len(record["references"]) < VQA_PEOPLE:
            problem = f"row {record['id']}: VQA accuracy needs the answers of several people, usually ten"
            raise UserError(problem, f'Give it "references" with at least {VQA_PEOPLE}, or set task: classify.')
    names = {"answer type": "answer_type", "question type": "question_type"}
    kinds = {title: _facts(records, name) for title, name in names.items() if _have(records, name)}
    return vqa.measure(_predictions(records), _references(records), _groups(records, "image_id"), kinds)


def _docvqa(records: Sequence[Record], labels: Sequence[str], positive: str | None) -> Measured:
    from ftlib.metrics import anls

    kinds = {"question type": _facts(records, "question_types")} if _have(records, "question_types") else {}
    return anls.measure(_predictions(records), _references(records), _groups(records, "docId"), kinds)


def _gqa(records: Sequence[Record], labels: Sequence[str], positive: str | None) -> Measured:
    """GQA's metrics look at balanced questions; the others, which only consistency asks, get a score of their own."""
    from ftlib.data.official.gqa import parse_question
    from ftlib.metrics import gqa

    questions = {}
    for record in records:
        fields = {"question": record["prompt"], "answer": record["references"][0], "imageId": record["image"]}
        try:
            question = parse_question(fields | record.get("facts", {}))
        except ValueError as error:
            remedy = "Rows of task gqa carry the fields of GQA's questions (isBalanced, types, groups, entailed, …)."
            raise UserError(f"row {record['id']}: {error}", remedy) from None
        part = f"{record['dataset']}/" if "dataset" in record else ""
        questions[record["id"]] = replace(question, entailed=tuple(f"{part}{key}" for key in question.entailed))
    found = gqa.measure(questions, {record["id"]: record["prediction"] for record in records})
    rows = [float(record["prediction"] == record["references"][0]) for record in records]
    return replace(found, rows=rows, n=len(records))


def _caption(records: Sequence[Record], labels: Sequence[str], positive: str | None) -> Measured:
    """An image has one caption to be judged, however many rows it has; one in each part of a mixture."""
    from ftlib.metrics import captions

    references: dict[tuple[str, str], list[str]] = {}
    predictions: dict[tuple[str, str], str] = {}
    for record in records:
        known = references.setdefault(_picture(record), [])
        known += [text for text in record["references"] if text not in known]
        predictions.setdefault(_picture(record), record["prediction"])
    found = captions.measure(references, predictions)
    by_image = dict(zip(references, found.rows or (), strict=True))
    return replace(found, rows=[by_image[_picture(record)] for record in records])


def _picture(record: Record) -> tuple[str, str]:
    return record.get("dataset", ""), record["image"]


def _instruct(records: Sequence[Record], labels: Sequence[str], positive: str | None) -> Measured:
    """Scripts without spaces between words are compared by characters in BLEU."""
    from ftlib.metrics import text

    references = _references(records)
    written = "".join(one for accepted in references for one in accepted)
    unspaced = sum(bool(_UNSPACED.match(character)) for character in written)
    tokenize = "char" if 2 * unspaced > len(written) else "13a"
    return text.measure(
        _predictions(records), references, [record["image"] or record["id"] for record in records], tokenize
    )


def _detect(records: Sequence[Record], labels: Sequence[str], positive: str | None) -> Measured:
    from ftlib.data import located

    return located.measure_detections(records)


def _detection_results(records: Sequence[Record]) -> list[dict[str, Any]] | None:
    from ftlib.data import located

    return located.detection_results(records)


def _refer(records: Sequence[Record], labels: Sequence[str], positive: str | None) -> Measured:
    from ftlib.data import located

    return located.measure_referred(records)


def _segment(records: Sequence[Record], labels: Sequence[str], positive: str | None) -> Measured:
    from ftlib.data import located

    return located.measure_masks(records)


def _predictions(records: Sequence[Record]) -> list[str]:
    return [record["prediction"] for record in records]


def _references(records: Sequence[Record]) -> list[list[str]]:
    return [record["references"] for record in records]


def _have(records: Sequence[Record], name: str) -> bool:
    return all(name in record.get("facts", {}) for record in records)


def _facts(records: Sequence[Record], name: str, otherwise: str = "") -> list[Any]:
    """A fact of every row, or another field of it where it has no such fact."""
    return [record.get("facts", {}).get(name, record.get(otherwise)) for record in records]


def _groups(records: Sequence[Record], name: str) -> list[Any]:
    """What is resampled together: rows of one fact (an image, a document) of one dataset."""
    own = _facts(records, name, "image")
    return [
        (record["dataset"], fact) if "dataset" in record else fact for record, fact in zip(records, own, strict=True)
    ]


def _results(own: str, official: str, answer: str) -> Callable[[Sequence[Record]], list[dict[str, Any]]]:
    """A result file: the dataset's own id (a fact of the row, or the row's id) and the answer."""

    def results(records: Sequence[Record]) -> list[dict[str, Any]]:
        ids = _facts(records, own, "id")
        return [
            {official: _number(key), answer: record["prediction"]} for key, record in zip(ids, records, strict=True)
        ]

    return results


def _number(key: int | str) -> int | str:
    """Servers expect the numbers of the release, which a row's id holds as text."""
    return int(key) if isinstance(key, str) and key.isdecimal() else key


TASKS: dict[str, Task] = {
    "caption": Task(
        columns=("CIDEr-D", "BLEU-4", "METEOR", "ROUGE-L", "SPICE"),
        parse=str.strip,
        measure=_caption,
        submission=_results("image_id", "image_id", "caption"),
    ),
    "classify": Task(
        columns=("accuracy", "precision", "recall", "F1", "macro F1"),
        parse=str.strip,
        measure=_classification,
        closed=True,
    ),
    "detect": Task(
        columns=("AP", "AP50", "AP75"),
        parse=str.strip,
        measure=_detect,
        submission=_detection_results,
        fault=expected.boxes_fault,
    ),
    "docvqa": Task(
        columns=("anls", "anls_strict"),
        parse=str.strip,
        measure=_docvqa,
        submission=_results("questionId", "questionId", "answer"),
    ),
    "gqa": Task(
        columns=("accuracy", "binary", "open", "consistency"),
        parse=str.strip,
        measure=_gqa,
        submission=lambda records: [
            {"questionId": record["id"], "prediction": record["prediction"]} for record in records
        ],
        fault=expected.gqa_fault,
    ),
    "instruct": Task(columns=("exact match", "token F1", "BLEU"), parse=str.strip, measure=_instruct),
    "refer": Task(columns=("accuracy@.5",), parse=str.strip, measure=_refer, fault=expected.box_fault),
    "segment": Task(
        columns=("mIoU", "cIoU", "P@.5", "P@.7", "P@.9"), parse=str.strip, measure=_segment, fault=expected.mask_fault
    ),
    "vqa": Task(
        columns=("accuracy",),
        parse=str.strip,
        measure=_vqa,
        submission=_results("question_id", "question_id", "answer"),
        fault=expected.vqa_fault,
    ),
}
