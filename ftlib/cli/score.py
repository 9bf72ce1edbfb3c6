"""Score result files in a dataset's official format: no model, no GPU.

  vqa       --references QUESTIONS.json ANNOTATIONS.json --predictions RESULTS.json
  docvqa    --references val_v1.0.json --predictions SUBMISSION.json
  gqa       --references QUESTIONS.json [--choices CHOICES.json] --predictions PREDICTIONS.json
  caption   --references captions_val2014.json --predictions RESULTS.json
  detect    --references instances_val2017.json --predictions DETECTIONS.json
  refer     --references REFERENCES.jsonl --predictions PREDICTIONS.jsonl     boxes of referring expressions
  segment   --references REFERENCES.jsonl --predictions PREDICTIONS.jsonl     masks of referring expressions
  classify  --references REFERENCES.jsonl --predictions PREDICTIONS.jsonl [--positive LABEL]
  text      --references REFERENCES.jsonl --predictions PREDICTIONS.jsonl [--tokenize NAME]

With --against, a second result file for the same references: the differences, with a paired test.

JSONL: references `{"id": …, "references": […]}` (or `"suffix": …`), predictions `{"id": …, "prediction": …}`; rows
with the same `image` are one unit of the confidence intervals. Empty and repeated answers are counted, and in ftlib's
own predictions.jsonl those that were cut off.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ftlib import api
from ftlib.cli import arguments
from ftlib.core import log
from ftlib.core.metric_table import metric_lines
from ftlib.core.registry import TASKS
from ftlib.metrics.formatting import format_difference_interval
from ftlib.metrics.summary import format_summary
from ftlib.tasks.score_files import SCORERS


def main(argv: list[str]) -> int:
    """`ftlib score TASK --references FILE… --predictions FILE [--against FILE] [--json]`"""
    parsed = _parser().parse_args(argv)
    scores = api.score(
        parsed.task,
        parsed.references,
        parsed.predictions,
        against=parsed.against,
        intervals=not parsed.no_intervals,
        choices=parsed.choices,
        positive=parsed.positive,
        tokenize=parsed.tokenize,
    )
    log.result(format_summary(scores))
    if parsed.against:
        log.result(_table(parsed.against, scores["against"]))
    if parsed.json:
        log.print_json(scores)
    return 0


def _parser() -> argparse.ArgumentParser:
    command = arguments.make_parser("score", f"{__doc__}\n{_metrics()}")
    command.add_argument("task", choices=list(SCORERS), help="determines file format and metrics")
    command.add_argument(
        "--references", type=Path, nargs="+", required=True, metavar="FILE", help="files of the dataset's release"
    )
    command.add_argument("--predictions", type=Path, required=True, metavar="FILE", help="the result file")
    command.add_argument(
        "--against", type=Path, metavar="FILE", help="a second result file, for comparison with the first"
    )
    command.add_argument("--choices", type=Path, metavar="FILE", help="gqa: valid and plausible answers by question")
    command.add_argument("--positive", metavar="LABEL", help="classify: the positive class for precision and recall")
    command.add_argument(
        "--tokenize",
        metavar="NAME",
        help="text: sacrebleu's tokenizer for BLEU; default: by the script, 13a, char or ja-mecab",
    )
    command.add_argument("--no-intervals", action="store_true", help="only the values")
    command.add_argument("--json", action="store_true", help="print everything to stdout")
    return command


def _metrics() -> str:
    """The metrics of every task, for --help."""
    told = ["Metrics: rule; unit; which direction is better; the program whose numbers they reproduce.\n"]
    for name, entry in TASKS.items():
        told += [f"  {entry.scored_as or name}", *[f"    {line}" for line in metric_lines(name)]]
    return "\n".join(told)


def _table(against: Path, differences: dict[str, dict[str, Any]]) -> str:
    headers = [f"{against.name} − first", "difference", "95 % interval", "p", "verdict"]
    rows = []
    for name, found in differences.items():
        span = format_difference_interval(found["interval"])
        rows.append([name, f"{found['difference']:+.4f}", span, f"{found['p']:.4f}", found["verdict"]])
    return log.format_table(headers, rows)
