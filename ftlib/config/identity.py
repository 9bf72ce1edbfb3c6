"""What names a run: the fields of a config that decide the trained weights, and the recipe that it is trained with.

A new config key must not rename what exists. Keys that hashes held before this rule stand in `ORIGINAL_KEYS` and enter
with their value, whatever it is; any other key enters only where it differs from its default. The same holds for saved
configs, so that the code that a run has pinned can read them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from ftlib.config import hf_fields
from ftlib.config.schema import CHAT, Attention, Config, Full, Lora, Section
from ftlib.core.files import json_sha256

ORIGINAL_KEYS: dict[str, frozenset[str]] = {
    section: frozenset(keys.split())
    for section, keys in {
        "Config": "name task seed warm_start model adapter data training loss guard rounds batch checkpoint evaluation"
        " job sweep",
        "Model": "family base revision dtype attention final_softcap quantization max_length too_long",
        "Lora": "method r alpha dropout rslora targets freeze",
        "Full": "method freeze",
        "Attention": "method",
        "Data": "source root parts file columns balanced prompt on_bad frames split",
        "Part": "name source root file columns balanced prompt weight",
        "SplitRule": "valid test seed stratify_by official sets set folds fold max_train max_eval",
        "Loss": "average label_smoothing on packing",
        "Guard": "max_loss above spike patience restarts learning_rate_factor",
        "Round": "learning_rate until",
        "Until": "split metric at_least",
        "Batch": "auto",
        "Checkpoint": "steps minutes keep best",
        "Best": "metric every patience",
        "Evaluation": "splits before decode num_beams max_new_tokens generation batch_size positive min_precision"
        " prompts mask_decoder without_context",
        "Job": "cpus gpus gpu_type mem time nodes partition account qos constraint exclude mail_type mail_user sbatch"
        " array_parallelism",
        "Recipe": "base revision models method density trim normalize scale seed layer parts form output",
        "Input": "model weight",
    }.items()
}
"""Section → its keys of version 0.1, frozen: nothing is ever added. A key that the schema loses needs its default put
in where it is hashed."""

_NOT_IN_RESULT = {
    "Config": {"name", "batch", "checkpoint", "evaluation", "job", "plugins", "privacy", "sweep"},
    "Model": {"attention"},
    "Guard": {"restarts"},
}
"""Section → keys that never enter an identity, since they cannot change the trained weights; of plugins only the
content does."""

_GENERATION_KEYS = ("num_beams", "max_new_tokens", "generation", "positive", "mask_decoder")


@dataclass(frozen=True)
class RecipeChange:
    """A change of the code that changes the weights which an unchanged config leads to.

    Attributes:
        recipe: 1, 2, … in the order in which they came.
        description: in words, as in "full fine-tuning in bfloat16 trains float32 weights".
        affects: whether a config's weights differ; the others keep their names.
    """

    recipe: int
    description: str
    affects: Callable[[Config], bool]


def _trains_in_bfloat16(config: Config) -> bool:
    """Whether weights would train in bfloat16 themselves."""
    return isinstance(config.adapter, Full) and config.adapter.master_weights and config.model.dtype == "bfloat16"


def _decays_excluded_parameters(config: Config) -> bool:
    """Whether weight decay was for parameters that it leaves alone now: magnitudes of DoRA, tables of embeddings.

    A text model's tables of positions count as its language part.
    """
    adapter = config.adapter
    if not float(config.training.get("weight_decay") or 0) > 0 or isinstance(adapter, Attention):
        return False
    if isinstance(adapter, Lora):
        return adapter.method == "dora"
    return "vision" not in config.model.entry.parts or not {"vision", "embeddings"} <= set(adapter.freeze)


MASTER_WEIGHTS = RecipeChange(2, "full fine-tuning in bfloat16 trains float32 master weights", _trains_in_bfloat16)

RECIPES: tuple[RecipeChange, ...] = (
    RecipeChange(
        1,
        "answers of a chat are trained as the model's template writes them",
        lambda config: config.data.prompt == CHAT,
    ),
    MASTER_WEIGHTS,
    RecipeChange(3, "weight_decay spares embeddings and DoRA's magnitudes", _decays_excluded_parameters),
    RecipeChange(4, "rows are read, named and kept together by their content", lambda config: True),
)
"""Code that trains something else than before for some unchanged configs gets an entry here, the last one:

    RecipeChange(1, "biases are not decayed", lambda config: float(config.training.get("weight_decay", 0)) > 0),

