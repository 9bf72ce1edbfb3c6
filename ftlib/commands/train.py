"""Train a config; run again, it goes on from its last checkpoint or says that it is done.

The run folder is <runs>/<name>/<identity>/; its adapter/ or model/ is the result.
"""

from __future__ import annotations

from ftlib import command_line, console, history, ownership, runs
from ftlib.data.moved import known_by_data
from ftlib.errors import EXIT_FAILURE, Diverged
from ftlib.pinning import use_pinned_code
from ftlib.preemption import tell_host, unwinding
from ftlib.site import find_site


def main(argv: list[str]) -> int:
    """`ftlib train CONFIG [KEY=VALUE…]`"""
    command = command_line.parser("train", __doc__)
    command_line.add_config(command)
    site = find_site()
    [experiment] = known_by_data([command_line.load(command.parse_args(argv), site)], site)
    run = runs.open_run(experiment, site)
    print(run.folder)
    if notice := runs.recipe_notice(experiment, site):
        console.say(notice)
    if run.done.exists():
        console.say(f"{run.folder}: already trained; the result is in {run.result(experiment.config.adapter.method)}")
        console.say(
            f"to train it on, begin a new run with its weights: warm_start={run.folder.parent.name}/{run.folder.name}"
        )
        return 0
    # older code would begin another run for data that lie elsewhere; the run's own config is the same but for that
    use_pinned_code(run, site, ["train", *([str(run.config_file)] if experiment.elsewhere else argv)])
    from ftlib.training.fit import fit

    seen = history.last_sign(run)
    try:
        with unwinding(), ownership.owned(run.folder), history.endings(run, "train", seen):
            tell_host("run", str(run.folder))
            fit(experiment, run, site)
    except Diverged as error:
        console.say(f"ftlib: {error}")
        return EXIT_FAILURE
    console.say(f"trained: {run.result(experiment.config.adapter.method)}")
    return 0
