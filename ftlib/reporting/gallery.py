"""Rows of the evaluated split with picture, answer and expected answer: worst, changed by training, best."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ftlib.reporting.collect import RunRecord, SplitRecord
from ftlib.reporting.html import Child, Node, group, note, section, tag
from ftlib.reporting.overlay import in_words, overlay
from ftlib.reporting.pictures import picture

MAX_WRONG, MAX_CHANGED, MAX_RIGHT = 24, 12, 12
GRADED = ("caption", "instruct", "segment")
"""Tasks whose answers are better or worse, but hardly ever just right."""

Row = dict[str, Any]


class Gallery:
    """Chooses rows and draws a card for each; no row is drawn twice.

    Args:
        graded: rows are told by their scores, not as right or wrong.
    """

    def __init__(self, split: SplitRecord, root: Path, graded: bool) -> None:
        self.graded = graded
        self.higher_is_better = split.latest.higher_is_better
        self.rows = split.latest.predictions
        self.root = root
        self.before = {row["id"]: row for row in split.before.predictions} if split.before and split.after else {}
        self.prompts = list(dict.fromkeys(row["prompt"] for row in self.rows))
        self._shown: set[str] = set()

    def groups(self) -> list[Node]:
        """The parts of the gallery that have rows."""
        return [part for part in (self._by_score() if self.graded else self._by_verdict()) if part]

    def _by_score(self) -> list[Node | None]:
        rows = sorted(self.rows, key=self._merit)
        worst = rows[: min(MAX_WRONG, (len(rows) + 1) // 2)]
        again = [row for row in rows if row["id"] in self.before]
        change = {row["id"]: self._merit(row) - self._merit(self.before[row["id"]]) for row in again}
        titles = ["Lowest scores", "Highest scores"][:: 1 if self.higher_is_better else -1]
        moved = sorted((row for row in rows if change.get(row["id"])), key=lambda row: change[row["id"]])
        worse, better = [[row for row in moved if sign * change[row["id"]] > 0] for sign in (-1, 1)]
        return [
            self._group(titles[0], rows, worst),
            self._group("Most improved by training", better, better[::-1][:MAX_CHANGED]),
            self._group("Most worsened by training", worse, worse[:MAX_CHANGED]),
            self._group(titles[1], rows, self._unseen(rows[::-1])[:MAX_RIGHT]),
        ]

    def _by_verdict(self) -> list[Node | None]:
        wrong = sorted((row for row in self.rows if not self._right(row)), key=self._merit)
        right = [row for row in self.rows if self._right(row)]
        learned = [row for row in right if row["id"] in self.before and not self._right(self.before[row["id"]])]
        lost = [row for row in wrong if row["id"] in self.before and self._right(self.before[row["id"]])]
        return [
            self._group("Wrong answers", wrong, wrong[:MAX_WRONG]),
            self._group("Wrong before training, right after", learned, spread(learned, MAX_CHANGED)),
            self._group("Right before training, wrong after", lost, spread(lost, MAX_CHANGED)),
            self._group("Right answers", right, spread(self._unseen(right), MAX_RIGHT)),
        ]

    def _right(self, row: Row) -> bool:
        """A partial score is not right, nor is an answer without one."""
        if row.get("score") is None:
            return False
        return _score(row) >= 1 if self.higher_is_better else _score(row) <= 0

    def _merit(self, row: Row) -> float:
        return _score(row) if self.higher_is_better else -_score(row)

    def _unseen(self, rows: Sequence[Row]) -> list[Row]:
        return [row for row in rows if row["id"] not in self._shown]

    def _group(self, title: str, rows: Sequence[Row], chosen: Sequence[Row]) -> Node | None:
        if not rows:
            return None
        new = self._unseen(chosen)
        self._shown.update(row["id"] for row in new)
        count = tag("span", _count(len(rows), len(new)), class_="count")
        kind = "cards" if any(row.get("image") for row in new) else "cards texts"
        cards = tag("div", *[self._card(row) for row in new], class_=kind) if new else group()
        return group(tag("h3", title, " ", count), cards)

    def _card(self, row: Row) -> Node:
        right = self._right(row)
        bare = row.get("without_context")
        facts = [
            _fact("with context" if bare else "answer", tag("strong", _answer(row["prediction"])), self._mark(row))
        ]
        if bare:
            facts.insert(0, _fact("without context", _answer(bare["prediction"]), self._mark(bare)))
        if self.graded or not right:
            facts.append(_fact("expected", _expected(row)))
        if not self.graded and not right and _score(row) > 0:
            facts.append(_fact("score", f"{_score(row):.2f}"))
        if row["id"] in self.before:
            earlier = self.before[row["id"]]
            facts.append(_fact("before", _answer(earlier["prediction"]), self._mark(earlier)))
        if len(self.prompts) > 1:
            facts.append(_fact("prompt", row["prompt"]))
        facts.append(_fact("id", str(row["id"])))
        shown = picture(self.root, row["image"], overlay(row)) if row.get("image") else group()
        verdict = "graded" if self.graded else "right" if right else "wrong"
        kinds = ("card", verdict, *(["twice"] if bare else []))
        return tag("article", shown, tag("dl", *facts), class_=" ".join(kinds))

    def _mark(self, row: Row) -> str:
        """What stands behind an answer: its score, or the verdict."""
        return f"\u00a0({_score(row):.2f})" if self.graded else f"\u00a0{'✓' if self._right(row) else '✗'}"


def gallery_section(record: RunRecord) -> Node:
    """Pictures and answers of the first evaluated split; nothing before the first evaluation."""
    if not record.splits:
        return group()
    split = record.splits[0]
    gallery = Gallery(split, Path(record.config.data.root), record.config.task in GRADED)
    where: Child = f"From the {split.split} split, {split.latest.when} training."
    if len(gallery.prompts) == 1:
        where = group(where, " Every row was asked: ", tag("q", gallery.prompts[0], class_="prompt"))
    drawn = any(overlay(row) for row in gallery.rows)
    legend = [note("Full lines: answered. Dashed lines: expected.")] if drawn else []
    if any("without_context" in row for row in gallery.rows):
        legend.append(note("Rows with a context were asked twice; the score is that of the answer with it."))
    return section("Answers", note(where), *legend, *gallery.groups())


def spread(rows: Sequence[Row], count: int) -> list[Row]:
    """At most `count` rows, evenly spaced over all of them: the same ones each time."""
    if len(rows) <= count:
        return list(rows)
    return [rows[number * len(rows) // count] for number in range(count)]


def _score(row: Row) -> float:
    """Metrics of a whole corpus give no row its own."""
    return float(row.get("score") or 0.0)


def _count(total: int, shown: int) -> str:
    if shown == total:
        return str(total)
    return f"{shown} of {total}" if shown else f"{total}, shown above"


def _fact(name: str, *children: Child) -> Node:
    return tag("div", tag("dt", name), tag("dd", *children))


def _expected(row: Row) -> Child:
    texts = [in_words(reference) or reference or "(empty)" for reference in row["references"]]
    return ", ".join(dict.fromkeys(texts))


def _answer(text: str) -> Child:
    """Location tokens are drawn, not written."""
    return (in_words(text) or text) if text.strip() else tag("i", "(empty)")
