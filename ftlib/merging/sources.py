"""Find the base and the fine-tuned models, and check that they are compatible."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftlib.config.loader import load_experiment
from ftlib.config.schema import Model
from ftlib.core import files, log
from ftlib.core.hashes import hash_files
from ftlib.core.paths import Site
from ftlib.errors import UserError
from ftlib.hub.cache import find_model, is_local_path
from ftlib.merging import checkpoint_io
from ftlib.merging.architecture import differing_fields
from ftlib.merging.checkpoint_io import weight_files
from ftlib.merging.pickled import as_safetensors
from ftlib.merging.vocabulary import check_vocabulary
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
        return files.read_json(path) if self.kind == "model" and path.is_file() else {}


def find_merge_input(text: str, revision: str | None, site: Site) -> MergeInput:
    """Find a model by its folder, its run, or its hub name (staged).

    Raises:
        UserError: it does not exist, or cannot be merged.
    """
    folder = _locate(text, revision, site)
    trained_on = None
    if run := _run_of(folder):
        config = load_experiment(run.config_file, [], site).config
        trained_on = (config.model.base, config.model.revision)
        folder = run.result_folder(config.adapter.method)
        if not run.done_marker.exists():
            raise UserError(f"{text}: not trained yet", "Run `ftlib train` first.")
    origin, folder = folder, as_safetensors(folder, site)
    if not (folder / "adapter_config.json").is_file():
        weight_files(folder)
        return MergeInput(text, folder, "model", trained_on, origin)
    settings = files.read_json(folder / "adapter_config.json")
    named = (settings.get("base_model_name_or_path"), settings.get("revision"))
    return MergeInput(text, folder, "adapter", trained_on or (named if named[0] else None), origin)


def _run_of(folder: Path) -> Run | None:
    """Return the run of a run folder or of a run's result; None for other folders."""
    run = Run(folder.parent if folder.name in ("adapter", "model") else folder)
    own = run.config_file.is_file() and not any(run.folder.glob("*.safetensors"))
    return run if own and (run.folder == folder or run.done_marker.exists()) else None


def _locate(text: str, revision: str | None, site: Site) -> Path:
    folder = Path(text)
    if folder.is_absolute() and folder.is_dir():
        return folder
    if any((site.runs / text).glob("config.yaml")) or any((site.runs / text).glob("*/config.yaml")):
        return runs.find_run(str(site.runs / text), site).folder
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


def check_compatible(base: MergeInput, revision: str | None, model: MergeInput, site: Site) -> None:
    """Check that a model has the same base, architecture, vocabulary and forward pass.

    Raises:
        UserError: something differs, or the base cannot be verified.
    """
    if base.kind != "model":
        raise UserError(f"{base.label}: the base must be a whole model, but this is an adapter")
    for source in (base, model):
        if quantization := source.config.get("quantization_config"):
            method = quantization.get("quant_method", "unknown")
            raise UserError(f"{source.label}: its weights are quantized ({method})", "Merge unquantized weights.")
    for field in ("model_type", "architectures"):
        theirs, ours = model.config.get(field), base.config.get(field)
        if theirs and ours and theirs != ours:
            raise UserError(f"{model.label}: different architecture: {field} is {theirs}, the base's is {ours}")
    if model.config and base.config and (odd := differing_fields(base.folder, model.folder)):
        raise UserError(
            f"{model.label}: its forward pass differs from the base's: {'; '.join(odd)}",
            "The result can have only one config. Merge models that differ only in their weights.",
        )
    check_vocabulary(base.folder, model.folder, model.label)
    if model.trained_on:
        _check_base(base, revision, model, site)


def _check_base(base: MergeInput, revision: str | None, model: MergeInput, site: Site) -> None:
    """Check the base by the hash that the run recorded, else by name, else by comparing the weights."""
    assert model.trained_on
    name, theirs = model.trained_on
    said = f"{name} (revision {theirs})" if theirs else name
    others = UserError(f"{model.label} was trained on {said}, and its weights differ from those of {base.label}")
    run = _run_of(model.origin)
    if run and run.base.exists():
        recorded = {
            digest for file, digest in files.read_json(run.base).items() if file.endswith((".safetensors", ".bin"))
        }
        names = [path.name for path in weight_files(base.folder)]
        if base.origin != base.folder:
            names = [path.name for path in base.origin.glob("*.bin")]
        present = hash_files(base.origin, names, site)
        if not recorded <= set(present.values()):
            raise others
        return
    if (name, theirs) == (base.label, revision):
        return
    try:
        here = Path.cwd() / Path(name).expanduser()  # peft records the path as it was given
        other = find_merge_input(str(here) if here.is_dir() else name, theirs, site)
    except UserError:
        other = None
    if model.kind == "adapter" and (other is None or other.config.get("quantization_config")):
        why = "which was not found" if other is None else "whose quantized weights cannot be compared"
        log.info(f"{model.label} has {said} as its base, {why}: using {base.label}, whose layers match")
        return
    if other is None:
        raise UserError(
            f"{model.label} was trained on {said}, which was not found, so it cannot be compared with {base.label}",
            "Use that base, or stage it.",
        )
    if other.folder.resolve() == base.folder.resolve():
        return
    ours, digests = weight_hashes([base, other])
    if sorted(ours.values()) != sorted(digests.values()):
        raise others
