"""The table of metrics against what the metrics compute."""

from __future__ import annotations

import pytest

from ftlib.core.metric_table import METRICS, metric_info
from ftlib.core.registry import TASKS
from ftlib.metrics import anls, captions, classification, coco_ap, gqa, segmentation, text, vqa_accuracy
from ftlib.metrics.base import MetricResult
from ftlib.metrics.formatting import format_interval, format_value, unit_of

LABELS = ["cat", "dog"]
MEASURED: dict[str, MetricResult] = {
    "vqa": vqa_accuracy.measure(["a"], [["a"] * 10], ["x"]),
    "docvqa": anls.measure(["a"], [["a"]], ["x"]),
    "caption": captions.measure({1: ["a cat"], 2: ["a dog"]}, {1: "a cat", 2: "a cat"}),
    "classify": classification.measure(LABELS, LABELS, LABELS, positive="cat"),
    "instruct": text.measure(["a"], [["a"]]),
    "refer": coco_ap.accuracy([(0, 0, 1, 1)], [(0, 0, 1, 1)]),
    "detect": coco_ap.average_precision([1], [coco_ap.GroundTruthObject(1, 1, 1, (0, 0, 9, 9), 81)], []),
}
RULES = {name: found.rule for name, found in MEASURED.items()} | {"gqa": gqa.RULE, "segment": segmentation.RULE}


@pytest.mark.parametrize("task", METRICS)
def test_rules_are_those_of_the_metrics(task: str) -> None:
    assert RULES[task].split(", ")[0] == METRICS[task].rule == TASKS[task].rule
    assert all("higher_is_better" in facts for facts in TASKS[task].metrics.values())


@pytest.mark.parametrize("task", MEASURED)
def test_every_metric_is_in_the_table(task: str) -> None:
    for name in MEASURED[task].values():
        info = metric_info(task, name)
        assert info and info.rule, name
        assert info.unit == MEASURED[task].unit or name == "CIDEr-D"
    assert MEASURED[task].headline == next(iter(METRICS[task].columns))


def test_a_percentage_has_its_sign_everywhere() -> None:
    assert (format_value(72, "percent"), format_interval((63.1, 79.2), "percent")) == ("72.00 %", "63.10–79.20 %")
    assert unit_of({"rule": "gqa/1.2"}, "distribution") == "number"
    assert unit_of({"rule": "mine", "unit": "percent"}, "x") == "percent"
