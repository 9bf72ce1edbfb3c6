"""Generate predictions for one split and score them; evaluate_run.py goes through the splits and datasets of a run.

`eval/<dataset>/<split>/<before|after>/` gets predictions.jsonl (a row's id, image, prompt, prediction, references,
score and fields that the metrics need), scores.json (see `metrics/summary.py`; settings, data, overlap with the
training rows) and, for tasks with a challenge server, submission.json. For a mixture, scores.json has `parts`, the
scores of each part, and every part has a submission.<part>.json; for instructions that are evaluated twice, see
`paired_records`. Until the evaluation is complete, predictions are stored in `<before|after>.partial/`; of several
processes, one evaluates.

Modules that import torch are imported where something is computed: an evaluation that is finished is read without it,
in a tenth of the time, and on a login node.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ftlib.config.identity import canonical_fields
from ftlib.config.schema import CHAT, Config
from ftlib.core import files, imports, jsonl, log
from ftlib.core.lease import compute_once
from ftlib.core.registry import TASKS, provider
from ftlib.data.dataset import PreparedDataset
from ftlib.data.example import Example
from ftlib.data.prompts import PromptTemplates, context_of, render_prompt, turn_of_answer
from ftlib.errors import UserError
from ftlib.evaluation.model import EvalModel
from ftlib.evaluation.threshold import Threshold, argmax_labels, choose_threshold, precision_recall, probabilities
from ftlib.hub.offline import offline
from ftlib.metrics.answers import add_answer_counts
from ftlib.metrics.comparability import answer_settings
from ftlib.metrics.summary import INTERVAL_METHOD, summary
from ftlib.metrics.uncertainty import confidence_intervals
from ftlib.tasks.base import PredictionRecord, by_dataset
from ftlib.tasks.registry import task_of

if TYPE_CHECKING:
    from ftlib.evaluation.inference import Prediction
    from ftlib.models.mask_codec import MaskCodec

_SCRATCH_NAME = "answers"


@offline()
def evaluate_split(
    request: EvaluationRequest, split: str, folder: Path, threshold: Threshold | None = None
) -> dict[str, Any] | None:
    """Evaluate one split into `folder`; an existing evaluation with the same settings is reused.

    Args:
        threshold: for a positive label that is predicted by its probability; None on the split that determines it.

    Returns:
        The content of scores.json. If it had to be computed, None in all processes of a job except the first.
    """
    validate_request(request, split)
    settings = evaluation_settings(request, split, threshold)
    if scores := cached_scores(folder, settings):
        log.info(f"{split}: already evaluated in {folder}")
        return scores
    if request.shared:
        return _shared_scores(request, split, folder, threshold, settings)
    scratch, label = _scratch_folder(request, folder, settings), f"{request.model.name} on {split}"

    def find() -> dict[str, Any] | None:
        return cached_scores(folder, settings)

    def compute() -> dict[str, Any] | None:
        if _has_predictions(folder, settings):
            return _score_again(request, folder, settings) if log.is_main_process() else None
        with imports.quick_imports():
            from ftlib.evaluation.inference import scratch_dir
        partial = scratch_dir(scratch / _SCRATCH_NAME, generation_settings(settings), lambda: bool(find()))
        if log.rank_and_world_size()[0] and find():
            return None  # the first process has already finished
        predictions = _predictions(request, split, partial, label)
        if predictions is None:
            return None
        scores = write_scores(request, split, folder, predictions, threshold)
        shutil.rmtree(partial, ignore_errors=True)
        return scores

    scores = compute_once(scratch, find, compute, label)
    with contextlib.suppress(OSError):
        scratch.rmdir()  # fails if another process uses it
    return scores if log.is_main_process() else None


def validate_request(request: EvaluationRequest, split: str) -> None:
    """Check before inference that the split can be scored.

    Raises:
        UserError: no rows, a positive label that no row has, a chat model with other prompts, no weights to decode
            masks.
    """
    request.prepared.require_rows([split])
    validate_settings(request.config, request.prepared)
    _require_one_prompt_form(request)


def write_scores(
    request: EvaluationRequest, split: str, folder: Path, predictions: Sequence[Prediction], threshold: Threshold | None
) -> dict[str, Any]:
    """Score the predictions of a split and write them to `folder`.

    Args:
        predictions: for the rows, in order, followed by those for `without_context_rows`.

    Returns:
        The content of scores.json.
    """
    rows, settings = request.prepared.rows(split), evaluation_settings(request, split, threshold)
    codec = _mask_codec(request.config)
    own = predictions[: len(rows)]
    records, found = build_predictions(request.config, request.prepared.labels, rows, own, split, threshold)
    for row, record in zip(rows, records, strict=True):
        if "tool_calls" in turn_of_answer(row.suffix):  # a model answers in the words of its template
            ids = request.model.processor.encode_answer(row.suffix)
            record["references"] = [request.model.processor.decode(ids[:-1]).strip()]
    add_without_context_predictions(records, predictions[len(rows) :])
    if codec:
        from ftlib.evaluation.masks import with_masks

        records = with_masks(records, codec)
    scores = _scores(request, records, settings, train_overlap(rows, request.trained_on)) | found
    if found:
        scores["remarks"].append(Threshold(**found["threshold"]).describe(split))
    _publish(folder, records, scores, request.config)
    return scores


def _shared_folder(request: EvaluationRequest, folder: Path, settings: dict[str, Any]) -> Path:
    """Return the shared folder from which `folder` is copied; without one, `folder` itself."""
    if request.shared is None:
        return folder
    decisive = [
        settings,
        canonical_fields(request.model.config.model, {"Model": ("dropout",)}),
        request.prepared.labels,
        *(["scores of boxes"] if task_of(request.config).answer_fields else []),  # older evaluations lack them
    ]
    return request.shared / files.json_sha256(decisive)[:16] / "evaluation"


def _scratch_folder(request: EvaluationRequest, folder: Path, settings: dict[str, Any]) -> Path:
    made = _shared_folder(request, folder, settings)
    return made.with_name(f"{made.name}.partial")


def _shared_scores(
    request: EvaluationRequest, split: str, folder: Path, threshold: Threshold | None, settings: dict[str, Any]
) -> dict[str, Any] | None:
    """Evaluate in the shared folder, or reuse its evaluation."""
    shared = _shared_folder(request, folder, settings)
    scores = evaluate_split(replace(request, shared=None), split, shared, threshold)
    if scores is None:
        return None
    with files.atomic_directory(folder) as temporary:
        shutil.copytree(shared, temporary, ignore=shutil.ignore_patterns(files.COMPLETE_MARKER), dirs_exist_ok=True)
    return scores


def validate_settings(config: Config, prepared: PreparedDataset) -> MaskCodec | None:
    """Check the evaluation settings, independent of the split.

    Returns:
        The mask decoder for task segment, else None.

    Raises:
        UserError: a positive label that is not an answer of the dataset; a tokenizer for a task without one; no
            weights for masks, or wrong ones.
    """
    positive, labels, tokenize = config.evaluation.positive, prepared.labels, config.evaluation.tokenize
    if tokenize != "auto" and not task_of(config).with_tokenizer:
        raise UserError(f"evaluation.tokenize: {tokenize!r}: task {config.task} has no tokenizer to choose")
    if positive is not None and positive not in labels:
        shown = ", ".join(labels[:10])
        raise UserError(f"evaluation.positive: {positive!r} is not an answer of the dataset ({shown})")
    return _mask_codec(config)


def _require_one_prompt_form(request: EvaluationRequest) -> None:
    """Check that model and dataset both use `prompt: chat`, or neither: the answers end differently."""
    own, other = request.model.config.data.prompt, request.config.data.prompt
    if (own == CHAT) != (other == CHAT):
        raise UserError(f"data.prompt: the model uses {own!r}, this dataset {other!r}")


def _mask_codec(config: Config) -> MaskCodec | None:
    if config.task != "segment":
        return None
    if config.evaluation.mask_decoder is None:
        remedy = "Set it to the path of vae-oid.npz (gs://big_vision/paligemma/vae-oid.npz)."
        raise UserError("evaluation.mask_decoder: task segment needs the weights that decode masks", remedy)
    from ftlib.models.mask_codec import MaskCodec

    return MaskCodec.load(Path(config.evaluation.mask_decoder))


def fit_threshold(request: EvaluationRequest, folder: Path) -> Threshold | None:
    """Return the threshold from the valid rows if the config needs one; evaluates valid if necessary.

    Args:
        folder: folder of the evaluation of valid.
    """
    evaluation = request.config.evaluation
    if evaluation.decode != "choose" or evaluation.positive is None:
        return None
    return Threshold(**evaluate_on_all_ranks(request, "valid", folder)["threshold"])


def evaluate_on_all_ranks(request: EvaluationRequest, split: str, folder: Path) -> dict[str, Any]:
    """Call `evaluate_split` and return the scores in every process of the job.

    Raises:
        RuntimeError: no new predictions or scores for ten minutes.
    """
    from ftlib.evaluation.inference import count_predictions, wait_for_tasks

    settings = evaluation_settings(request, split, None)
    predictions = _scratch_folder(request, folder, settings) / _SCRATCH_NAME
    scores = evaluate_split(request, split, folder)
    while not scores:
        known = count_predictions(predictions)
        wait_for_tasks(
            lambda known=known: cached_scores(folder, settings) or count_predictions(predictions) > known,  # type: ignore[misc]
            str(folder),
        )
        scores = cached_scores(folder, settings)
    return scores


def _predictions(request: EvaluationRequest, split: str, partial: Path, label: str) -> list[Prediction] | None:
    """Return the predictions for the rows, followed by those for the rows without their context."""
    rows: Sequence[Example] = request.prepared.rows(split)
    templates = request.config.data.templates
    if request.without_context:
        rows = [*rows, *without_context_rows(rows, templates)]
    prompts = [render_prompt(row, templates) for row in rows]
    labels, root = request.prepared.labels, request.prepared.root
    max_pixels, answer_fields = request.config.data.max_pixels, task_of(request.config).answer_fields
    from ftlib.evaluation.inference import generate_predictions

    return generate_predictions(
        request.model, request.config.evaluation, labels, rows, prompts, root, partial, label, max_pixels, answer_fields
    )


def _scores(
    request: EvaluationRequest,
    records: list[PredictionRecord],
    settings: dict[str, Any],
    learned: dict[str, Any] | None,
) -> dict[str, Any]:
    """scores.json."""
    scores = {**_summary(request, records), "settings": settings, "training_overlap": learned}
    twice = paired_records(records)
    if parts := by_dataset(records) | twice:
        scores["parts"] = {name: _summary(request, own) for name, own in parts.items()}
    for record, bare in zip(*twice.values(), strict=True):
        record[WITHOUT_CONTEXT_FIELD]["score"] = bare["score"]
    if learned and settings["split"] != "train" and (count := learned["rows_with_trained_images"]):
        scores["remarks"].append(f"{count} of {len(records)} rows have images that the model was trained on.")
    if request.without_context and not twice:
        scores["remarks"].append("No row has a context in its prompt, so none was evaluated without it.")
    if cut := sum("cut" in record for record in records):
        scores["remarks"].append(
            f"{cut} of {len(records)} prompts were too long for the model and were truncated at the start."
        )
    return scores


def _summary(request: EvaluationRequest, records: list[PredictionRecord]) -> dict[str, Any]:
    """Return the entry of scores.json for all rows or a part; also sets the score of every record."""
    task = task_of(request.config)
    measured = task.measure(records, request.prepared.labels, request.config.evaluation)
    for record, score in zip(records, measured.rows or (), strict=measured.rows is not None):
        record["score"] = score
    found = summary(measured, confidence_intervals(measured))
    evaluation, generated = request.config.evaluation, request.config.evaluation.decode == "generate"
    if generated:
        labels = request.prepared.labels if task.closed_labels else ()
        add_answer_counts(found, records, labels, evaluation.max_new_tokens)
    return {
        **found,
        "higher_is_better": task.higher_is_better(measured.headline),
    }


def _publish(folder: Path, records: list[PredictionRecord], scores: dict[str, Any], config: Config) -> None:
    """Write an evaluation. URLs in texts of the data and in answers are not masked, because these are scored again."""
    submission = task_of(config).submission
    datasets = by_dataset(records) or {"": records}
    results = {name: submission(own) for name, own in datasets.items()} if submission else {}
    with files.atomic_directory(folder) as temporary:
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        files.write_text(temporary / "predictions.jsonl", lines, urls=False)
        for name, result in results.items():
            if result is not None:
                text = json.dumps(result, ensure_ascii=False)
                files.write_text(temporary / f"submission{name and '.'}{name}.json", text, urls=False)
        files.write_json(temporary / "scores.json", scores, urls=False)  # its settings name all labels


# Overlap of the evaluated rows with the training rows.


def train_overlap(rows: Sequence[Example], trained_on: Sequence[Example]) -> dict[str, Any] | None:
    """Return how many rows, and images by content, the model was trained on; None for a base model."""
    if not trained_on:
        return None
    images = {digest for row in trained_on for _, _, digest in row.image_files if digest}
    questions = {_content(row) for row in trained_on}
    return {
        "rows": sum(_content(row) in questions for row in rows),
        "rows_with_trained_images": sum(any(digest in images for _, _, digest in row.image_files) for row in rows),
    }


def _content(row: Example) -> tuple[str, str, str, str]:
    return row.digest, row.prefix, context_of(row), row.suffix


# Build the lines of predictions.jsonl.

CURVE_POINTS = 200


def build_predictions(
    config: Config,
    labels: Sequence[str],
    rows: Sequence[Example],
    answers: Sequence[Prediction],
    split: str,
    threshold: Threshold | None,
) -> tuple[list[PredictionRecord], dict[str, Any]]:
    """Return the lines of predictions.jsonl without scores, and the entry of scores.json for a threshold.

    Args:
        labels: the dataset's answers.
        threshold: for a positive label; None: chosen here, on `split`.
    """
    evaluation = config.evaluation
    if evaluation.decode == "generate":
        return [_record(row, config, answer["text"], answer) for row, answer in zip(rows, answers, strict=True)], {}
    shares = probabilities([answer["likelihoods"] for answer in answers])
    found: dict[str, Any] = {}
    if evaluation.positive is not None:
        scores = shares[:, labels.index(evaluation.positive)]
        truth = np.array([row.suffix == evaluation.positive for row in rows])
        threshold = threshold or choose_threshold(scores, truth, evaluation.min_precision, split)
        found = {"threshold": threshold.to_json(), "precision_recall": _curve(scores, truth)}
    records = []
    texts = argmax_labels(shares, labels, evaluation.positive, threshold)
    for row, text, answer, row_shares in zip(rows, texts, answers, shares, strict=True):
        likely = {label: round(float(share), 12) for label, share in zip(labels, row_shares, strict=True)}
        records.append(_record(row, config, text, answer) | {"probabilities": likely})
    return records, found


def _curve(scores: Any, truth: Any) -> dict[str, list[float]] | None:
    """Return at most 200 points of the precision/recall curve; None without a row with the positive label."""
    if not truth.any():
        return None
    columns = precision_recall(scores, truth)
    indices = np.unique(np.linspace(0, len(columns[0]) - 1, CURVE_POINTS).round().astype(int))
    names = ("threshold", "precision", "recall")
    return {name: [round(float(x), 6) for x in column[indices]] for name, column in zip(names, columns, strict=True)}


def _record(row: Example, config: Config, text: str, answer: Prediction) -> PredictionRecord:
    return {
        "id": row.id,
        "image": row.image,
        **({"images": row.images} if row.other_images else {}),
        "prompt": render_prompt(row, config.data.templates),
        "prediction": task_of(config).parse_answer(text),
        "references": list(row.references) or [row.suffix],
        **({"facts": row.facts} if row.facts else {}),
        **({"dataset": row.dataset} if row.dataset else {}),
        **({"cut": True} if answer.get("cut") else {}),
        **({"finish_reason": answer["finish_reason"]} if "finish_reason" in answer else {}),
        **answer.get("confidence", {}),
    }


# Closed-book baseline: instructions are evaluated a second time without their context.
#
# A line of predictions.jsonl gets `without_context`, the closed-book answer and its score; scores.json gets two
# `parts`, the scores with and without context, over the rows that have a context.

WITH, WITHOUT = "with context", "without context"
WITHOUT_CONTEXT_FIELD = "without_context"


def without_context_rows(rows: Sequence[Example], templates: PromptTemplates) -> Iterator[Example]:
    """Yield the rows whose prompt shows a context, without the context and with a different id."""
    for row in rows:
        without = replace(row, id=_without_context_id(row.id), facts={**row.facts, "input": ""})
        if context_of(row) and render_prompt(without, templates) != render_prompt(row, templates):
            yield without


def add_without_context_predictions(records: Sequence[PredictionRecord], answers: Sequence[Prediction]) -> None:
    """Add the answers to `without_context_rows` to the records of their rows."""
    by_id = {answer["id"]: answer for answer in answers}
    for record in records:
        if answer := by_id.get(_without_context_id(record["id"])):
            record[WITHOUT_CONTEXT_FIELD] = {"prediction": answer["text"].strip(), **answer.get("confidence", {})}


def paired_records(records: Sequence[PredictionRecord]) -> dict[str, list[PredictionRecord]]:
    """Return the records that were evaluated twice: unchanged, and with the closed-book answer; empty if there are
    none."""
    both = [record for record in records if WITHOUT_CONTEXT_FIELD in record]
    without = [{**record, **record[WITHOUT_CONTEXT_FIELD]} for record in both]
    return {WITH: both, WITHOUT: without} if both else {}


def _without_context_id(name: str) -> str:
    return f"{WITHOUT}: {name}"


# An evaluation request, and the settings that its scores depend on.

_SCORING_SETTINGS = ("threshold", "positive", "min_precision", "mask_decoder", "tokenize")
"""Settings that affect scores, but not predictions."""


@dataclass(frozen=True)
class EvaluationRequest:
    """A request to evaluate a model on a dataset.

    Attributes:
        config: provides task, prompt and settings.
        trained_on: the training rows of the model; empty for a base model.
        shared: a folder for evaluations that several runs use, those of a base model.
        without_context: whether rows with a context are evaluated a second time without it.
    """

    model: EvalModel
    config: Config
    prepared: PreparedDataset
    trained_on: Sequence[Example] = ()
    shared: Path | None = None
    without_context: bool = False


def cached_scores(folder: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """Return the scores of an existing evaluation with the same settings, or None."""
    if not files.is_complete(folder):
        return None
    scores: dict[str, Any] = files.read_json(folder / "scores.json")
    return scores if _without_paths(scores["settings"]) == _without_paths(settings) and _is_current(scores) else None


def _is_current(scores: dict[str, Any]) -> bool:
    """Whether scores were computed by the rule and with the intervals of this version of ftlib."""
    task = TASKS.get(scores["settings"]["task"])  # a plugin's identity is among the settings
    rule = task.rule if task else ""
    return scores["interval_method"] == INTERVAL_METHOD and rule in ("", scores["rule"].split(", ")[0])


def _has_predictions(folder: Path, settings: dict[str, Any]) -> bool:
    """Whether there is an evaluation with these settings, whose predictions can be scored again by today's rule."""
    if not files.is_complete(folder):
        return False
    return _without_paths(files.read_json(folder / "scores.json")["settings"]) == _without_paths(settings)


