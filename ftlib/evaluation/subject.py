"""The model that is asked."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ftlib import files
from ftlib.config import Config, Evaluation, Lora
from ftlib.hub import find_model, model_hashes
from ftlib.models.families import FAMILIES, Inputs
from ftlib.models.generate import answer_rows, label_likelihoods
from ftlib.models.loading import device, load_adapter, load_model
from ftlib.models.rows import Row
from ftlib.out_of_memory import MORE_MEMORY, enough_memory
from ftlib.pinning import require_base
from ftlib.runs import Run
from ftlib.site import Site


@dataclass(frozen=True)
class Subject:
    """A model to be asked; it is loaded when the first question comes.

    Attributes:
        name: the base model, or the result folder.
        weights: the folder with the model, or with the base of `adapter`.
        config: whose family, type of numbers and rows hold.
        adapter: a PEFT folder, or the checkpoint that `loaded` was saved to.
        loaded: the model, where it is in memory already.
    """

    name: str
    weights: Path
    config: Config
    adapter: Path | None = None
    loaded: torch.nn.Module | None = None

    @functools.cached_property
    def inputs(self) -> Inputs:
        """The model's own tokenizer and processor."""
        return FAMILIES[self.config.model.family].load_inputs(self.weights, self.config)

    @functools.cached_property
    def model(self) -> torch.nn.Module:
        """The weights, on the GPU if there is one.

        Raises:
            UserError: they do not fit into its memory; see also `load_model`.
        """
        if self.loaded is not None:
            return self.loaded
        settings = self.config.model
        model: torch.nn.Module = load_model(self.weights, settings)
        with enough_memory():
            if self.adapter:
                model = load_adapter(model, self.adapter)
            return model.to(device()) if settings.quantization == "none" else model

    @functools.cached_property
    def digest(self) -> str:
        """Identifies the weights in scores.json: those of the adapter and of its base, or a checkpoint's."""
        folders = (self.adapter,) if self.loaded is not None else (self.weights, self.adapter)
        parts = [_digest(folder) for folder in folders if folder]
        return parts[0] if len(parts) == 1 else files.fingerprint(parts)[:16]

    def answer(self, rows: Sequence[Row], settings: Evaluation) -> list[str]:
        """Answer one batch in words of the model's own.

        Raises:
            UserError: out of memory.
        """
        model = self.model
        with _smaller_batch(rows):
            return answer_rows(
                model, self.inputs, rows, settings.max_new_tokens, settings.num_beams, settings.generation
            )

    def weigh(self, rows: Sequence[Row], labels: Sequence[str]) -> Tensor:
        """Log-likelihood of every label for one batch, shape (rows, labels).

        Raises:
            UserError: out of memory.
        """
        model = self.model
        with _smaller_batch(rows):
            return label_likelihoods(model, self.inputs, rows, labels)


def _smaller_batch(rows: Sequence[Row]) -> contextlib.AbstractContextManager[None]:
    remedy = "Set evaluation.batch_size smaller; answers so far are kept."
    return enough_memory(remedy, f"{MORE_MEMORY} Or: {remedy}", f"with a batch of {len(rows)} questions")


def untrained(config: Config, site: Site) -> Subject:
    """The base model of a config, for scores before training."""
    return Subject(config.model.base, find_model(config.model, site), config)


def trained(config: Config, run: Run, site: Site) -> Subject:
    """A run's result, for scores after training.

    Raises:
        UserError: the base of its adapter is not the one that it was trained on.
    """
    result = run.result(config.adapter.method)
    if not isinstance(config.adapter, Lora):
        return Subject(result.name, result, config)
    base = find_model(config.model, site)
    require_base(run, model_hashes(base, site))
    return Subject(result.name, base, config, adapter=result)


def _digest(folder: Path) -> str:
    """Hash of the weight files' hashes (from the folder's marker, or of the files themselves)."""
    marker = folder / files.MARKER
    if marker.is_file():
        return files.fingerprint(files.read_json(marker))[:16]
    weights = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    return files.fingerprint({path.name: files.sha256(path) for path in weights})[:16]
