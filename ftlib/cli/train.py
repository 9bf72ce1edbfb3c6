"""Train a config. Run it again to resume from the last checkpoint.

The run folder is <runs>/<name>/<identity>/; its adapter/ or model/ is the result.
"""

from __future__ import annotations

from ftlib.cli import arguments
from ftlib.core import imports, log
from ftlib.core.paths import find_site
from ftlib.data.moved import match_existing_runs
from ftlib.errors import EXIT_FAILURE, TrainingDiverged
from ftlib.models.libraries import hide_unused_packages
from ftlib.runs import run as runs
from ftlib.runs.pinning import exec_pinned_code


def main(argv: list[str]) -> int:
    """`ftlib train CONFIG [KEY=VALUE…]`"""
    command = arguments.make_parser("train", __doc__)
    arguments.add_config_arguments(command)
    site = find_site()
    [experiment] = match_existing_runs([arguments.load_from_arguments(command.parse_args(argv), site)], site)
    run = runs.create_run(experiment, site)
    log.print_result(str(run.folder))
    if notice := runs.recipe_notice(experiment, site):
        log.warning(notice)
    if run.done_marker.exists():
        log.info(
            f"{run.folder}: already finished; the result is in {run.result_folder(experiment.config.adapter.method)}"
        )
        log.info(f"to continue training, start a new run with warm_start={run.folder.parent.name}/{run.folder.name}")
        return 0
    # older code would start another run for moved data; the run's config differs only in that
    exec_pinned_code(run, site, ["train", *([str(run.config_file)] if experiment.data_locations else argv)])
    hide_unused_packages(experiment.config, site)
    with imports.quick_imports():
        from ftlib.training.train import train_run
    imports.exempt_from_collection()

    try:
        train_run(experiment, run, site)
    except TrainingDiverged as error:
        if log.is_main_process():
            log.error(f"ftlib: {error}")
        return EXIT_FAILURE
    log.info(f"trained: {run.result_folder(experiment.config.adapter.method)}")
    return 0
