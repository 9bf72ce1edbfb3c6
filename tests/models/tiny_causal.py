"""Tiny causal models with random weights: GPT-NeoX, GPT-2 (learned positions), Llama and Gemma (bos)."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers.processors import TemplateProcessing
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ftlib.models.tiny_neox import tiny_neox, tiny_tokenizer

ARCHITECTURES = ("gpt_neox", "gpt2", "llama", "gemma")

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
