"""Choose and copy tokenizer, chat template, EOS token, generation settings and other files of a merged model."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftlib.core import files, log
from ftlib.errors import UserError
from ftlib.hub.cache import IMAGE_PROCESSOR_FILES, LICENSE_FILES, MERGE_RECORD, TOKENIZER_FILES, image_resampling
from ftlib.merging.checkpoint_io import is_vocabulary_sized
from ftlib.merging.deltas import FinetunedModel
from ftlib.merging.plan import PlannedTensor
from ftlib.merging.recipe import BASE, Recipe, model_letter
from ftlib.merging.sources import MergeInput
from ftlib.merging.vocabulary import read_vocabulary

_GENERATION = "generation_config.json"
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_OTHER_FILES = ("*.json", "*.model", "*.txt", "*.jinja")
"""Patterns of the base's config and processor files."""


@dataclass(frozen=True)
class TokenizerChoice:
    """The source of the result's tokenizer files.

    Attributes:
        source: BASE, or the number of a model.
        reason: for messages; empty if there was no choice.
    """

    source: str | int
    reason: str = ""

    @property
    def letter(self) -> str:
        """The source's name in a recipe."""
        return self.source if isinstance(self.source, str) else model_letter(self.source)


def choose_tokenizer(recipe: Recipe, base: MergeInput, models: Sequence[MergeInput]) -> TokenizerChoice:
    """Return the recipe's choice; without one, the first model whose chat template, EOS token, generation settings or
    added tokens differ from the base's, because it was trained with them; else the base.
    """
    if recipe.tokenizer_from:
        chosen = recipe.tokenizer_from
        return TokenizerChoice(BASE if chosen == BASE else ord(chosen) - ord("a"), "as set in the recipe")
    ours = _settings(base.folder)
    theirs = {number: _settings(model.folder) for number, model in enumerate(models)}
    sizes = {number: len(found["words"]) for number, found in theirs.items() if "words" in found}
    unlike = {number: _unlike(ours, found) for number, found in theirs.items()}
    candidates = [number for number, names in unlike.items() if names]
    if not candidates:
        return TokenizerChoice(BASE)
    largest = max(sizes.values(), default=0)
    first = next(
        (number for number in candidates if "added tokens" in unlike[number] and sizes[number] == largest),
        candidates[0],
    )
    reason = f"for its {' and '.join(unlike[first])} (different from the base)"
    others = [model_letter(n) for n in candidates if n != first and _unlike(theirs[first], theirs[n])]
    if others:
        reason += f"; those of {' and '.join(others)} differ from both"
    return TokenizerChoice(first, reason)


def require_rows(choice: TokenizerChoice, source: MergeInput, weights: Sequence[PlannedTensor]) -> None:
    """Check that the embeddings have a row for every token of the tokenizer.

    Raises:
        UserError: rows are missing; the model was saved without its enlarged embeddings.
    """
    vocabulary = read_vocabulary(source.folder)
    rows = [weight.entry.shape[0] for weight in weights if is_vocabulary_sized(weight.name)]
    if choice.source == BASE or vocabulary is None or not rows:
        return
    word = max(vocabulary.words, key=vocabulary.words.__getitem__)
    if (number := vocabulary.words[word]) >= min(rows):
        problem = f"{source.label}: its token {word!r} has ID {number}, but the embeddings have {min(rows)} rows"
        raise UserError(problem, "Use the base's tokenizer (--tokenizer-from base), or save it with its embeddings.")


def check_added_rows(
    weights: Sequence[PlannedTensor], models: Sequence[FinetunedModel], sources: Sequence[MergeInput]
) -> None:
    """Report embeddings with more rows than the base's if no tokenizer says for which tokens.

    Raises:
        UserError: another model has such rows, too, so rows of different tokens could be averaged.
    """
    larger: dict[int, tuple[PlannedTensor, int]] = {}
    for weight in weights:
        for number, model in enumerate(models):
            tensor = model.whole(weight.name) if is_vocabulary_sized(weight.name) else None
            if tensor and tensor.rows > weight.base.rows:
                larger.setdefault(number, (weight, tensor.rows))
    for number, (weight, rows) in larger.items():
        source = sources[number]
        if read_vocabulary(source.folder) is None:
            problem = f"{source.label}: {weight.entry.name} has {rows} rows, the base's has {weight.base.rows}"
            problem += ", and there is no tokenizer with the added tokens"
            if len(larger) > 1:
                remedy = (
                    "Copy the tokenizer files of the models into their folders, so that their tokens can be compared."
                )
                raise UserError(f"{problem}; another model has added rows, too", remedy)
            log.warning(f"{problem}; its rows are kept")


def _settings(folder: Path) -> dict[str, Any]:
    """Return chat template, EOS token and generation settings of a folder, if present."""
    config = _json(folder / "tokenizer_config.json")
    template = config.get("chat_template") or _json(folder / "chat_template.json").get("chat_template")
    if (folder / "chat_template.jinja").is_file():
        template = files.read_text(folder / "chat_template.jinja")
    end = config.get("eos_token")
    end = end.get("content") if isinstance(end, dict) else end
    generation = _json(folder / _GENERATION)
    ours = {} if generation.get("_from_model_config") else generation
    vocabulary = read_vocabulary(folder)
    found = {
        "chat template": template,
        "end of sequence": end if isinstance(end, str) else None,
        "generation config": {
            key: value for key, value in ours.items() if value is not None and key != "transformers_version"
        },
        "words": vocabulary and vocabulary.words,
    }
    return {name: value for name, value in found.items() if value}


