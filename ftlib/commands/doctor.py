"""Check this machine: packages, GPU, store, Slurm, image, hub token, and with CONFIG what its job would miss.

Run it on the login node, and in a job: sbatch jobs/doctor.sbatch [CONFIG]. Every finding that is not in order comes
with what to do about it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ftlib import command_line, files, hub
from ftlib.config_file import load_experiment
from ftlib.data import prepared
from ftlib.diagnosis import cluster, gpu, machine, storage
from ftlib.diagnosis.finding import Finding
from ftlib.errors import EXIT_FAILURE, UserError
from ftlib.site import find_site

CHECKS = (
    machine.python,
    machine.packages,
    machine.user_packages,
    gpu.gpus,
    storage.roots,
    storage.local_temporary,
    cluster.slurm,
    cluster.image,
    machine.token,
    machine.hub_access,
)


def main(argv: list[str]) -> int:
    """`ftlib doctor [CONFIG]`"""
    command = command_line.parser("doctor", __doc__)
    command.add_argument("config", metavar="CONFIG", type=Path, nargs="?", help="also check what this config needs")
    parsed = command.parse_args(argv)
    found = [_print(finding) for check in CHECKS for finding in check()]
    if parsed.config:
        found += [_print(finding) for finding in _config(parsed.config)]
    return EXIT_FAILURE if any(finding.fatal for finding in found) else 0


def _print(finding: Finding) -> Finding:
    mark = "FAIL" if finding.fatal else "note" if finding.remedy else "ok"
    print(f"{mark:4}  {finding.check}: {finding.state}")
    if finding.remedy:
        print(f"      {finding.remedy}")
    return finding


def _config(path: Path) -> Iterator[Finding]:
    try:
        here = find_site()
        config = load_experiment(path, [], here).config
        yield Finding("config", f"{path} is in order")
        yield from cluster.job(config)
        yield Finding("model", f"{config.model.base} in {hub.find_model(config.model, here)}")
        folder = prepared.prepared_folder(config, here)
        remedy = "" if files.is_complete(folder) else f"Run `ftlib prepare {path}`; jobs/train.sbatch does it too."
        yield Finding("dataset", f"{folder} is {'not ' if remedy else ''}prepared", remedy)
    except UserError as error:
        yield Finding("config", error.problem, error.remedy or "Mend it.", fatal=True)
