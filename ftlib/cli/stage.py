"""Download what a config needs to the shared store: model and processor, and a hub dataset or a generated toy dataset.
Or a model or adapter of the hub by its name, OWNER/NAME, for example to merge it.

Run it on the login node; jobs then work offline. A model or dataset of the hub stays at the commit that was first
staged; model.revision selects another one. Embedded models (ftlib/…) are generated. A big_vision checkpoint
(model.base:
….npz) is converted, which needs the packages of training: `jobs/run.sh ftlib stage CONFIG`.
"""

from __future__ import annotations

import contextlib
import importlib.util
from pathlib import Path

from ftlib.cli import arguments
from ftlib.config.checkpoints import NpzCheckpoint
from ftlib.config.paths import hub_name
from ftlib.config.schema import Config, Data, Model
from ftlib.core import files, log, permissions
from ftlib.core.lease import compute_once
from ftlib.core.paths import Site, find_site
from ftlib.data.moved import match_existing_runs
from ftlib.errors import UserError
from ftlib.hub import cache, download
from ftlib.runs import events
from ftlib.runs.run import run_for


def main(argv: list[str]) -> int:
    """`ftlib stage CONFIG [KEY=VALUE…]` or `ftlib stage OWNER/NAME [revision=REVISION]`"""
    command = arguments.make_parser("stage", __doc__)
    arguments.add_config_arguments(command)
    parsed = command.parse_args(argv)
    site = find_site()
    if hub_name(str(parsed.config)) and parsed.config.suffix not in (".yaml", ".yml") and not parsed.config.exists():
        log.print_result(str(_stage_by_name(str(parsed.config), parsed.overrides, site)))
        return 0
    [experiment] = match_existing_runs([arguments.load_from_arguments(parsed, site)], site)
    config = experiment.config
    with permissions.group_writable(site), events.record_pretraining_failure(run_for(experiment, site), "stage"):
        for part in config.data.datasets.values():  # first: with a model, the hub is switched off
            log.info(f"dataset {part.source}: {_stage_data(part, site)}")
        if experiment.npz:
            log.info(f"model {experiment.npz.file}: {_convert(experiment.npz, site)}")
            return 0
        own = " (a local folder: nothing to download)" if cache.is_local_path(config.model.base) else ""
        log.info(f"model {config.model.base}: {_stage_model(config, site)}{own}")
    return 0


def _stage_by_name(name: str, options: list[str], site: Site) -> Path:
    """Stage a model or adapter of the hub and return its folder in the store."""
    names = [text.removeprefix("revision=") for text in options]
    if len(options) > 1 or (options and names == options):
        raise UserError(f"stage: {options[-1]}: for a model of the hub, only revision=… can be set")
    model = Model(family="causal", base=name, revision=names[0] if names else None)
    with permissions.group_writable(site):
        folder = download.stage_model(model, site)
        cache.model_hashes(folder, site)
    return folder


def _stage_model(config: Config, site: Site) -> Path:
    """Stage the model and hash its files, so that jobs need not."""
    embedded = cache.is_embedded(config.model)
    folder = cache.embedded_folder(config.model, site) if embedded else download.stage_model(config.model, site)
    if embedded and not files.is_complete(folder):
        from ftlib.models.tiny import make_embedded

        with files.atomic_directory(folder) as temporary:
            make_embedded(config.model.base, temporary)
    cache.model_hashes(folder, site)
    return folder


def _convert(npz: NpzCheckpoint, site: Site) -> Path:
    """Return the model folder of a big_vision checkpoint; one process converts it if it does not exist."""

    def find() -> Path | None:
        return npz.folder if files.is_complete(npz.folder) else None

    def convert() -> Path:
        if not npz.file.is_file():
            raise UserError(f"model.base: {npz.file}: no such file", "docs/models.md says where to download it.")
        tokenizer = Path(npz.tokenizer)
        if npz.tokenizer_sha256 is None:
            tokenizer = download.find_tokenizer_file(npz.tokenizer, site)
        with files.atomic_directory(npz.folder) as temporary:
            big_vision.convert(npz, tokenizer, temporary)
        return npz.folder

    if not find():
        if not importlib.util.find_spec("transformers"):
            problem = f"model.base: {npz.file} must be converted, which needs the packages of training"
            raise UserError(problem, "Run `jobs/run.sh ftlib stage CONFIG`, which converts it in the container.")
        from ftlib.models import big_vision

        work = site.store / "hf" / "staging" / npz.folder.name
        compute_once(work, find, convert, f"model {npz.file}")
        with contextlib.suppress(OSError):  # another process may have come
            work.rmdir()
    cache.model_hashes(npz.folder, site)
    return npz.folder


def _stage_data(data: Data, site: Site) -> Path:
    from ftlib.data.sources import hf_datasets
    from ftlib.data.sources.registry import TOY_DATASETS

    if data.source == "hub":
        name = data.file.partition(":")[0]
        if not cache.is_local_path(name):
            download.stage_dataset(name, site)
        if importlib.util.find_spec("datasets"):
            hf_datasets.fetch(data)
        else:
            log.info("its images are extracted in the container: by the job, or with `jobs/run.sh ftlib stage …`")
    root = Path(data.root)
    if data.source in TOY_DATASETS and not files.is_complete(root):
        with files.atomic_directory(root) as temporary:
            TOY_DATASETS[data.source](temporary)
    return root
