"""The run ID: a hash of the config fields that determine the trained weights, and of the recipe.

A new config key must not rename existing runs. Keys in `ORIGINAL_KEYS` are always part of the hash; any other key only
if its value differs from the default. The same holds for saved configs, so that a run's pinned code can read them.
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
"""Section → its keys of version 0.1. Never add keys. If the schema loses a key, its default must still be hashed."""

_NOT_IN_RESULT = {
    "Config": {"name", "batch", "checkpoint", "evaluation", "job", "parallel", "plugins", "privacy", "sweep"},
    "Model": {"attention"},
    "Guard": {"restarts"},
}
"""Section → keys that are never part of a run ID, because they cannot change the trained weights. Of a plugin, only the
content is part of it."""

_GENERATION_KEYS = ("num_beams", "max_new_tokens", "generation", "positive", "mask_decoder")


@dataclass(frozen=True)
class RecipeChange:
    """A change of the code after which an unchanged config gives different weights.

    Attributes:
        recipe: 1, 2, … in order of time.
        description: for messages, such as "full fine-tuning in bfloat16 trains float32 weights".
        affects: whether a config's weights change; other configs keep their run IDs.
    """

    recipe: int
    description: str
    affects: Callable[[Config], bool]


def _trains_in_bfloat16(config: Config) -> bool:
    """Whether the weights without master weights would train in bfloat16."""
    return isinstance(config.adapter, Full) and config.adapter.master_weights and config.model.dtype == "bfloat16"


def _decays_excluded_parameters(config: Config) -> bool:
    """Whether weight decay applied to parameters that are now excluded: DoRA magnitudes and embeddings.

    The position embeddings of a text model count as its language part.
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
"""A change of the code that changes the weights of some unchanged configs gets an entry at the end:

    RecipeChange(1, "biases are not decayed", lambda config: float(config.training.get("weight_decay", 0)) > 0),

Affected configs then get new run IDs. Existing runs keep theirs: unfinished ones resume with their pinned code,
finished ones can be evaluated, reported and merged. Never change or remove an entry. A change that needs a new config
key to take effect needs no entry.
"""


def recipes_of(config: Config) -> list[int]:
    """Return all recipes of a config, newest first; 0 is the code before all changes."""
    return [*sorted((change.recipe for change in RECIPES if change.affects(config)), reverse=True), 0]


def changes_since(config: Config, recipe: int) -> list[str]:
    """Return descriptions of the changes since a recipe that affect a config."""
    return [change.description for change in RECIPES if change.recipe > recipe and change.affects(config)]


def describe_recipe(config: Config, recipe: int) -> str:
    """Return a sentence about a run's recipe; empty if its config always had the same one."""
    if recipes_of(config) == [0]:
        return ""
    since = "; ".join(changes_since(config, recipe))
    return f" Recipe {recipe}{f' (changed since: {since})' if since else ''}."


def canonical_fields(section: Section, without: Mapping[str, Collection[str]] | None = None) -> dict[str, Any]:
    """Return a section as plain data; keys newer than `ORIGINAL_KEYS` are omitted if they have their defaults.

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
    """Return the fields of a config that determine the trained weights; their hash is the run ID.

    Not included: names, checkpoint intervals, the number of restarts, the job, how an effective batch is split into
    micro-batches and over GPUs, the attention implementation, and evaluation if training does not depend on it.

    Args:
        config: with `${store}` unexpanded in its paths, so that the IDs survive moving the store.
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
    """Return the run ID: 12 hexadecimal digits."""
    return json_sha256(identity_fields(config, recipe))[:12]