def _score_again(request: EvaluationRequest, folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Score the predictions of an evaluation that an older version of ftlib scored by another rule."""
    old, records = files.read_json(folder / "scores.json"), jsonl.read_jsonl_log(folder / "predictions.jsonl")
    log.info(f"{folder}: scored by {old['rule']} before; the same predictions are scored again")
    scores = _scores(request, records, settings, old["training_overlap"])
    scores |= {name: old[name] for name in ("threshold", "precision_recall") if name in old}
    if "threshold" in old:
        scores["remarks"].append(Threshold(**old["threshold"]).describe(settings["split"]))
    _publish(folder, records, scores, request.config)
    return scores


def _without_paths(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings without paths, because a store may be moved; `weights` identifies the model."""
    return {**settings, "model": Path(settings["model"]).name}


def evaluation_settings(request: EvaluationRequest, split: str, threshold: Threshold | None) -> dict[str, Any]:
    """Return all settings that the scores depend on."""
    evaluation = request.config.evaluation
    chat = request.model.processor.warning if request.config.data.prompt == CHAT else ""
    return {
        "model": request.model.name,
        "weights": request.model.weights_hash,
        "loaded": canonical_fields(request.model.config.model, {"Model": ("base", "revision", "attention", "dropout")}),
        "task": request.config.task,
        **_plugin_settings(request),
        "prompt": request.config.data.prompt,
        **({"max_pixels": request.config.data.max_pixels} if request.config.data.max_pixels else {}),
        **({"prompts": request.config.data.templates} if request.config.data.parts else {}),
        "split": split,
        "fingerprint": request.prepared.metadata["splits"][split]["fingerprint"],
        "trained_on": files.json_sha256(sorted(row.digest for row in request.trained_on))[:16],
        **answer_settings(evaluation),
        "mask_decoder": files.file_sha256(Path(evaluation.mask_decoder)) if evaluation.mask_decoder else None,
        "labels": request.prepared.labels if evaluation.decode == "choose" else None,
        "threshold": threshold.to_json() if threshold else None,
        **({WITHOUT_CONTEXT_FIELD: True} if request.without_context else {}),
        **({"chat_template": chat} if chat else {}),
    }


def _plugin_settings(request: EvaluationRequest) -> dict[str, Any]:
    """Return the hashes of the plugins of task and model family, if any."""
    task, model = request.config, request.model.config.model
    found = {
        "task_plugin": provider("task", task.task, task.plugins),
        "model_plugin": provider("model", model.family, model.plugins),
    }
    return {name: plugin.identity for name, plugin in found.items() if plugin}


def generation_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that predictions depend on."""
    return {name: value for name, value in settings.items() if name not in _SCORING_SETTINGS}
