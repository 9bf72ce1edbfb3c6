"""One JSON file and one page out of an acceptance run's lines, with its figures beside the goals.

Run: `python -m tests.gpu.page TARGET LINES.jsonl…` writes TARGET.json and TARGET.html from files that are there. Exit
code 0: every check is ok; 1: one is not, or there are none.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftlib.core import files, jsonl
from ftlib.reports import html
from ftlib.reports.tables import Table


@dataclass(frozen=True)
class Goal:
    """What one figure is to reach.

    Attributes:
        what: in words.
        check: the beginning of its lines' names; the best of them counts.
        figure: the field, or the beginning of it.
        least: to be reached.
        scaled: whether it is meant for an H100, and counts in proportion to the GPU's data-sheet rate.
    """

    what: str
    check: str
    figure: str
    least: float
    scaled: bool = False


GOALS = [
    Goal("LoRA at 224 pixels, model TFLOP/s", "paligemma_224 lora", "model_tflops", 400, scaled=True),
    Goal("the same compiled", "compile paligemma_224", "model_tflops", 460, scaled=True),
    Goal("LoRA at 448 pixels, model TFLOP/s", "paligemma_448 lora", "model_tflops", 400, scaled=True),
    Goal("times the rows/s of the seeds' recipe", "paligemma_224 seeds' recipe", "ftlib_", 2.0),
    Goal("times the rows/s of plain Trainer, PEFT and SDPA", "paligemma_224 plain trainer", "ftlib_", 1.3),
    Goal("GPT-NeoX 3B LoRA, MFU", "neox 3b", "mfu", 0.42),
    Goal("GPT-NeoX 7B LoRA, MFU", "neox 7b", "mfu", 0.40),
]
"""What others publish for an H100 is an MFU of 39 to 46 % (tests/benchmarks/README.md)."""

H100_TFLOPS = 989


def main(target: Path, logs: Sequence[Path]) -> int:
    """Write both files; see the module."""
    lines = [line for path in logs for line in jsonl.read_jsonl_log(path)]
    results = [line for line in lines if line["name"] != "all"]
    files.write_json(target.with_suffix(".json"), {"format": 1, "results": results})
    files.write_text(target.with_suffix(".html"), page(results))
    wrong = [line["name"] for line in results if not line["ok"]]
    print(f"{len(results) - len(wrong)} of {len(results)} checks ok; {target.with_suffix('.html')}", file=sys.stderr)
    for name in wrong:
        print(f"not ok: {name}", file=sys.stderr)
    return 0 if results and not wrong else 1


def page(results: Sequence[dict[str, Any]]) -> str:
    """The page: the machine, the goals, every check."""
    machine = next((line for line in results if line["name"] == "environment"), {})
    wrong = sum(not line["ok"] for line in results)
    verdict = f"{wrong} of {len(results)} checks failed" if wrong else f"all {len(results)} checks are ok"
    facts = Table("machine", "ll", ["", ""], [[name, _text(machine[name])] for name in machine if name not in _OWN])
    goals = Table(
        "goals", "lrrl", ["goal", "to reach", "reached", ""], [_row(goal, results, machine) for goal in GOALS]
    )
    checks = Table(
        "checks", "lrlw", ["check", "seconds", "", "figures"],
        [[line["name"], _text(line.get("seconds", "")), "ok" if line["ok"] else "FAILED", _figures(line)]
         for line in results if line["name"] != "environment"],
    )  # fmt: skip
    return html.render_page(
        "ftlib acceptance",
        html.make_environment().from_string(_BODY),
        sentence=f"{machine.get('gpu', 'no GPU: a rehearsal on the CPU')} – {verdict}",
        sections={"Goals": goals, "Checks": checks, "Machine": facts},
    )


_BODY = """{% import "macros.html.j2" as macros %}
<main>
<h1>ftlib on this GPU</h1>
<p>{{ sentence }}</p>
{% for title, table in sections.items() %}
{{ macros.section(title, table) }}
{% endfor %}
</main>"""


_OWN = ("name", "ok", "seconds")


def _row(goal: Goal, results: Sequence[dict[str, Any]], machine: dict[str, Any]) -> list[str]:
    values = [
        value
        for line in results
        if line["name"].startswith(goal.check)
        for name, value in line.items()
        if name.startswith(goal.figure) and isinstance(value, (int, float))
    ]
    peak = machine.get("data_sheet_tflops")
    least = goal.least * peak / H100_TFLOPS if goal.scaled and peak else goal.least
    if not values or machine.get("gpu") is None:
        return [goal.what, f"{least:g}", "–", "not measured"]
    return [goal.what, f"{least:.3g}", f"{max(values):g}", "reached" if max(values) >= least else "not reached"]


def _figures(line: dict[str, Any]) -> str:
    return "; ".join(f"{name}: {_text(value)}" for name, value in line.items() if name not in _OWN)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), list(map(Path, sys.argv[2:]))))
