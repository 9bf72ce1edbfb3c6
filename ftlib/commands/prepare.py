"""Check a dataset (every row, every image) and split it into train, valid and test in the store."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftlib import command_line, console, files, history
from ftlib.config import Config
from ftlib.data.moved import known_by_data
from ftlib.errors import UserError
from ftlib.hub import find_model
from ftlib.pinning import use_pinned_code
from ftlib.runs import run_of
from ftlib.site import Site, find_site

if TYPE_CHECKING:
    from ftlib.data.intake import Encode


def main(argv: list[str]) -> int:
    """`ftlib prepare CONFIG [KEY=VALUE…] [--check]`"""
    command = command_line.parser("prepare", __doc__)
    command.add_argument("--check", action="store_true", help="only check; write nothing")
    command_line.add_config(command)
    parsed = command.parse_intermixed_args(argv)
    site = find_site()
    experiment = command_line.load(parsed, site)
    config = experiment.config
    from ftlib.data import prepared

    if parsed.check:
        from ftlib.data.overview import overview

        print(overview(config.data, config.task, *_length(config, site), _encode(config)))
        return 0
    [experiment] = known_by_data([experiment], site)
    run = run_of(experiment, site)
    with files.shared_with_group(), history.before_training(run, "prepare"):
        result = prepared.find_prepared(config, site, run)
        done = result is not None
        if result is None:
            if files.is_complete(run.code) and not run.done.exists():
                use_pinned_code(run, site, ["prepare", *argv])  # which looks for the name that it gave the folder
            result = prepared.prepare(config, site, _encode(config))
    if done:
        console.say("already prepared")
        if prepared.changed_since(result, config):
            console.say("the dataset's files have changed since; the run that was made from it goes on with these rows")
    left_out = {reason: count for reason, count in result.facts["left_out"].items() if count}
    for reason, count in {**left_out, **({"bad records": result.facts["bad"]} if result.facts["bad"] else {})}.items():
        console.say(f"left out: {count} ({reason})")
    if found := result.facts.get("one_color"):
        names = ", ".join(found["shown"]) + (", …" if found["images"] > len(found["shown"]) else "")
        console.say(f"images of one color: {found['images']} (all pixels are alike once decoded): {names}")
    rows = [[split, str(entry["rows"]), entry["fingerprint"]] for split, entry in result.facts["splits"].items()]
    console.say(console.table(["split", "rows", "fingerprint"], rows))
    if config.data.parts:
        console.say(_shares(config, result.facts["splits"]))
    print(result.folder)
    return 0


def _encode(config: Config) -> Encode | None:
    """Masks become codes where the config has what makes them."""
    if config.task != "segment" or config.evaluation.mask_decoder is None:
        return None
    from ftlib.evaluation.masks import mask_encoder
    from ftlib.models.mask_decoder import MaskCodec

    return mask_encoder(MaskCodec.load(Path(config.evaluation.mask_decoder)))


def _shares(config: Config, splits: dict[str, Any]) -> str:
    """The parts of a mixture: their rows, and how much of an epoch of training they are."""
    weighted = {part.name: part.weight * splits["train"]["parts"][part.name] for part in config.data.parts}
    total = sum(weighted.values()) or 1
    rows = [
        [part.name, *[str(entry["parts"][part.name]) for entry in splits.values()], f"{part.weight:g}", f"{share:.1%}"]
        for part, share in zip(config.data.parts, (rows / total for rows in weighted.values()), strict=True)
    ]
    return console.table(["part", *splits, "weight", "share of an epoch"], rows)


def _length(config: Config, site: Site) -> tuple[Callable[[str], int], str]:
    """How long a text is: in tokens if the model is in the store, else in characters."""
    try:
        folder = find_model(config.model, site)
    except UserError:
        return len, "characters (the model is not staged)"
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    return lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"]), "tokens"
