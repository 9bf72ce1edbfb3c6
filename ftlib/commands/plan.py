"""Say what a config will need on a GPU, by part, whether it fits, and the largest micro-batch that does.

It needs neither weights nor a GPU: one training step is counted on the model's shapes, so config.json is enough. Row
lengths come from the prepared data; without it they are assumed, and it says so. The table goes to stderr, --json to
stdout. Exit code 1 if the config does not fit.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

from ftlib import command_line, console
from ftlib.errors import EXIT_FAILURE
from ftlib.site import find_site

if TYPE_CHECKING:
    from ftlib.memory.plan import Plan


def main(argv: list[str]) -> int:
    """`ftlib plan CONFIG [KEY=VALUE…] [--gpu 12GiB] [--json]`"""
    command = command_line.parser("plan", __doc__)
    command_line.add_config(command)
    command.add_argument("--gpu", metavar="SIZE", help="memory of the GPU, such as 12GiB; without it: this machine's")
    command.add_argument("--json", action="store_true", help="print the numbers to stdout, sizes in bytes")
    parsed = command.parse_intermixed_args(argv)
    site = find_site()
    config = command_line.load(parsed, site).config
    from ftlib.memory.cuts import gpu_bytes, parse_size
    from ftlib.memory.plan import make_plan

    plan = make_plan(config, site, parse_size(parsed.gpu) if parsed.gpu else gpu_bytes())
    _show(plan)
    if parsed.json:
        print(json.dumps(plan.facts(), indent=1))
    return EXIT_FAILURE if plan.fits is False else 0


def _show(plan: Plan) -> None:
    from ftlib.memory.cuts import gib
    from ftlib.memory.optimizers import known

    optimizer = str(plan.config.training.get("optim", "adamw_torch_fused"))
    origin = "the longest of the prepared data" if plan.found else "assumed; `ftlib prepare` makes them exact"
    console.say(f"rows of {plan.rows.tokens:,} tokens, {plan.rows.answer:,} of them answer ({origin})")
    console.say(f"micro-batch {plan.config.micro_batch} of {plan.config.effective_batch} rows a step, in GiB:\n")
    without, checkpointed = (asdict(plan.needs[one]) | {"together": plan.needs[one].total} for one in (False, True))
    rows = [[part, f"{without[part] / 2**30:.2f}", f"{checkpointed[part] / 2**30:.2f}"] for part in without]
    console.say(console.table(["part", "without", "with gradient checkpointing"], rows) + "\n")
    if not known(optimizer):
        console.say(f"training.optim: {optimizer}: its state is taken to be as large as Adam's")
    if plan.capacity is None:
        console.say("no GPU here: name one, as in --gpu 24GiB, to see what fits")
        return
    verdict = "fits" if plan.fits else "does not fit"
    console.say(f"as configured it needs {gib(plan.need.total)}: {verdict} into {gib(plan.capacity)}")
    for checkpointing in (False, True):
        console.say(_largest(plan, checkpointing))


def _largest(plan: Plan, checkpointing: bool) -> str:
    from ftlib.memory.cuts import gib

    how = "with gradient checkpointing" if checkpointing else "without gradient checkpointing"
    cut = plan.largest[checkpointing]
    if cut is None:
        return f"{how}: not even a micro-batch of 1 fits"
    accumulation = plan.config.rows_per_gpu // cut.micro_batch
    sizes = f"per_device_train_batch_size: {cut.micro_batch}, gradient_accumulation_steps: {accumulation}"
    return f"{how}: at most {sizes} ({gib(cut.need.total)})"
