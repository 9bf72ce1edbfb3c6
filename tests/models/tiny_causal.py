"""Tiny causal models with random weights: GPT-NeoX, GPT-2 (learned positions), Llama and Gemma (bos).

And odd ones, whose layers do not all attend by the mask that they are given: sliding windows with `layer_types` (Gemma
2) and without (Mistral, GPT-Neo), alibi (Falcon), a convolution over what came before (LFM2); OPT makes its own mask.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers.processors import TemplateProcessing
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ftlib.models.tiny import tiny_neox, tiny_tokenizer

ARCHITECTURES = ("gpt_neox", "gpt2", "llama", "gemma")
WINDOW = 12
_HEADS = {"intermediate_size": 128, "num_key_value_heads": 2}
_NEO = {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": WINDOW}
ODD: dict[str, tuple[type[PreTrainedConfig], type[PreTrainedModel], dict[str, Any]]] = {
    "falcon": (FalconConfig, FalconForCausalLM, {"alibi": True, "new_decoder_architecture": False}),
    "gemma2": (Gemma2Config, Gemma2ForCausalLM, {"sliding_window": WINDOW, "head_dim": 16, **_HEADS}),
    "gpt_neo": (GPTNeoConfig, GPTNeoForCausalLM, _NEO),
    "lfm2": (Lfm2Config, Lfm2ForCausalLM, {"layer_types": ["conv", "full_attention"], **_HEADS}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": WINDOW, **_HEADS}),
    "opt": (OPTConfig, OPTForCausalLM, {"ffn_dim": 128, "word_embed_proj_dim": 64}),
}

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer_of(architecture: str, chat: bool = False) -> PreTrainedTokenizerBase:
    """Without bos for GPT-NeoX and GPT-2, with it for Llama and Gemma."""
    tokenizer = tiny_tokenizer()
    if architecture in ("llama", "gemma"):
        tokenizer.add_special_tokens({"bos_token": "<bos>"})
        bos = ("<bos>", tokenizer.bos_token_id)
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[bos])
    if chat:
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
        tokenizer.chat_template = CHATML
    return tokenizer


def model_of(architecture: str, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Weights far from uniform, so that answers differ and some end early; dropout, where there is any, is off."""
    rows, ids = -(-len(tokenizer) // 64) * 64, {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0}
    torch.manual_seed(7)
    if architecture == "gpt_neox":
        model: PreTrainedModel = tiny_neox(tokenizer)
    elif architecture == "gpt2":
        config = GPT2Config(vocab_size=rows, n_embd=64, n_layer=2, n_head=4, n_positions=96, **ids)
        model = GPT2LMHeadModel(config)
    elif architecture in ODD:
        kind, made_of, own = ODD[architecture]
        sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, **own}
        model = made_of(kind(vocab_size=rows, max_position_embeddings=256, **ids, **sizes))
    else:
        made = {"llama": (LlamaConfig, LlamaForCausalLM), "gemma": (GemmaConfig, GemmaForCausalLM)}[architecture]
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
        heads = {"num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256}
        model = made[1](made[0](vocab_size=rows, bos_token_id=tokenizer.bos_token_id, **ids, **sizes, **heads))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model.eval()


def save(architecture: str, folder: Path, chat: bool = False) -> Path:
    """A model folder."""
    tokenizer = tokenizer_of(architecture, chat)
    model_of(architecture, tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