def _unlike(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """Return the names of the settings in which two models differ."""
    names = [name for name in theirs if name != "words" and theirs[name] != ours.get(name)]
    if theirs.get("words", {}).keys() - ours.get("words", {}).keys():
        names.append("added tokens" if "words" in ours else "vocabulary")
    return names


def _json(path: Path) -> dict[str, Any]:
    found = files.read_json(path) if path.is_file() else {}
    return found if isinstance(found, dict) else {}


def copy_model_files(base: MergeInput, models: Sequence[MergeInput], choice: TokenizerChoice, folder: Path) -> None:
    """Copy config, tokenizer, processor and licences to the result.

    A file that both the base and the chosen model lack is copied from the first model that has it; missing files are
    reported.
    """
    chosen = base if choice.source == BASE else models[int(choice.source)]
    replaced = chosen is not base and read_vocabulary(chosen.folder) is not None
    left_out = [path for path in _matching(base.folder, TOKENIZER_FILES) if replaced and path.name != _GENERATION]
    for path in _matching(base.folder, (*_OTHER_FILES, *TOKENIZER_FILES, *LICENSE_FILES)):
        if path not in left_out:
            _copy(path, base.folder, folder)
    if chosen is not base:
        for path in _matching(chosen.folder, TOKENIZER_FILES):
            _copy(path, chosen.folder, folder)
    _copy_missing([base, *models], folder)
    for number, model in enumerate(models):
        for path in _matching(model.folder, LICENSE_FILES):
            if not any(path.read_bytes() == other.read_bytes() for other in _matching(folder, LICENSE_FILES)):
                shutil.copyfile(path, folder / f"{path.stem}-{model_letter(number)}{path.suffix}")
    if chosen is not base:
        _take_token_ids(chosen, folder)
    _take_resampling(base, models, folder)


def _matching(folder: Path, patterns: Iterable[str]) -> list[Path]:
    """Return files of a folder that belong to a model, except weights, indexes and ftlib's records."""
    found = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    left_out = (files.COMPLETE_MARKER, MERGE_RECORD, "adapter_config.json")
    return sorted(path for path in found if path.name not in left_out and not path.name.endswith(".index.json"))


def _copy(path: Path, root: Path, folder: Path) -> None:
    target = folder / path.relative_to(root)
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, target)


def _copy_missing(sources: Sequence[MergeInput], folder: Path) -> None:
    """Copy config and tokenizer from the first input that has them."""
    if not (folder / "config.json").is_file():
        owner = next((source for source in sources if source.config), None)
        if owner:
            _copy(owner.folder / "config.json", owner.folder, folder)
            log.warning(f"the base has no config.json; using that of {owner.label}")
        else:
            log.warning("no input has a config.json, so transformers cannot load the result")
    if read_vocabulary(folder) is None:
        owner = next((source for source in sources if read_vocabulary(source.folder)), None)
        if owner:
            for path in _matching(owner.folder, TOKENIZER_FILES):
                _copy(path, owner.folder, folder)
            log.warning(f"the base has no tokenizer; using that of {owner.label}")
        elif (folder / "config.json").is_file():
            log.warning("no input has a tokenizer, so the result has none")


def _take_resampling(base: MergeInput, models: Sequence[MergeInput], folder: Path) -> None:
    """Let the result resize images as its models were trained (`model.resize`). An adapter says so if it differs from
    its base.
    """
    ours = image_resampling(base.folder)
    found = [image_resampling(model.folder) for model in models]
    theirs = {ours if one is None else one for one in found}
    if ours is None or theirs == {ours}:
        return
    if len(theirs) > 1:
        log.warning("the models were trained with different `model.resize`; the result resizes images as its base does")
        return
    for path in [folder / name for name in IMAGE_PROCESSOR_FILES if (folder / name).is_file()]:
        settings = files.read_json(path)
        inner = settings.get("image_processor", settings)
        if "resample" in inner:
            inner["resample"] = next(iter(theirs))
            files.write_json(path, settings)


def _take_token_ids(chosen: MergeInput, folder: Path) -> None:
    """Set the EOS token ID in config.json and generation_config.json to the chosen tokenizer's."""
    theirs = {name: chosen.config[name] for name in _TOKEN_IDS if chosen.config.get(name) is not None}
    vocabulary, settings = read_vocabulary(chosen.folder), _settings(chosen.folder)
    end = vocabulary.words.get(settings.get("end of sequence", "")) if vocabulary else None
    if end is not None:
        known = theirs.get("eos_token_id")
        theirs["eos_token_id"] = known if isinstance(known, list) and end in known else end
    config_file, generation_file = folder / "config.json", folder / _GENERATION
    if theirs and config_file.is_file():
        config = files.read_json(config_file)
        nested = config.get("text_config", {})
        inner = {name: value for name, value in theirs.items() if name in nested}
        outer = {name: value for name, value in theirs.items() if name in config or name not in inner}
        files.write_json(config_file, {**config, **outer, **({"text_config": {**nested, **inner}} if inner else {})})
    generation = _json(generation_file)
    known = generation.get("eos_token_id")
    if end is not None and known is not None and end not in (known if isinstance(known, list) else [known]):
        ends = [end, *(known if isinstance(known, list) else [known])]
        files.write_json(generation_file, {**generation, "eos_token_id": ends})
