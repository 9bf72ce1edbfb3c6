"""Check this machine: packages, GPU, store, Slurm, image, hub token, and with CONFIG the requirements of its job.

Run it on the login node, and in a job: sbatch jobs/doctor.sbatch [CONFIG]. Every problem is shown with a remedy.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ftlib import doctor as ftlib_doctor
from ftlib.cli import arguments
from ftlib.config.loader import load_experiment
from ftlib.core import files, log
from ftlib.core.paths import find_site
from ftlib.data import dataset
from ftlib.doctor import CheckResult
from ftlib.errors import EXIT_FAILURE, UserError
from ftlib.hub import cache
from ftlib.slurm import requirements

CHECKS = (
    ftlib_doctor.python,
    ftlib_doctor.packages,
    ftlib_doctor.user_packages,
    ftlib_doctor.gpus,
    ftlib_doctor.infiniband,
    ftlib_doctor.roots,
    ftlib_doctor.local_temporary,
    ftlib_doctor.sharing,
    ftlib_doctor.runs,
    ftlib_doctor.executed,
    ftlib_doctor.slurm,
    ftlib_doctor.image,
    ftlib_doctor.token,
    ftlib_doctor.hub_access,
)


def main(argv: list[str]) -> int:
    """`ftlib doctor [CONFIG [KEY=VALUE…]]`"""
    command = arguments.make_parser("doctor", __doc__)
    command.add_argument("config", metavar="CONFIG", type=Path, nargs="?", help="also check what this config needs")
    command.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help="override any field of the config")
    command.add_argument("--ticket", action="store_true", help="print facts for a support ticket, without secrets")
    parsed = command.parse_intermixed_args(argv)
    if parsed.ticket:
        log.print_result(ftlib_doctor.ticket())
        return 0
    found = [_print(finding) for check in CHECKS for finding in check()]
    if parsed.config:
        found += [_print(finding) for finding in _config(parsed.config, parsed.overrides)]
    return EXIT_FAILURE if any(finding.fatal for finding in found) else 0


def _print(finding: CheckResult) -> CheckResult:
    mark = "FAIL" if finding.fatal else "note" if finding.remedy else "ok"
    log.print_result(f"{mark:4}  {finding.check}: {finding.state}")
    if finding.remedy:
        log.print_result(f"      {finding.remedy}")
    return finding


def _config(path: Path, overrides: list[str]) -> Iterator[CheckResult]:
    try:
        here = find_site()
        experiment = load_experiment(path, overrides, here)
        config = experiment.config
        yield CheckResult("config", f"{path} is in order")
        yield from ftlib_doctor.job(config)
        requirements.require_data(experiment, here)
        requirements.require_warm_start(experiment, here)
        model = cache.find_model(config.model, here)
        yield CheckResult("model", f"{config.model.base} in {model}")
        yield from ftlib_doctor.processor_packages(config, model)
        if config.data.source_plugins:
            yield CheckResult("dataset", "not looked for: its source is a plugin's, and doctor runs no plugin")
            return
        folder = dataset.prepared_folder(config, here)
        remedy = "" if files.is_complete(folder) else f"Run `ftlib prepare {path}`; jobs/train.sbatch does it too."
        yield CheckResult("dataset", f"{folder} is {'not ' if remedy else ''}prepared", remedy)
    except UserError as error:
        yield CheckResult("config", error.problem, error.remedy or "Fix it.", fatal=True)
