"""Check a dataset (every row, every image) and split it into train, valid and test in the store."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftlib.cli import arguments
from ftlib.config.schema import Config
from ftlib.core import files, log, permissions
from ftlib.core.paths import Site, find_site
from ftlib.data.moved import match_existing_runs
from ftlib.data.prompts import prompt_fields
from ftlib.data.splits import SPLITS
from ftlib.errors import UserError
from ftlib.hub.cache import find_model
from ftlib.runs import events
from ftlib.runs.pinning import exec_pinned_code
from ftlib.runs.run import run_for

if TYPE_CHECKING:
    from ftlib.data.scan import RowTransform


def main(argv: list[str]) -> int:
    """`ftlib prepare CONFIG [KEY=VALUE…] [--check | --again]`"""
    command = arguments.make_parser("prepare", __doc__)
    how = command.add_mutually_exclusive_group()
    how.add_argument("--check", action="store_true", help="only check; write nothing")
    again = "read the current data again; existing runs keep their rows"
    how.add_argument("--again", action="store_true", help=again)
    arguments.add_config_arguments(command)
    parsed = command.parse_intermixed_args(argv)
    site = find_site()
    experiment = arguments.load_from_arguments(parsed, site)
    config = experiment.config
    from ftlib.data import dataset
    from ftlib.data import prepare as data_prepare
    from ftlib.tasks.registry import task_of

    if parsed.check:
        from ftlib.data.overview import describe_dataset

        log.print_result(
            describe_dataset(config.data, task_of(config), *_length_function(config, site), _row_transform(config))
        )
        return 0
    [experiment] = match_existing_runs([experiment], site)
    run = run_for(experiment, site)
    with permissions.group_writable(site), events.record_pretraining_failure(run, "prepare"):
        result = None if parsed.again else dataset.find_prepared(config, site, run)
        done = result is not None
        if result is None:
            if not parsed.again and files.is_complete(run.code) and not run.done_marker.exists():
                exec_pinned_code(run, site, ["prepare", *argv])  # older code uses another folder name
            result = data_prepare.prepare(config, site, task_of(config), _row_transform(config), parsed.again)
    unshown = dataset.check_prompts(result, config)
    if done:
        log.info("already prepared")
        if dataset.source_changed(result, config):
            log.info("the dataset's files have changed since; the existing run keeps these rows")
    left_out = {reason: count for reason, count in result.metadata["left_out"].items() if count}
    for reason, count in {
        **left_out,
        **({"bad records": result.metadata["bad"]} if result.metadata["bad"] else {}),
    }.items():
        log.info(f"left out: {count} ({reason})")
    if stripped := result.metadata.get("stripped"):
        log.info(f"rows whose answer had surrounding whitespace, which was removed: {stripped}")
    if unshown:
        log.info(f"rows with an input that the prompt does not show (use {{input}}, or set alpaca or chat): {unshown}")
    for told in result.metadata.get("suspicious_labels", ()):
        log.info(f"labels: {told}")
    for remark in result.metadata.get("remarks", ()):
        log.info(remark)
    if found := result.metadata.get("one_color"):
        names = ", ".join(found["shown"]) + (", …" if found["images"] > len(found["shown"]) else "")
        log.info(f"images of one color: {found['images']} (all pixels are equal): {names}")
    for line in _describe_reading(result.metadata, config):
        log.info(line)
    rows = [[split, str(entry["rows"]), entry["fingerprint"]] for split, entry in result.metadata["splits"].items()]
    log.info(log.format_table(["split", "rows", "fingerprint"], rows))
    if config.data.parts:
        log.info(_mixture_summary(config, result.metadata["splits"]))
    log.print_result(str(result.folder))
    return 0


def _row_transform(config: Config) -> RowTransform | None:
    """Return the transform that encodes masks, if the config has a mask encoder."""
    if config.task != "segment" or config.evaluation.mask_decoder is None:
        return None
    from ftlib.evaluation.masks import mask_encoder
    from ftlib.models.mask_codec import MaskCodec

    return mask_encoder(MaskCodec.load(Path(config.evaluation.mask_decoder)))


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


def _length_function(config: Config, site: Site) -> tuple[Callable[[str], int], str]:
    """Return a function for the length of a text, and its unit: tokens if the model is staged, else characters.

    Raises:
        UserError: the model's tokenizer cannot be read.
    """
    try:
        folder = find_model(config.model, site)
    except UserError:
        return len, "characters (the model is not staged)"
    from transformers import AutoTokenizer

    from ftlib.models.custom_code import load_error_message

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, ImportError) as error:
        raise UserError(f"{folder}: no tokenizer can be read from it: {load_error_message(error)}") from None
    return lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"]), "tokens"
