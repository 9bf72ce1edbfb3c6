"""What a task is: how an answer is read, which metrics judge it and what a challenge server takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ftlib.config.schema import LOSS
from ftlib.core.registry import TaskEntry
from ftlib.data.example import Example, InvalidRecord
from ftlib.errors import UserError

if TYPE_CHECKING:
    from ftlib.metrics.base import MetricResult


PredictionRecord = dict[str, Any]
"""A line of predictions.jsonl: id, image, prompt, prediction, references and, from the dataset, facts.

Of a mixture also `dataset`, the part that a row comes from; its id then begins with the part's name.
"""


def by_dataset(records: Sequence[PredictionRecord]) -> dict[str, list[PredictionRecord]]:
    """The rows of each part of a mixture, as they were without the others; none if the rows are of no mixture."""
    found: dict[str, list[PredictionRecord]] = {}
    for record in records:
        if name := record.get("dataset"):
            own = {field: value for field, value in record.items() if field != "dataset"}
            found.setdefault(name, []).append(own | {"id": record["id"].removeprefix(f"{name}/")})
    return found


_UNREGISTERED = TaskEntry("", "", {})


@dataclass(frozen=True)
class Task:
    """A task.

    Attributes:
        score: (records, the dataset's labels, the positive label if one is named) → findings.
        parse_answer: generated text → answer.
        submission: records → the challenge's result file, as JSON; None where the rows lack what it needs.
        validate_target: row of a dataset → why its answers could not be learned or judged; "" if they can.
        validate_image_size: row of a dataset, width and height of its image → why they do not belong together; "" if
            they do.
        keeps_whitespace: whether space around answers is learned, as in code and in texts that go on; else it is taken
            off.
        entry: its name and what else is known of it without importing it; `tasks.registry` sets it.
    """

    score: Callable[[Sequence[PredictionRecord], Sequence[str], str | None], MetricResult]
    parse_answer: Callable[[str], str] = str.strip
    submission: Callable[[Sequence[PredictionRecord]], Any] | None = None
    validate_target: Callable[[Example], str] | None = None
    validate_image_size: Callable[[Example, tuple[int, int]], str] | None = None
    keeps_whitespace: bool = False
    entry: TaskEntry = _UNREGISTERED

    @property
    def name(self) -> str:
        """As `task` in a config."""
        return self.entry.name

    @property
    def columns(self) -> tuple[str, ...]:
        """The metrics of tables, the one that stands for all others first."""
        return tuple(self.entry.metrics)

    @property
    def closed_labels(self) -> bool:
        """Whether the answers are a closed set."""
        return self.entry.closed_labels

    def higher_is_better(self, metric: str) -> bool:
        """The direction of one of its metrics, or of the loss.

        Raises:
            UserError: it has no such metric.
        """
        if metric == LOSS:
            return False
        if metric not in self.entry.metrics:
            problem = f"task {self.name}: its metrics do not say whether higher {metric} is better"
            raise UserError(problem, f"It has {', '.join(self.columns)}.")
        return self.entry.metrics[metric]["higher_is_better"]

    def validated(self, row: Example | InvalidRecord) -> Example | InvalidRecord:
        """The row with its answer as it is learned, or the record that it is no use as."""
        if isinstance(row, InvalidRecord):
            return row
        if not self.keeps_whitespace:
            row = _stripped(row)
        if self.validate_target is None or not (reason := self.validate_target(row)):
            return row
        return InvalidRecord(row.location, reason)


def _stripped(row: Example) -> Example:
    suffix = row.suffix.strip()
    return row if suffix == row.suffix else replace(row, suffix=suffix, stripped=True)


def expected_of(record: PredictionRecord) -> str:
    """What a prediction must be, letter for letter; like it without surrounding space."""
    text: str = record["references"][0]
    return text.strip()


def predictions_of(records: Sequence[PredictionRecord]) -> list[str]:
    return [record["prediction"] for record in records]


def references_of(records: Sequence[PredictionRecord]) -> list[list[str]]:
    return [record["references"] for record in records]


def have_fact(records: Sequence[PredictionRecord], name: str) -> bool:
    return all(name in record.get("facts", {}) for record in records)


def facts_of(records: Sequence[PredictionRecord], name: str, otherwise: str = "") -> list[Any]:
    """A fact of every row, or another field of it where it has no such fact."""
    return [record.get("facts", {}).get(name, record.get(otherwise)) for record in records]


def groups_of(records: Sequence[PredictionRecord], name: str) -> list[Any]:
    """What is resampled together: rows of one fact (an image, a document) of one dataset."""
    own = facts_of(records, name, "image")
    return [
        (record["dataset"], fact) if "dataset" in record else fact for record, fact in zip(records, own, strict=True)
    ]


def result_file(own: str, official: str, answer: str, records: Sequence[PredictionRecord]) -> list[dict[str, Any]]:
    """A result file: the dataset's own id (a fact of the row, or the row's id) and the answer.

    Args:
        own: the fact.
        official, answer: the names of both in the file.
    """
    ids = facts_of(records, own, "id")
    return [
        {official: official_id(key), answer: record["prediction"]} for key, record in zip(ids, records, strict=True)
    ]


_MAX_DIGITS = 18


def official_id(key: Any) -> Any:
    """Servers expect the numbers of the release, which a row's id holds as text. Longer ones are no numbers of one."""
    return int(key) if isinstance(key, str) and key.isdecimal() and len(key) <= _MAX_DIGITS else key
