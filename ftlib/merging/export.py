"""One run's result as a whole model, which transformers loads without PEFT: a merge of one model over its base."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

from ftlib.config.loader import load_experiment
from ftlib.config.schema import Config, Lora
from ftlib.core import log
from ftlib.core.paths import Site
from ftlib.errors import UserError
from ftlib.hub.cache import find_adapter_base, is_adapter
from ftlib.hub.offline import offline
from ftlib.merging.architecture import is_tied, read_config
from ftlib.merging.checkpoint_io import model_part_of
from ftlib.merging.deltas import canonical_weights
from ftlib.merging.merge import merge
from ftlib.merging.plan import without_tied_head
from ftlib.merging.recipe import MERGED, Input, MergePart, Recipe
from ftlib.merging.sources import MergeInput, find_merge_input, run_of
from ftlib.runs import run as runs

Dtype = Literal["float32", "float16", "bfloat16"]


@offline()
def export(name: str, output: Path, dtype: Dtype | None, site: Site) -> Path:
    """Write a run's result as a whole model; resumes an interrupted export.

    Args:
        name: run folder or its name, or the folder of an adapter, whose base is then the one that it names.
        dtype: of the weights; default: that of the base's file, or of a fully trained model.

    Returns:
        The folder of the model.

    Raises:
        UserError: no such run, not trained yet, base not found or changed since, an existing output, or no space.
    """
    folder = Path(name).absolute()
    run = run_of(folder)
    if not run and is_adapter(folder):
        return _export(folder, str(find_adapter_base(folder, site)), None, output, dtype, None, site)
    run = run or runs.find_run(name, site)
    config = load_experiment(run.config_file, [], site).config
    if not run.done_marker.exists():
        raise UserError(f"{run.folder}: not trained yet", "Run `ftlib train` first.")
    if not isinstance(config.adapter, Lora):  # the result is a whole model already, and needs no base
        result = run.result_folder(config.adapter.method)
        return _export(result, str(result), None, output, dtype, None, site)
    if config.model.quantization != "none":
        log.warning(
            f"the adapter was trained over {config.model.quantization} weights and is added to the unquantized ones: "
            "answers can differ slightly from the run's; score the result before you use it"
        )
    return _export(run.folder, config.model.base, config.model.revision, output, dtype, config, site)


def _export(
    model: Path, base: str, revision: str | None, output: Path, dtype: Dtype | None, config: Config | None, site: Site
) -> Path:
    def set_attention(folder: Path) -> None:
        """Store the attention and softcap that the run was trained with, as a fully trained model does."""
        from ftlib.models.loading import model_config
        from ftlib.models.registry import family_of

        stored = read_config(folder)
        assert config and stored
        trained = model_config(folder, family_of(config.model), config.model.final_softcap)
        if trained.to_dict() != stored.to_dict():
            trained.save_pretrained(folder)

    recipe = Recipe(
        base=base,
        revision=revision,
        models=[Input(model=str(model))],
        method="linear",
        parts=dict.fromkeys(_parts(find_merge_input(base, revision, site)), MERGED),
        dtype=dtype,
        output=str(output),
    )
    return merge(recipe, site, set_attention if config else None)


def _parts(base: MergeInput) -> list[MergePart]:
    """The parts that a merge of a vision-language model would take from the base alone."""
    weights = without_tied_head(base.label, canonical_weights(base.folder), is_tied(read_config(base.folder)))
    found = {model_part_of(name) for name in weights}
    return [part for part in get_args(MergePart) if part in found]
