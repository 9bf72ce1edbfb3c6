"""The table and the methods paragraph of a paper, in LaTeX (booktabs). A comment names the run of every number."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ftlib import __version__
from ftlib.core.metric_table import describe_metric, metric_info
from ftlib.metrics.comparability import answer_settings, describe_settings
from ftlib.metrics.formatting import format_interval, format_value
from ftlib.reports.run_record import EvaluationResult, RunRecord, SplitRecord
from ftlib.reports.sweep_stats import REPORT_SPLIT, SELECTION_SPLIT, RunGroup, comparison_groups, group_runs
from ftlib.reports.sweep_tables import format_statistics, settings_remarks

_NONE = "--"
_PACKAGES = ("torch", "transformers", "peft")
_ESCAPED = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}",
    ">": r"\textgreater{}", "–": "--", "±": r"$\pm$", "−": "$-$", "≤": r"$\le$",
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
}  # fmt: skip


def latex(records: Sequence[RunRecord]) -> str:
    """Return a table for each metric and dataset, and a paragraph about the methods of each."""
    boards = comparison_groups([group for group in group_runs(records) if group.metric])
    parts = [
        f"% Made by ftlib {__version__} (ftlib report --latex). Needs \\usepackage{{booktabs}}; for text in other "
        "scripts than Latin, XeLaTeX or LuaLaTeX."
    ]
    parts += [text for board in boards for text in (_table(board), _methods(board))]
    return "\n\n".join(parts if boards else [*parts, "% No run has scores yet."]) + "\n"


def escape(text: str) -> str:
    """Text without LaTeX's special characters, in one line."""
    return "".join(_ESCAPED.get(letter, letter) for letter in " ".join(text.split()))


def _table(board: Sequence[RunGroup]) -> str:
    metric = escape(board[0].metric or "")
    lines = [
        r"\begin{table}",
        r"\centering",
        r"\begin{tabular}{lrrrrrrr}",
        r"\toprule",
        f"setting & seeds & {SELECTION_SPLIT} & {REPORT_SPLIT} & 95\\,\\% interval & $n$ & $p$ & GPU-h \\\\",
        r"\midrule",
    ]
    for group in board:
        lines += [*_sources(group), " & ".join(map(escape, _row(group))) + r" \\"]
    for remark in settings_remarks([group.runs for group in board], (SELECTION_SPLIT, REPORT_SPLIT)):
        lines.append(f"% {' '.join(remark.split())}")
    caption = (
        f"{metric}, mean $\\pm$ standard deviation over seeds. Interval: of the mean over seeds (Student's $t$), or of "
        f"one run's score on {REPORT_SPLIT}. $p$: paired test against the base model on the same rows, the largest "
        "over seeds."
    )
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", f"\\caption{{{caption}}}", r"\end{table}"])


def _row(group: RunGroup) -> list[str]:
    chosen, reported = group.seed_statistics(SELECTION_SPLIT), group.seed_statistics(REPORT_SPLIT)
    shown = [split for run in group.different_runs if (split := _own_split(run, REPORT_SPLIT)) and split.after]
    interval = reported.interval if reported else None
    if reported and reported.n == 1 and shown[0].after:
        interval = shown[0].after.scores["interval"]
    counts = sorted({split.latest.scores["n"] for split in shown})
    tests = [split.change["p"] for split in shown if split.change]
    hours = sum(run.usage.hours for run in group.runs)
    return [
        group.name,
        f"{(chosen or reported).n if chosen or reported else 0} of {len(group.different_runs)}",  # type: ignore[union-attr]
        _or_none(format_statistics(chosen, group.unit)),
        _or_none(format_statistics(reported, group.unit)),
        _or_none(format_interval(interval, group.unit, 3)),
        ", ".join(map(str, counts)) or _NONE,
        f"{max(tests):.4f}" if tests else _NONE,
        f"{hours:.2f}",
    ]


def _or_none(text: str) -> str:
    return _NONE if text == "–" else text


def _own_split(run: RunRecord, name: str) -> SplitRecord | None:
    return next((one for one in run.splits if (one.dataset, one.split) == (run.config.data.source, name)), None)


def _sources(group: RunGroup) -> Iterator[str]:
    """Yield a comment for every score in a row, with the run and the folder of its evaluation."""
    for run in group.runs:
        copy = "" if run in group.different_runs else "; a copy, not counted"
        yield f"% {' '.join(run.name.split())}: seed {run.config.seed}, {run.usage.hours:.2f} GPU-h{copy}"
        for name in (SELECTION_SPLIT, REPORT_SPLIT):
            split = _own_split(run, name)
            for found in split.by_when.values() if split else ():
                yield f"%   {name} {found.when} training: {_source(run, found)}"
            if split and split.change:
                yield f"%   {name} p = {split.change['p']:.6g}, {split.change['of']}"


def _source(run: RunRecord, found: EvaluationResult) -> str:
    value = "undefined" if found.value is None else f"{found.value:.8g}"
    place = found.folder.relative_to(run.folder)
    return f"{found.scores['metric']} {value}, n {found.scores['n']}, {place}/scores.json"


def _methods(board: Sequence[RunGroup]) -> str:
    runs = [run for group in board for run in group.runs]
    config, found = runs[0].config, runs[0].splits[0].latest if runs[0].splits else None
    packages = [entry.get("packages", {}) for run in runs for entry in run.environments]
    versions = [
        f"{name} {', '.join(sorted({one[name] for one in packages if name in one}))}"
        for name in _PACKAGES
        if any(name in one for one in packages)
    ]
    prompts = list(dict.fromkeys(run.config.data.prompt for run in runs))
    trained = list(dict.fromkeys(f"{run.config.adapter.method} of {run.config.model.base}" for run in runs))
    info = metric_info(config.task, board[0].metric or "")
    rule = f" ({describe_metric(info)})" if info else ""
    told = [
        f"We trained {'; '.join(trained)} with ftlib {__version__}" + (f" ({', '.join(versions)})" if versions else ""),
        f"The prompt was {'; '.join(map(repr, prompts))}" if all(run.text for run in runs) else "",
        f"Answers were made with {describe_settings(answer_settings(config.evaluation))}",
        f"The metric is {board[0].metric}{rule}" + (f", rule {found.scores['rule']}" if found else ""),
        f"Intervals of single runs: {found.scores['interval_method']}" if found else "",
        f"Training and evaluation took {format_value(sum(run.usage.hours for run in runs), '', 2)} GPU-hours",
    ]
    return "\n".join(escape(f"{sentence}.") for sentence in told if sentence)
