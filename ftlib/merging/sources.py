"""The base and the fine-tuned models: where they lie, what they are, and whether they belong together."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftlib import files, runs
from ftlib.config import Model
from ftlib.config_file import load_experiment
from ftlib.errors import UserError
from ftlib.hashes import hash_files
from ftlib.hub import find_model, looks_local
from ftlib.merging import threads
from ftlib.merging.tensors import weight_files
from ftlib.runs import Run
from ftlib.site import Site


@dataclass(frozen=True)
class Source:
    """Weights to be merged, or their base.

    Attributes:
        label: as it was named.
        kind: "model" or "adapter".
        trained_on: the base model's name and revision, where that is known.
    """

    label: str
    folder: Path
    kind: str
    trained_on: tuple[str, str | None] | None

    @property
    def config(self) -> dict[str, Any]:
        """config.json; empty for a bare folder of weights."""
        path = self.folder / "config.json"
        return files.read_json(path) if self.kind == "model" and path.is_file() else {}


def find_source(text: str, revision: str | None, site: Site) -> Source:
    """A model by its folder, its run, or its name on the hub (staged).

    Raises:
        UserError: not there, or nothing that can be merged.
    """
    folder = _locate(text, revision, site)
    trained_on = None
    if run := _run_of(folder):
        config = load_experiment(run.config_file, [], site).config
        trained_on = (config.model.base, config.model.revision)
        folder = run.result(config.adapter.method)
        if not run.done.exists():
            raise UserError(f"{text}: not trained yet", "Run `ftlib train` first.")
    if not (folder / "adapter_config.json").is_file():
        weight_files(folder)
        return Source(text, folder, "model", trained_on)
    settings = files.read_json(folder / "adapter_config.json")
    named = (settings.get("base_model_name_or_path"), settings.get("revision"))
    return Source(text, folder, "adapter", trained_on or (named if named[0] else None))


def _run_of(folder: Path) -> Run | None:
    """The run that a folder is, or that it is the result of."""
    run = Run(folder.parent if folder.name in ("adapter", "model") else folder)
    own = run.config_file.is_file() and not any(run.folder.glob("*.safetensors"))
    return run if own and (run.folder == folder or run.done.exists()) else None


def _locate(text: str, revision: str | None, site: Site) -> Path:
    folder = Path(text)
    if folder.is_absolute() and folder.is_dir():
        return folder
    if any((site.runs / text).glob("config.yaml")) or any((site.runs / text).glob("*/config.yaml")):
        return runs.find_run(str(site.runs / text), site).folder
    if looks_local(text):
        raise UserError(f"{text}: no such folder, and no run of that name in {site.runs}")
    return find_model(Model(family="causal", base=text, revision=revision), site)


def hashes(sources: Sequence[Source]) -> list[dict[str, str]]:
    """For each source the SHA-256 of its weight files, from its marker where ftlib wrote one, else computed."""
    paths = [path for source in sources for path in _weights(source) if path.name not in _marked(source.folder)]
    with threads.pool() as executor:
        computed = dict(zip(paths, _hash_all(executor, paths), strict=True))
    found = []
    for source in sources:
        marked = _marked(source.folder)
        found.append({path.name: marked.get(path.name) or computed[path] for path in _weights(source)})
    return found


def _hash_all(executor: ThreadPoolExecutor, paths: Sequence[Path]) -> list[str]:
    return threads.run(executor, files.sha256, paths, threading.Event())


def _weights(source: Source) -> list[Path]:
    names = ["adapter_config.json"] if source.kind == "adapter" else []
    return [*weight_files(source.folder), *(source.folder / name for name in names)]


def _marked(folder: Path) -> dict[str, str]:
    marker = folder / files.MARKER
    if not files.is_complete(folder):
        return {}
    return {name: entry["sha256"] for name, entry in files.read_json(marker).items()}


def check_belonging(base: Source, revision: str | None, model: Source, site: Site) -> None:
    """Refuse a model of another base, architecture or vocabulary.

    Raises:
        UserError: it is; or it cannot be told.
    """
    if base.kind != "model":
        raise UserError(f"{base.label}: the base must be a whole model, and this is an adapter")
    for source in (base, model):
        if quantization := source.config.get("quantization_config"):
            method = quantization.get("quant_method", "unknown")
            raise UserError(f"{source.label}: its weights are quantized ({method})", "Merge unquantized weights.")
    for field in ("model_type", "architectures"):
        theirs, ours = model.config.get(field), base.config.get(field)
        if theirs and ours and theirs != ours:
            raise UserError(f"{model.label}: another architecture: {field} is {theirs}, the base's is {ours}")
    _check_vocabulary(base, model)
    if model.trained_on:
        _check_base(base, revision, model, site)


def _check_vocabulary(base: Source, model: Source) -> None:
    ours, theirs = _vocabulary(base.folder), _vocabulary(model.folder)
    if ours and theirs and ours != theirs:
        example = min(ours.items() ^ theirs.items(), key=lambda item: (item[1], item[0]))
        raise UserError(
            f"{model.label}: another vocabulary: {len(theirs):,} words, the base has {len(ours):,}; "
            f"they differ in {example[0]!r}, number {example[1]}",
            "Merge models with the base's own vocabulary.",
        )


def _vocabulary(folder: Path) -> dict[str, int]:
    """Words → ids of tokenizer.json, added ones included; empty if there is none."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return {}
    tokenizer = files.read_json(path)
    words = tokenizer["model"].get("vocab", {})
    if isinstance(words, list):  # Unigram: [word, score] by number
        words = {word[0]: number for number, word in enumerate(words)}
    return {**words, **{token["content"]: token["id"] for token in tokenizer.get("added_tokens", ())}}


def _check_base(base: Source, revision: str | None, model: Source, site: Site) -> None:
    """By content where the run recorded it, else by name, else by the weights of the base that is named."""
    assert model.trained_on
    name, theirs = model.trained_on
    said = f"{name} (revision {theirs})" if theirs else name
    others = UserError(f"{model.label} was trained on {said}, and its weights differ from those of {base.label}")
    run = _run_of(model.folder)
    if run and run.base.exists():
        recorded = {
            digest for file, digest in files.read_json(run.base).items() if file.endswith((".safetensors", ".bin"))
        }
        present = hash_files(base.folder, [path.name for path in weight_files(base.folder)], site)
        if not recorded <= set(present.values()):
            raise others
        return
    if (name, theirs) == (base.label, revision):
        return
    try:
        here = Path.cwd() / Path(name).expanduser()  # peft notes a base's folder as it was named
        folder = find_source(str(here) if here.is_dir() else name, theirs, site).folder
    except UserError:
        raise UserError(
            f"{model.label} was trained on {said}, which is not here; whether that is {base.label} cannot be told",
            "Name that base, or stage it. If it is the same, correct base_model_name_or_path in adapter_config.json.",
        ) from None
    if folder.resolve() == base.folder.resolve():
        return
    one, other = hashes([base, Source(name, folder, "model", None)])
    if sorted(one.values()) != sorted(other.values()):
        raise others
