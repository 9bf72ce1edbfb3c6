"""The interface of tasks: parsing of answers, metrics, and result files for challenge servers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ftlib.config.schema import LOSS, Evaluation
from ftlib.core.registry import TaskEntry
from ftlib.data.example import Example, InvalidRecord
from ftlib.errors import UserError

if TYPE_CHECKING:
    from ftlib.metrics.base import MetricResult


PredictionRecord = dict[str, Any]
"""A line of predictions.jsonl: id, image, prompt, prediction, references and, from the dataset, facts.

For a mixture also `dataset`, the part of the row; its id then starts with the part's name.
"""


def by_dataset(records: Sequence[PredictionRecord]) -> dict[str, list[PredictionRecord]]:
    """Return the records of each part of a mixture, with their original ids; empty without a mixture."""
    found: dict[str, list[PredictionRecord]] = {}
    for record in records:
        if name := record.get("dataset"):
            own = {field: value for field, value in record.items() if field != "dataset"}
            found.setdefault(name, []).append(own | {"id": record["id"].removeprefix(f"{name}/")})
    return found


ScoreFunction = Callable[[Sequence[PredictionRecord], Sequence[str], "str | None"], "MetricResult"]
_UNREGISTERED = TaskEntry("", "", {})


@dataclass(frozen=True)
class Task:
    """A task.

    Attributes:
        score: (records, the dataset's labels, the positive label if there is one) → metrics.
        parse_answer: generated text → answer.
        submission: records → the challenge's result file as JSON; None if the rows lack required fields.
        validate_target: row → why its answers cannot be trained on or scored; "" if they can.
        validate_image_size: (row, (width, height) of its image) → an error if they do not match, else "".
        keeps_whitespace: whether whitespace around answers is kept, as in code; else it is removed.
        answer_fields: (generated text, the character at which each token ends in it, the tokens' log-probabilities) →
            further fields of predictions.jsonl, such as scores of boxes.
        with_tokenizer: (`evaluation.tokenize`) → `score`, for tasks whose metrics have tokenizers to choose from.
        entry: its registry entry, with its name; set by `tasks.registry`.
    """

    score: ScoreFunction
    parse_answer: Callable[[str], str] = str.strip
    submission: Callable[[Sequence[PredictionRecord]], Any] | None = None
    validate_target: Callable[[Example], str] | None = None
    validate_image_size: Callable[[Example, tuple[int, int]], str] | None = None
    keeps_whitespace: bool = False
    answer_fields: Callable[[str, Sequence[int], Sequence[float]], dict[str, Any]] | None = None
    with_tokenizer: Callable[[str], ScoreFunction] | None = None
    entry: TaskEntry = _UNREGISTERED

    def measure(
        self, records: Sequence[PredictionRecord], labels: Sequence[str], evaluation: Evaluation
    ) -> MetricResult:
        """Score records with the settings of a config's `evaluation`."""
        score = self.with_tokenizer(evaluation.tokenize) if self.with_tokenizer else self.score
        return score(records, labels, evaluation.positive)

    @property
    def name(self) -> str:
        """The value of `task` in a config."""
        return self.entry.name

    @property
    def columns(self) -> tuple[str, ...]:
        """The metrics that tables show, the main metric first."""
        return tuple(self.entry.metrics)

    @property
    def closed_labels(self) -> bool:
        """Whether the answers are a closed set."""
        return self.entry.closed_labels

    def higher_is_better(self, metric: str) -> bool:
        """Return whether higher values of a metric, or of the loss, are better.

        Raises:
            UserError: the task has no such metric.
        """
        if metric == LOSS:
            return False
        if metric not in self.entry.metrics:
            problem = f"task {self.name}: unknown whether higher {metric} is better"
            raise UserError(problem, f"It has {', '.join(self.columns)}.")
        return self.entry.metrics[metric]["higher_is_better"]

    def validated(self, row: Example | InvalidRecord) -> Example | InvalidRecord:
        """Return the row with its answer as it is trained on, or an InvalidRecord."""
        if isinstance(row, InvalidRecord):
            return row
        if not self.keeps_whitespace:
            row = _stripped(row)
        if row.other_images and self.validate_image_size:
            return InvalidRecord(
                row.location, f"{len(row.images)} images, but answers of task {self.name} locate in one"
            )
        if self.validate_target is None or not (reason := self.validate_target(row)):
            return row
        return InvalidRecord(row.location, reason)


def _stripped(row: Example) -> Example:
    suffix = row.suffix.strip()
    return row if suffix == row.suffix else replace(row, suffix=suffix, stripped=True)


def expected_of(record: PredictionRecord) -> str:
    """Return the expected answer for exact comparison, without surrounding whitespace like predictions."""
    text: str = record["references"][0]
    return text.strip()


def predictions_of(records: Sequence[PredictionRecord]) -> list[str]:
    return [record["prediction"] for record in records]


def references_of(records: Sequence[PredictionRecord]) -> list[list[str]]:
    return [record["references"] for record in records]


def have_fact(records: Sequence[PredictionRecord], name: str) -> bool:
    return all(name in record.get("facts", {}) for record in records)


def facts_of(records: Sequence[PredictionRecord], name: str, otherwise: str = "") -> list[Any]:
    """Return a fact of every row; for rows without it, the field `otherwise`."""
    return [record.get("facts", {}).get(name, record.get(otherwise)) for record in records]


def groups_of(records: Sequence[PredictionRecord], name: str) -> list[Any]:
    """Return the groups for resampling: rows of one dataset with the same value of a fact (an image, a document)."""
    own = [record.get("facts", {}).get(name, image_of(record)) for record in records]
    return [
        (record["dataset"], fact) if "dataset" in record else fact for record, fact in zip(records, own, strict=True)
    ]


def image_of(record: PredictionRecord) -> str:
    """Return what a record asks about: the name of its image, the names of several, or its id without an image."""
    return "\n".join(record.get("images", ())) or record.get("image") or str(record["id"])


def result_file(own: str, official: str, answer: str, records: Sequence[PredictionRecord]) -> list[dict[str, Any]]:
    """Return a result file with the dataset's id (a fact of the row, or the row's id) and the answer of each row.

    Args:
        own: the name of the fact.
        official, answer: the names of both fields in the file.
    """
    ids = facts_of(records, own, "id")
    return [
        {official: official_id(key), answer: record["prediction"]} for key, record in zip(ids, records, strict=True)
    ]


_MAX_DIGITS = 18


def official_id(key: Any) -> Any:
    """Return an id as the number that servers expect; texts that are no plain numbers are returned unchanged."""
    return int(key) if isinstance(key, str) and key.isdecimal() and len(key) <= _MAX_DIGITS else key
