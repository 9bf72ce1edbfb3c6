"""Whether models can be merged: the same architecture, forward pass, vocabulary and base.

Shapes and names of single weights are checked in plan.py, an adapter's layers in architecture.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ftlib.core import files, log
from ftlib.core.hashes import hash_files
from ftlib.core.paths import Site
from ftlib.errors import UserError
from ftlib.merging.architecture import read_config
from ftlib.merging.checkpoint_io import weight_files
from ftlib.merging.sources import MergeInput, find_merge_input, run_of, weight_hashes
from ftlib.merging.vocabulary import read_vocabulary

_NEUTRAL = re.compile(
    r"_.*|(bos|eos|pad|sep|cls|mask|unk|decoder_start|forced_bos|forced_eos)_token_id|vocab_size|architectures"
    r"|auto_map|model_type|transformers_version|(torch_)?dtype|name_or_path|use_cache|tie_word_embeddings"
    r"|quantization_config|attn_implementation|id2label|label2id|num_labels|problem_type|.*dropout.*|.*_pdrop"
    r"|initializer_.*|output_(attentions|hidden_states|router_logits)|return_dict|use_return_dict|.*aux_loss_coef"
    r"|chunk_size_feed_forward|pretraining_tp|gradient_checkpointing|unsloth.*|model_max_length|keys_to_ignore.*"
    r"|finetuning_task|task_specific_params|tokenizer_class|suppress_tokens|begin_suppress_tokens|torchscript"
)
"""Fields of a config that do not affect the forward pass, or that are compared elsewhere."""

_UNCOMPARABLE = "cannot check that {} has the base's vocabulary"


def check_compatible(base: MergeInput, revision: str | None, model: MergeInput, site: Site) -> None:
    """Check that a model has the same base, architecture, vocabulary and forward pass.

    Raises:
        UserError: something differs, or the base cannot be verified.
    """
    if base.kind != "model":
        raise UserError(f"{base.label}: the base must be a whole model, but this is an adapter")
    for source in (base, model):
        if quantization := source.config.get("quantization_config"):
            method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else "unknown"
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
    if model.trained_on and model.folder != base.folder:
        _check_base(base, revision, model, site)


def differing_fields(ours: Path, theirs: Path) -> list[str]:
    """Return the fields of two models' configs that differ and affect the forward pass, with both values.

    Missing fields have transformers' defaults, and older spellings are read as transformers does. For an architecture
    that transformers does not know, the fields that both have are compared.
    """
    one, other = _comparable(ours), _comparable(theirs)
    if not one or not other:
        one, other = files.read_json(ours / "config.json"), files.read_json(theirs / "config.json")
    return [f"{field} is {b!r}, the base's is {a!r}" for field, a, b in _differences(one, other)]


def _comparable(folder: Path) -> dict[str, Any]:
    from ftlib.models.attention import configure_final_softcap, use_full_attention

    config = read_config(folder)
    if config is None:
        return {}
    if config.model_type == "paligemma":  # ftlib ignores the checkpoint's value, see models/attention.py
        use_full_attention(config)
        configure_final_softcap(config, "auto", usual=False)
    found: dict[str, Any] = config.to_dict()
    return found


def _differences(
    ours: Mapping[str, Any], theirs: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    for key in sorted(ours.keys() & theirs.keys()):
        a, b = ours[key], theirs[key]
        if _NEUTRAL.fullmatch(key) or a == b:
            continue
        if isinstance(a, dict) and isinstance(b, dict) and not key.startswith("rope"):
            yield from _differences(a, b, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", a, b


def check_vocabulary(base: Path, model: Path, label: str, other: str = "the base") -> None:
    """Check that tokens have the same IDs in a model and in the base.

    Tokens that only one of them has are allowed: they use added or spare rows.

    Args:
        other: the label of `base`, if it is another model.

    Raises:
        UserError: the vocabularies conflict.
    """
    ours, theirs = read_vocabulary(base), read_vocabulary(model)
    if ours is None or theirs is None or (other != "the base" and ours.kind != theirs.kind):
        if other != "the base":
            return
        if theirs is not None or (ours is not None and (model / "tokenizer_config.json").is_file()):
            log.warning(f"{_UNCOMPARABLE.format(label)}: one of them has no readable vocabulary file")
        return
    if ours.kind != theirs.kind:
        log.warning(f"{_UNCOMPARABLE.format(label)}: only one is a tiktoken file")
        return
    numbers = {number: word for word, number in ours.words.items()}
    odd = [
        (number, word)
        for word, number in theirs.words.items()
        if (ours.words[word] != number if word in ours.words else number in numbers)
    ]
    if odd:
        number, word = min(odd)
        others = ours.words.get(word)
        said = f"in {other} {numbers.get(number)!r}" if others is None else f"ID {others} in {other}"
        raise UserError(
            f"{label}: different vocabulary: {len(odd):,} of its {len(theirs.words):,} tokens differ from the "
            f"{len(ours.words):,} of {other}: {word!r} has ID {number}, {said}",
            "Merge models with the base's vocabulary.",
        )
    if other != "the base":
        return
    if added := sorted(theirs.words.keys() - ours.words.keys(), key=theirs.words.__getitem__):
        shown = ", ".join(f"{word!r} ({theirs.words[word]})" for word in added[:3]) + (" …" if len(added) > 3 else "")
        log.warning(f"{label}: {len(added)} tokens that the base's tokenizer lacks: {shown}")


def _check_base(base: MergeInput, revision: str | None, model: MergeInput, site: Site) -> None:
    """Check the base by the hash that the run recorded, else by name, else by comparing the weights."""
    assert model.trained_on
    name, theirs = model.trained_on
    said = f"{name} (revision {theirs})" if theirs else name
    others = UserError(f"{model.label} was trained on {said}, and its weights differ from those of {base.label}")
    run = run_of(model.origin)
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