Runs of the configs that it affects are new runs from then on. Those that exist keep their names: unfinished ones go on
with the code that they have pinned, finished ones can be evaluated, reported and merged. Entries are never changed or
removed. A change that only a new config key brings about needs none.
"""


def recipes_of(config: Config) -> list[int]:
    """The recipes that a config was ever trained with, newest first; 0 is the code before all changes."""
    return [*sorted((change.recipe for change in RECIPES if change.affects(config)), reverse=True), 0]


def changes_since(config: Config, recipe: int) -> list[str]:
    """What a recipe lacks of the newest one, in words, as far as it concerns a config."""
    return [change.description for change in RECIPES if change.recipe > recipe and change.affects(config)]


def describe_recipe(config: Config, recipe: int) -> str:
    """A sentence about the recipe that a run was made with; empty where there was never another one for its config."""
    if recipes_of(config) == [0]:
        return ""
    since = "; ".join(changes_since(config, recipe))
    return f" Recipe {recipe}{f' (changed since: {since})' if since else ''}."


def canonical_fields(section: Section, without: Mapping[str, Collection[str]] | None = None) -> dict[str, Any]:
    """A section as plain data in which keys newer than `ORIGINAL_KEYS` stand only where they differ from their
    defaults.

    Args:
        without: section's class name → keys to leave out.
    """
    kind = type(section)
    left_out = (without or {}).get(kind.__name__, ())
    found = {}
    for key, field in kind.model_fields.items():
        value = getattr(section, key)
        default = field.default if field.default_factory is None else field.get_default(call_default_factory=True)
        if key not in left_out and (key in ORIGINAL_KEYS.get(kind.__name__, ()) or value != default):
            found[field.alias or key] = _plain(value, without)
    return found


def _plain(value: Any, without: Mapping[str, Collection[str]] | None) -> Any:
    if isinstance(value, Section):
        return canonical_fields(value, without)
    if isinstance(value, list):
        return [_plain(item, without) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item, without) for key, item in value.items()}
    return value


def identity_fields(config: Config, recipe: int) -> dict[str, Any]:
    """The part of a config that decides the trained weights; its hash names the run.

    Left out: names, intervals of saving, the number of restarts, the job, how an effective batch is cut into
    micro-batches and spread over GPUs, by which program attention is computed, and evaluation where training does not
    look at it.

    Args:
        config: with `${store}` unexpanded in its paths, so that moving the store moves the runs.
    """
    fields = canonical_fields(config, _NOT_IN_RESULT)
    if config.plugins:
        fields["plugins"] = sorted(plugin.identity for plugin in config.plugins)
    fields["training"] = hf_fields.fields_that_change_result(config.training)
    fields["training"]["effective_batch"] = config.effective_batch_size
    if config.checkpoint.best or config.generates_in_training:
        fields["best"] = _plain(config.checkpoint.best, None)
    if config.generates_in_training:
        evaluation = canonical_fields(config.evaluation)
        fields["evaluation"] = {key: evaluation[key] for key in _GENERATION_KEYS if key in evaluation}
    return fields | ({"recipe": recipe} if recipe else {})


def identity(config: Config, recipe: int) -> str:
    """12 hexadecimal digits."""
    return json_sha256(identity_fields(config, recipe))[:12]
