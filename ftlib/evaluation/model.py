"""A lazily loaded model for evaluation.

Functions import torch, and what imports it, themselves: a finished evaluation needs neither (see `evaluate.py`).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ftlib.config.schema import Config, Evaluation, Lora
from ftlib.core import files, imports
from ftlib.core.out_of_memory import MORE_MEMORY_HINT, oom_as_user_error
from ftlib.core.paths import Site
from ftlib.hub.cache import find_adapter_base, find_model, is_adapter, model_hashes
from ftlib.runs.pinning import verify_base_unchanged
from ftlib.runs.run import Run

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ftlib.models.encoding import EncodedExample
    from ftlib.models.generation import GeneratedAnswer
    from ftlib.models.registry import InputProcessor


@dataclass(frozen=True)
class EvalModel:
    """A model for evaluation, loaded on first use.

    Attributes:
        name: the base model, or the result folder.
        weights: the folder with the model, or with the base of `adapter`.
        config: provides family, dtype and row settings.
        adapter: a PEFT folder, or the checkpoint of `loaded`.
        loaded: the model, if it is already in memory.
    """

    name: str
    weights: Path
    config: Config
    adapter: Path | None = None
    loaded: torch.nn.Module | None = None

    @functools.cached_property
    def processor(self) -> InputProcessor:
        """The model's tokenizer and processor."""
        with imports.quick_imports():
            from ftlib.models.registry import family_of
        return family_of(self.config.model).load_processor(self.weights, self.config)

    @functools.cached_property
    def model(self) -> torch.nn.Module:
        """The loaded model, on the GPU if there is one.

        Raises:
            UserError: out of memory; see also `load_model`.
        """
        if self.loaded is not None:
            return self.loaded
        from ftlib.models.loading import device, load_adapter, load_model

        settings = self.config.model
        model: torch.nn.Module = load_model(self.weights, settings)
        with oom_as_user_error():
            if self.adapter:
                model = load_adapter(model, self.adapter)
            return model.to(device()) if settings.quantization == "none" else model

    @functools.cached_property
    def weights_hash(self) -> str:
        """Return the hash of the weights for scores.json: of the adapter and its base, or of a checkpoint."""
        folders = (self.adapter,) if self.loaded is not None else (self.weights, self.adapter)
        parts = [_weights_hash(folder) for folder in folders if folder]
        return parts[0] if len(parts) == 1 else files.json_sha256(parts)[:16]

    def generate(self, rows: Sequence[EncodedExample], settings: Evaluation) -> list[GeneratedAnswer]:
        """Generate answers, for a batch of rows at a time.

        Raises:
            UserError: out of memory.
        """
        from ftlib.models.generation import generate_with_logprobs

        model = self.model
        beams, batch_size = settings.num_beams, settings.batch_size
        with _smaller_batch(min(len(rows), batch_size)):
            return generate_with_logprobs(
                model, self.processor, rows, settings.max_new_tokens, beams, settings.generation, batch_size
            )

    def label_loglikelihoods(self, rows: Sequence[EncodedExample], labels: Sequence[str]) -> Tensor:
        """Return the log-likelihood of every label for one batch, shape (rows, labels).

        Raises:
            UserError: out of memory.
        """
        from ftlib.models.generation import label_loglikelihoods

        model = self.model
        with _smaller_batch(len(rows)):
            return label_loglikelihoods(model, self.processor, rows, labels)


def _smaller_batch(rows: int) -> contextlib.AbstractContextManager[None]:
    remedy = "Lower evaluation.batch_size; existing predictions are kept."
    return oom_as_user_error(remedy, f"{MORE_MEMORY_HINT} Or: {remedy}", f"with a batch of {rows} rows")


def base_model(config: Config, site: Site) -> EvalModel:
    """Return the base model of a config, for scores before training; an adapter folder is loaded with its base."""
    folder = find_model(config.model, site)
    if is_adapter(folder):
        return EvalModel(config.model.base, find_adapter_base(folder, site), config, adapter=folder)
    return EvalModel(config.model.base, folder, config)


def finetuned_model(config: Config, run: Run, site: Site) -> EvalModel:
    """Return a run's result, for scores after training.

    Raises:
        UserError: the adapter's base has changed since training.
    """
    result = run.result_folder(config.adapter.method)
    if not isinstance(config.adapter, Lora):
        return EvalModel(result.name, result, config)
    base = find_model(config.model, site)
    verify_base_unchanged(run, model_hashes(base, site))
    return EvalModel(result.name, base, config, adapter=result)


def _weights_hash(folder: Path) -> str:
    """Return a hash of the weight files' hashes, which come from the folder's marker or from the files."""
    marker = folder / files.COMPLETE_MARKER
    if marker.is_file():
        return files.json_sha256(files.read_json(marker))[:16]
    weights = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    return files.json_sha256({path.name: files.file_sha256(path) for path in weights})[:16]
