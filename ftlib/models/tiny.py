"""Embedded models: real architectures at toy size, made once where others are downloaded.

`ftlib/smollm2-135m-instruct` is not a toy: it is downloaded, see `smollm2.py`.

`ftlib/tiny-paligemma` is a PaliGemmaForConditionalGeneration with random weights and a PaliGemmaProcessor whose
tokenizer knows every character (ASCII as tokens, the rest as UTF-8 bytes), `<image>`, `<loc0000>`…`<loc1023>` and
`<seg000>`…`<seg127>`. It learns the digits from scratch in about a minute on two cores. `ftlib/tiny-paligemma-detect`
is the same with smaller patches of a larger image: it sees where something is.
"""

from __future__ import annotations

import math
import string
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models
from transformers import (
    AddedToken,
    GemmaTokenizer,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    PreTrainedTokenizerFast,
    SiglipImageProcessorPil,
)

from ftlib.errors import UserError
from ftlib.models import smollm2
from ftlib.models.libraries import quiet_libraries

# The embedded causal model `ftlib/tiny-neox`: a GPT-NeoX with random weights and a tokenizer of characters.
#
# The tokenizer knows every character (ASCII as tokens, the rest as UTF-8 bytes) and `<eos>`. The model learns string
# tasks from scratch in minutes on two cores.

TINY_NEOX_WIDTH = 96
POSITIONS = 512
EOS = "<eos>"
_TINY_NEOX_PRINTABLE = sorted(set(string.printable) - set("\x0b\x0c\r"))


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token for every character of ASCII, one for every byte of others."""
    vocabulary = [EOS, "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *_TINY_NEOX_PRINTABLE]
    numbers = {token: number for number, token in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.BPE(numbers, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, unk_token="<unk>", pad_token=EOS)


def tiny_neox(tokenizer: PreTrainedTokenizerFast, **settings: float) -> GPTNeoXForCausalLM:
    """Random weights from a fixed seed; the caller's random state is left as it was."""
    config = GPTNeoXConfig(
        vocab_size=-(-len(tokenizer) // 64) * 64,
        hidden_size=TINY_NEOX_WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=4 * TINY_NEOX_WIDTH,
        max_position_embeddings=POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0},
        initializer_range=TINY_NEOX_WIDTH**-0.5,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **settings,
    )
    with torch.random.fork_rng():
        torch.manual_seed(WEIGHTS_SEED)
        return GPTNeoXForCausalLM(config)


def make_tiny_neox(folder: Path) -> None:
    """Write model and tokenizer into a folder."""
    tokenizer = tiny_tokenizer()
    tiny_neox(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# The PaliGemmas, and all embedded models by name.

WEIGHTS_SEED = 0
IMAGE_SIZE, PATCH_SIZE = 32, 16
DETECTION_SIZES = 48, 8
"""Image and patch in pixels."""

WIDTH = 128
INITIALIZER_RANGE = WIDTH**-0.5
"""transformers' default of 0.02 suits widths of some 2,000; at this width it starts on a long plateau (.59 for .98)."""

_SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
_TINY_PRINTABLE = sorted(set(string.printable) - set("\x0b\x0c\r "))
_VISION = {
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
_TEXT = {
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "initializer_range": INITIALIZER_RANGE,
}


def make_embedded(name: str, folder: Path) -> None:
    """Write an embedded model's files into a folder.

    Raises:
        UserError: no embedded model of that name.
    """
    if name not in EMBEDDED_MODELS:
        raise UserError(f"model.base: {name}: no such embedded model", f"There are: {', '.join(EMBEDDED_MODELS)}")
    quiet_libraries()
    EMBEDDED_MODELS[name](folder)


def tiny_processor(size: int = IMAGE_SIZE, patch: int = PATCH_SIZE) -> PaliGemmaProcessor:
    """A processor with a character tokenizer; images become `size` pixels wide and high, in patches of `patch`."""
    vocabulary = [*_SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *_TINY_PRINTABLE, "▁"]
    tokenizer = GemmaTokenizer(vocab={token: index for index, token in enumerate(vocabulary)}, merges=[])
    tokenizer.add_tokens([AddedToken("<image>", normalized=False, special=True)], special_tokens=True)
    tokenizer.add_tokens([f"<loc{number:04d}>" for number in range(1024)])
    tokenizer.add_tokens([f"<seg{number:03d}>" for number in range(128)])
    images = SiglipImageProcessorPil(size={"height": size, "width": size})
    images.image_seq_length = (size // patch) ** 2
    return PaliGemmaProcessor(image_processor=images, tokenizer=tokenizer)


def tiny_config(processor: PaliGemmaProcessor, **text: Any) -> PaliGemmaConfig:
    """The architecture that goes with `tiny_processor`; `text` overrides fields of the language part."""
    tokenizer = processor.tokenizer
    rows = -(-len(tokenizer) // 64) * 64
    size = processor.image_processor.size["width"]
    return PaliGemmaConfig(
        vision_config={
            "model_type": "siglip_vision_model",
            "image_size": size,
            "patch_size": size // math.isqrt(processor.image_seq_length),
            "vision_use_head": False,
            "projection_dim": WIDTH,
            **_VISION,
        },
        text_config={
            "model_type": "gemma",
            "vocab_size": rows,
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            **_TEXT,
            **text,
        },
        image_token_index=processor.image_token_id,
        projection_dim=WIDTH,
        initializer_range=INITIALIZER_RANGE,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def tiny_model(processor: PaliGemmaProcessor, **text: Any) -> PaliGemmaForConditionalGeneration:
    """Random weights from a fixed seed; the caller's random state is left as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(WEIGHTS_SEED)
        return PaliGemmaForConditionalGeneration(tiny_config(processor, **text))


def _make_tiny_paligemma(size: int, patch: int, folder: Path) -> None:
    processor = tiny_processor(size, patch)
    tiny_model(processor).save_pretrained(folder)
    processor.save_pretrained(folder)


EMBEDDED_MODELS: dict[str, Callable[[Path], None]] = {
    "ftlib/tiny-paligemma": partial(_make_tiny_paligemma, IMAGE_SIZE, PATCH_SIZE),
    "ftlib/tiny-paligemma-detect": partial(_make_tiny_paligemma, *DETECTION_SIZES),
    "ftlib/tiny-neox": make_tiny_neox,
    smollm2.NAME: smollm2.make_smollm2,
}
