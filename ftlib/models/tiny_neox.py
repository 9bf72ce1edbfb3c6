"""The embedded causal model `ftlib/tiny-neox`: a GPT-NeoX with random weights and a tokenizer of characters.

The tokenizer knows every character (ASCII as tokens, the rest as UTF-8 bytes) and `<eos>`. The model learns string
tasks from scratch in minutes on two cores.
"""

from __future__ import annotations

import string
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

WEIGHTS_SEED = 0
WIDTH = 96
POSITIONS = 512
EOS = "<eos>"
_PRINTABLE = sorted(set(string.printable) - set("\x0b\x0c\r"))


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token for every character of ASCII, one for every byte of others."""
    vocabulary = [EOS, "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *_PRINTABLE]
    numbers = {token: number for number, token in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.BPE(numbers, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, unk_token="<unk>", pad_token=EOS)


def tiny_neox(tokenizer: PreTrainedTokenizerFast, **settings: float) -> GPTNeoXForCausalLM:
    """Random weights from a fixed seed; the caller's random state is left as it was."""
    config = GPTNeoXConfig(
        vocab_size=-(-len(tokenizer) // 64) * 64,
        hidden_size=WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=4 * WIDTH,
        max_position_embeddings=POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0},
        initializer_range=WIDTH**-0.5,
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
