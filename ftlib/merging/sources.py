"""The base and the fine-tuned models of a merge: where they are, what they are, and the hashes of their weights."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftlib.config.loader import load_experiment
from ftlib.config.schema import Model
from ftlib.core import files
from ftlib.core.paths import Site
from ftlib.errors import UserError
from ftlib.hub.cache import find_model, is_local_path
from ftlib.merging import checkpoint_io
from ftlib.merging.checkpoint_io import weight_files
from ftlib.merging.pickled import as_safetensors
from ftlib.runs import run as runs
from ftlib.runs.run import Run


@dataclass(frozen=True)
class MergeInput:
    """Weights to be merged, or their base.

    Attributes:
        label: the name or path given by the user.
        kind: "model" or "adapter".
        trained_on: name and revision of the base model, if known.
        origin: the folder where it was found; differs from `folder` if its .bin files were converted.
    """

    label: str
    folder: Path
    kind: str
    trained_on: tuple[str, str | None] | None
    origin: Path

    @property
    def config(self) -> dict[str, Any]:
        """Return config.json; empty for a folder of weights only."""
        path = self.folder / "config.json"
        return files.read_json_object(path) if self.kind == "model" and path.is_file() else {}


def find_merge_input(text: str, revision: str | None, site: Site) -> MergeInput:
    """Find a model by its folder, its run, or its hub name (staged).

    Raises:
        UserError: it does not exist, or cannot be merged.
    """
    folder = _locate(text, revision, site)
    trained_on = None
    if run := run_of(folder):
        config = load_experiment(run.config_file, [], site).config
        trained_on = (config.model.base, config.model.revision)
        folder = run.result_folder(config.adapter.method)
        if not run.done_marker.exists():
            raise UserError(f"{text}: not trained yet", "Run `ftlib train` first.")
    origin, folder = folder, as_safetensors(folder, site)
    if not (folder / "adapter_config.json").is_file():
        weight_files(folder)
        return MergeInput(text, folder, "model", trained_on, origin)
    settings = files.read_json_object(folder / "adapter_config.json")
    name, own = settings.get("base_model_name_or_path"), settings.get("revision")
    if not all(isinstance(each, (str, type(None))) for each in (name, own)):
        raise UserError(f"{folder / 'adapter_config.json'}: base_model_name_or_path and revision must be text or null")
    return MergeInput(text, folder, "adapter", trained_on or ((name, own) if name else None), origin)


def run_of(folder: Path) -> Run | None:
    """Return the run of a run folder or of a run's result; None for other folders."""
    run = Run(folder.parent if folder.name in ("adapter", "model") else folder)
    own = run.config_file.is_file() and not any(run.folder.glob("*.safetensors"))
    return run if own and (run.folder == folder or run.done_marker.exists()) else None


def _locate(text: str, revision: str | None, site: Site) -> Path:
    folder = Path(text)
    if folder.is_absolute() and folder.is_dir():
        return folder
    if any((site.runs / text).glob("config.yaml")) or any((site.runs / text).glob("*/config.yaml")):
        return runs.find_run(str(site.runs / text), site, prefer_trained=True).folder
    if is_local_path(text):
        raise UserError(f"{text}: no such folder, and no run with that name in {site.runs}")
    return find_model(Model(family="causal", base=text, revision=revision), site)


def weight_hashes(sources: Sequence[MergeInput]) -> list[dict[str, str]]:
    """Return the SHA-256 of the weight files of each source, from ftlib's marker file or computed."""
    paths = [
        path for source in sources for path in _weights(source) if path.name not in _hashes_of_marker(source.folder)
    ]
    with checkpoint_io.thread_pool() as executor:
        computed = dict(zip(paths, _hash_all(executor, paths), strict=True))
    found = []
    for source in sources:
        marked = _hashes_of_marker(source.folder)
        found.append({path.name: marked.get(path.name) or computed[path] for path in _weights(source)})
    return found


def _hash_all(executor: ThreadPoolExecutor, paths: Sequence[Path]) -> list[str]:
    return checkpoint_io.run_in_threads(executor, files.file_sha256, paths, threading.Event())


def _weights(source: MergeInput) -> list[Path]:
    names = ["adapter_config.json"] if source.kind == "adapter" else []
    return [*weight_files(source.folder), *(source.folder / name for name in names)]


def _hashes_of_marker(folder: Path) -> dict[str, str]:
    marker = folder / files.COMPLETE_MARKER
    if not files.is_complete(folder):
        return {}
    return {name: entry["sha256"] for name, entry in files.read_json(marker).items()}
