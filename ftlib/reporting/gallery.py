"""Rows of the evaluated split with picture, answer and expected answer: wrong ones, changed ones, some right ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ftlib.reporting.collect import RunRecord, SplitRecord
from ftlib.reporting.html import Child, Node, group, note, section, tag
from ftlib.reporting.overlay import in_words, overlay
from ftlib.reporting.pictures import picture

MAX_WRONG, MAX_CHANGED, MAX_RIGHT = 24, 12, 12

Row = dict[str, Any]


class Gallery:
    """Chooses rows and draws a card for each; no row is drawn twice."""

    def __init__(self, split: SplitRecord, root: Path) -> None:
        self.rows = split.latest.predictions
        self.root = root
        self.before = {row["id"]: row for row in split.before.predictions} if split.before and split.after else {}
        self.prompts = list(dict.fromkeys(row["prompt"] for row in self.rows))
        self._shown: set[str] = set()

    def groups(self) -> list[Node]:
        """The parts of the gallery that have rows."""
        wrong = sorted((row for row in self.rows if not _right(row)), key=_score)
        right = [row for row in self.rows if _right(row)]
        learned = [row for row in right if row["id"] in self.before and not _right(self.before[row["id"]])]
        lost = [row for row in wrong if row["id"] in self.before and _right(self.before[row["id"]])]
        parts = [
            self._group("Wrong answers", wrong, wrong[:MAX_WRONG]),
            self._group("Wrong before training, right after", learned, spread(learned, MAX_CHANGED)),
            self._group("Right before training, wrong after", lost, spread(lost, MAX_CHANGED)),
            self._group("Right answers", right, spread(self._unseen(right), MAX_RIGHT)),
        ]
        return [part for part in parts if part]

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
        right = _right(row)
        bare = row.get("without_context")
        facts = [_judged("with context" if bare else "answer", row)]
        if bare:
            facts.insert(0, _judged("without context", bare))
        if not right:
            facts.append(_fact("expected", _expected(row)))
        if 0 < _score(row) < 1:
            facts.append(_fact("score", f"{_score(row):.2f}"))
        if row["id"] in self.before:
            facts.append(_fact("before", _answer(self.before[row["id"]]["prediction"])))
        if len(self.prompts) > 1:
            facts.append(_fact("prompt", row["prompt"]))
        facts.append(_fact("id", str(row["id"])))
        shown = picture(self.root, row["image"], overlay(row)) if row.get("image") else group()
        kinds = ("card", "right" if right else "wrong", *(["twice"] if bare else []))
        return tag("article", shown, tag("dl", *facts), class_=" ".join(kinds))


def gallery_section(record: RunRecord) -> Node:
    """Pictures and answers of the first evaluated split; nothing before the first evaluation."""
    if not record.splits:
        return group()
    split = record.splits[0]
    gallery = Gallery(split, Path(record.config.data.root))
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


def _right(row: Row) -> bool:
    """A partial score is not right."""
    return _score(row) >= 1


def _score(row: Row) -> float:
    """Metrics of a whole corpus give no row its own."""
    return float(row.get("score") or 0.0)


def _count(total: int, shown: int) -> str:
    if shown == total:
        return str(total)
    return f"{shown} of {total}" if shown else f"{total}, shown above"


def _fact(name: str, *children: Child) -> Node:
    return tag("div", tag("dt", name), tag("dd", *children))


def _judged(name: str, row: Row) -> Node:
    return _fact(name, tag("strong", _answer(row["prediction"])), f"\u00a0{'✓' if _right(row) else '✗'}")


def _expected(row: Row) -> Child:
    texts = [in_words(reference) or reference or "(empty)" for reference in row["references"]]
    return ", ".join(dict.fromkeys(texts))


def _answer(text: str) -> Child:
    """Location tokens are drawn, not written."""
    return (in_words(text) or text) if text.strip() else tag("i", "(empty)")
