"""What every metric means: its rule, unit, range, direction, and the program whose numbers it reproduces.

`ftlib score --help`, reports and the table in docs/evaluation.md come from here. Metrics of plugins are not in it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Unit = Literal["percent", "fraction", "number"]


@dataclass(frozen=True)
class MetricInfo:
    """A metric of a task.

    Attributes:
        rule: what is counted, in a few words.
        program: whose numbers are reproduced; "" if there is no such program.
        upper: the largest possible value; None without a limit. The smallest is 0.
    """

    rule: str
    program: str
    unit: Unit = "fraction"
    upper: float | None = 1.0
    higher_is_better: bool = True


@dataclass(frozen=True)
class TaskMetrics:
    """The metrics of a task.

    Attributes:
        rule: name and version of the rules; scores.json begins its `rule` with it. A new version makes `ftlib evaluate`
            score existing predictions again.
        columns: the metrics in tables and rankings, the headline first.
        others: the other metrics.
    """

    rule: str
    columns: dict[str, MetricInfo]
    others: dict[str, MetricInfo]


def _percent(rule: str, program: str) -> MetricInfo:
    return MetricInfo(rule, program, "percent", 100.0)


_VQA = "GT-Vision-Lab/VQA at a013f00"
_RRC = "Robust Reading Competition, challenge 17"
_GQA = "GQA's eval.py 1.2"
_COCO_CAPTION = "coco-caption (pycocoevalcap)"
_COCO = "pycocotools 2.0"
_SKLEARN = "scikit-learn, labels = the classes in the references, zero_division=0"

METRICS: dict[str, TaskMetrics] = {
    "vqa": TaskMetrics(
        "vqa-accuracy/a013f00",
        {"accuracy": _percent("min(1, matching annotators / 3), mean over leaving out one annotator", _VQA)},
        {},
    ),
    "docvqa": TaskMetrics(
        "anls/rrc-ch17",
        {
            "anls": MetricInfo("1 − edit distance / length to the nearest answer, below .5 counts 0", _RRC),
            "anls_strict": MetricInfo("the paper's formula: exactly .5 counts 0 too", "the package anls"),
        },
        {},
    ),
    "gqa": TaskMetrics(
        "gqa/1.2",
        {
            "accuracy": _percent("share of balanced questions with exactly the reference as answer", _GQA),
            "binary": _percent("accuracy of questions whose structural type is not query", _GQA),
            "open": _percent("accuracy of questions of structural type query", _GQA),
            "consistency": _percent("correct among the questions that correctly answered ones entail", _GQA),
        },
        {
            "validity": _percent("share of answers in the scope of their question", _GQA),
            "plausibility": _percent("share of answers that make sense of the world", _GQA),
            "distribution": MetricInfo(
                "chi-square of predicted against true answers, by group", _GQA, "number", None, higher_is_better=False
            ),
        },
    ),
    "caption": TaskMetrics(
        "coco-caption/1",
        {
            "CIDEr-D": MetricInfo(
                "tf-idf agreement with the references, n = 1…4, 0 to 10", _COCO_CAPTION, "number", 10.0
            ),
            "BLEU-4": MetricInfo("corpus BLEU of 1- to 4-grams, closest reference length", _COCO_CAPTION),
            "METEOR": MetricInfo("METEOR 1.5: aligned words, stems, synonyms", _COCO_CAPTION),
            "ROUGE-L": MetricInfo("longest common subsequence, F with β = 1.2", _COCO_CAPTION),
            "SPICE": MetricInfo("F1 of scene-graph tuples", _COCO_CAPTION),
        },
        {f"BLEU-{n}": MetricInfo(f"corpus BLEU of up to {n}-grams", _COCO_CAPTION) for n in (1, 2, 3)},
    ),
    "detect": TaskMetrics(
        "coco-box-ap/pycocotools-2.0",
        {
            "AP": MetricInfo("average precision, mean over IoU .50 to .95", _COCO),
            "AP50": MetricInfo("average precision at IoU .50", _COCO),
            "AP75": MetricInfo("average precision at IoU .75", _COCO),
        },
        {f"AR-{n}": MetricInfo(f"recall with at most {n} detections per image", _COCO) for n in (1, 10, 100)},
    ),
    "refer": TaskMetrics(
        "box-accuracy@.5/1",
        {"accuracy@.5": MetricInfo("share of boxes with an IoU of .5 or more", "")},
        {},
    ),
    "segment": TaskMetrics(
        "referring-segmentation/1",
        {
            "mIoU": MetricInfo("mean of the rows' IoU; no mask counts 0", "big_vision's evaluation of PaliGemma"),
            "cIoU": MetricInfo("sum of intersections / sum of unions", "LAVT and older papers"),
            **{f"P@.{n}": MetricInfo(f"share of masks with an IoU of .{n} or more", "") for n in (5, 7, 9)},
        },
        {},
    ),
    "classify": TaskMetrics(
        "classification/2",
        {
            "accuracy": MetricInfo("share of answers that equal the label", _SKLEARN),
            "precision": MetricInfo("of the positive label; 0 if it is never the answer", _SKLEARN),
            "recall": MetricInfo("of the positive label", _SKLEARN),
            "F1": MetricInfo("of the positive label", _SKLEARN),
            "macro F1": MetricInfo("mean over the classes in the references", _SKLEARN),
        },
        {
            f"{average} {name}": MetricInfo(
                "mean over the classes in the references" + ", by their rows" * (average == "weighted"), _SKLEARN
            )
            for average, name in (
                ("weighted", "F1"),
                ("macro", "precision"),
                ("weighted", "precision"),
                ("macro", "recall"),
                ("weighted", "recall"),
            )
        },
    ),
    "instruct": TaskMetrics(
        "squad-2.0+strict-1",
        {
            "exact match": _percent("equal without case, ASCII punctuation, articles", "SQuAD 2.0's evaluation script"),
            "strict match": _percent("equal without case and final full stop; numbers by value, with their sign", ""),
            "token F1": _percent("F1 of the words in SQuAD's normal form", "SQuAD 2.0's evaluation script"),
            "BLEU": _percent("corpus BLEU; its signature is in the rule", "sacrebleu"),
        },
        {},
    ),
}


def metric_info(task: str, name: str) -> MetricInfo | None:
    """The facts about a metric; of a breakdown (`answer type: number`), those of the metric that it divides.

    Args:
        task: its name in a config; None for metrics that are not in the table, such as a plugin's.
    """
    return _info(METRICS.get(task), name)


def metric_info_of_rule(rule: str, name: str) -> MetricInfo | None:
    """The same, for the `rule` of scores.json."""
    return _info(next((table for table in METRICS.values() if table.rule == rule.split(", ")[0]), None), name)


def _info(table: TaskMetrics | None, name: str) -> MetricInfo | None:
    if table is None:
        return None
    known = {**table.columns, **table.others}
    kind, colon, _ = name.removeprefix("mask ").partition(": ")
    return known.get(kind) or (next(iter(known.values())) if colon else None)


def upper_limit(task: str, name: str) -> float | None:
    """The largest possible value of a metric; None if unknown or without limit."""
    info = metric_info(task, name)
    return info.upper if info else None


def metric_lines(task: str) -> list[str]:
    """A line of text for each metric of a task, for --help."""
    table = METRICS[task]
    return [f"{name}: {describe_metric(info)}" for name, info in {**table.columns, **table.others}.items()]


def describe_metric(info: MetricInfo) -> str:
    """Rule, unit, direction and program of a metric in one line."""
    direction = "higher is better" if info.higher_is_better else "lower is better"
    return "; ".join(filter(None, [info.rule, info.unit, direction, info.program]))


def markdown_table() -> str:
    """The table of docs/evaluation.md."""
    lines = ["| task | metric | rule | unit | better | reproduces |", "|---|---|---|---|---|---|"]
    for task, table in METRICS.items():
        for name, info in {**table.columns, **table.others}.items():
            better = "higher" if info.higher_is_better else "lower"
            lines.append(f"| `{task}` | {name} | {info.rule} | {info.unit} | {better} | {info.program or '–'} |")
    return "\n".join(lines)
