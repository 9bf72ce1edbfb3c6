"""What `ftlib prepare` prints about a prepared dataset: what was left out or looks wrong, how it was read and split."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ftlib.config.schema import Config
from ftlib.core import log
from ftlib.data.dataset import PreparedDataset
from ftlib.data.prompts import prompt_fields
from ftlib.data.splits import SPLITS


def warning_lines(prepared: PreparedDataset, unshown: int) -> Iterator[str]:
    """What was left out of a prepared dataset, and what in it looks wrong.

    Args:
        unshown: rows with an input that the prompt does not show, see `dataset.check_prompts`.
    """
    facts = prepared.metadata
    left_out = {reason: count for reason, count in facts["left_out"].items() if count}
    for reason, count in {**left_out, **({"bad records": facts["bad"]} if facts["bad"] else {})}.items():
        yield f"left out: {count} ({reason})"
    if stripped := facts.get("stripped"):
        yield f"rows whose answer had surrounding whitespace, which was removed: {stripped}"
    if unshown:
        yield f"rows with an input that the prompt does not show (use {{input}}, or set alpaca or chat): {unshown}"
    yield from (f"labels: {told}" for told in facts.get("suspicious_labels", ()))
    yield from facts.get("remarks", ())
    if found := facts.get("one_color"):
        names = ", ".join(found["shown"]) + (", …" if found["images"] > len(found["shown"]) else "")
        yield f"images of one color: {found['images']} (all pixels are equal): {names}"


def summary_lines(prepared: PreparedDataset, config: Config) -> Iterator[str]:
    """How a prepared dataset was read and split."""
    facts = prepared.metadata
    yield from _describe_reading(facts, config)
    rows = [[split, str(entry["rows"]), entry["fingerprint"]] for split, entry in facts["splits"].items()]
    yield log.format_table(["split", "rows", "fingerprint"], rows)
    if config.data.parts:
        yield _mixture_summary(config, facts["splits"])


def _describe_reading(facts: dict[str, Any], config: Config) -> Iterator[str]:
    """Yield how the data were read: rows per split and rule, groups, and fields. Empty for data of format 3."""
    if "parts" not in facts:
        return
    rule = config.data.split
    drawn = "drawn by data.split" if rule.official else "drawn by data.split (official: false)"
    rows = [
        [f"part {part['name']!r}" if part["name"] and rule.official else drawn, *(f"{part[name]:,}" for name in SPLITS)]
        for part in facts["parts"]
    ]
    yield log.format_table(["rows", *SPLITS], rows)
    together = facts["together"]
    if together["rows"]:
        yield f"same content, kept in one split: {together['rows']:,} rows in {together['groups']:,} groups"
    if near := together.get("near"):
        fate = "also kept in one split" if rule.near_duplicates == "group" else "see split.near_duplicates"
        pairs = ", ".join(" ~ ".join(pair) for pair in near["shown"][:2])
        yield f"near-duplicate images ({fate}): {near['images']:,} in {near['groups']:,} groups, such as {pairs}"
    columns = ", ".join(f"{field}: {column}" for field, column in config.data.columns.items())
    if columns:
        yield f"fields set by data.columns: {columns}"
    asked = {field for template in config.data.templates.values() for field in prompt_fields(template)}
    if shown := [field for field in facts["fields"] if field in asked]:
        yield f"fields in the prompt: {', '.join(shown)}"
    if kept := [field for field in facts["fields"] if field not in asked]:
        yield f"other fields, kept with the rows: {', '.join(kept)}"
    if unused := facts.get("unused"):
        yield f"unused fields: {', '.join(unused)}"


def _mixture_summary(config: Config, splits: dict[str, Any]) -> str:
    """Return the parts of a mixture with their rows and their share of an epoch."""
    weighted = {part.name: part.weight * splits["train"]["parts"][part.name] for part in config.data.parts}
    total = sum(weighted.values()) or 1
    rows = [
        [part.name, *[str(entry["parts"][part.name]) for entry in splits.values()], f"{part.weight:g}", f"{share:.1%}"]
        for part, share in zip(config.data.parts, (rows / total for rows in weighted.values()), strict=True)
    ]
    return log.format_table(["part", *splits, "weight", "share of an epoch"], rows)
