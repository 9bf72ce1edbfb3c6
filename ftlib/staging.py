"""Bring what a config needs into the shared store, on the login node: model, processor and datasets.

What needs torch (making an embedded model, converting a checkpoint of big_vision) is imported when it is called.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections import deque
from dataclasses import dataclass
from pathlib import Path

from ftlib.config.loader import Experiment
from ftlib.config.npz_checkpoints import NpzCheckpoint
from ftlib.config.schema import Config, Data, Model
from ftlib.core import files, imports, log, permissions
from ftlib.core.lease import compute_once
from ftlib.core.paths import Site
from ftlib.errors import UserError
from ftlib.hub import cache, download
from ftlib.runs import events
from ftlib.runs.run import run_for


@dataclass(frozen=True)
class StagedFiles:
    """Where the files of a config are.

    Attributes:
        model: folder of the model and its processor; of an adapter, the adapter's.
        datasets: name of each dataset of a mixture, else the source → folder.
    """

    model: Path
    datasets: dict[str, Path]


def stage(experiment: Experiment, site: Site) -> StagedFiles:
    """Stage the datasets and the model of a config; what is there already is kept.

    Raises:
        UserError: not on the hub, no access, or no space.
    """
    config, datasets = experiment.config, {}
    with permissions.group_writable(site), events.record_pretraining_failure(run_for(experiment, site), "stage"):
        for name, part in config.data.datasets.items():  # first: with a model, the hub is switched off
            datasets[name or part.source] = folder = _stage_data(part, site)
            log.info(f"dataset {part.source}: {folder}")
        if experiment.npz:
            model = _convert(experiment.npz, site)
            log.info(f"model {experiment.npz.file}: {model}")
        else:
            model = _stage_model(config, site)
            own = " (a local folder: nothing to download)" if cache.is_local_path(config.model.base) else ""
            log.info(f"model {config.model.base}: {model}{own}")
    return StagedFiles(model, datasets)


def stage_by_name(name: str, revision: str | None, site: Site) -> Path:
    """The folder in the store of a model or adapter of the hub.

    Raises:
        UserError: not on the hub, no access, or no space.
    """
    model = Model(family="causal", base=name, revision=revision)
    with permissions.group_writable(site):
        folder = download.stage_model(model, site)
        cache.model_hashes(folder, site)
    return folder


def _stage_model(config: Config, site: Site) -> Path:
    """Stage the model and hash its files, so that jobs need not."""
    embedded = cache.is_embedded(config.model)
    folder = cache.embedded_folder(config.model, site) if embedded else download.stage_model(config.model, site)
    if embedded and not files.is_complete(folder):
        with imports.quick_imports():
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
    from ftlib.data.sources.image_references import stage_urls
    from ftlib.data.sources.registry import TOY_DATASETS, iter_examples

    if data.source == "hub":
        name = data.file.partition(":")[0]
        if not cache.is_local_path(name):
            download.stage_dataset(name, site)
        if importlib.util.find_spec("datasets"):
            hf_datasets.fetch(data)
        else:
            log.info("its images are extracted in the container: by the job, or with `jobs/run.sh ftlib stage …`")
    if data.allow_urls:
        count = stage_urls(data, lambda: deque(iter_examples(data), maxlen=0))
        log.info(f"images by URL: {count:,}")
    root = Path(data.root)
    if data.source in TOY_DATASETS and not files.is_complete(root):
        with files.atomic_directory(root) as temporary:
            TOY_DATASETS[data.source](temporary)
    return root
