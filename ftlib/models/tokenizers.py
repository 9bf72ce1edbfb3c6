"""The tokenizer of a causal model's folder, read and compared with the model's own config."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from ftlib.errors import UserError
from ftlib.hub import require_model

_REMEDY = "The folder needs the tokenizer's files (tokenizer.json or tokenizer.model, tokenizer_config.json)."


def load_tokenizer(folder: Path) -> tuple[PreTrainedTokenizerBase, PreTrainedConfig]:
    """Read the tokenizer of a model folder, and the config of its text model.

    Raises:
        UserError: no tokenizer there, or one of another model.
    """
    require_model(folder)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True).get_text_config()
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, ImportError) as error:
        problem = f"{folder}: no tokenizer can be read from it: {str(error).splitlines()[0]}"
        raise UserError(problem, _REMEDY) from None
    if fault := _misfit(tokenizer, config):
        raise UserError(f"{folder}: tokenizer and model do not belong together: {fault}", _REMEDY)
    return tokenizer, config


def written_bos(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The beginning-of-sequence token, if the tokenizer puts one before every text."""
    first = tokenizer("a")["input_ids"][:1]
    return first if tokenizer.bos_token_id is not None and first == [tokenizer.bos_token_id] else []


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """Everything that is no text: the named special tokens and the added ones (turns of a chat)."""
    added = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    return added | set(tokenizer.all_special_tokens)


def _misfit(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> str | None:
    """What cannot be true of a model's own tokenizer.

    A model's table often has more rows than there are tokens, and a fine-tuned chat model ends on another token than
    its config says (the end of a turn). But an id beyond the table, an end that is plain text to the tokenizer, or
    another beginning than the model learned, are another model's.
    """
    highest = max(tokenizer.get_vocab().values())
    if highest >= config.vocab_size:
        return f"token ids up to {highest}, {config.vocab_size} rows of embeddings"
    special = set(tokenizer.convert_tokens_to_ids(sorted(special_tokens(tokenizer))))
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    if ends != [None] and not special & set(ends):
        return f"eos is {_listed(ends)} in the model, which is no special token of the tokenizer"
    written = written_bos(tokenizer)
    if written and config.bos_token_id is not None and written != [config.bos_token_id]:
        return f"bos is {written[0]} in the tokenizer, {config.bos_token_id} in the model"
    return None


def _listed(ids: list[int]) -> str:
    return " or ".join(map(str, ids))
