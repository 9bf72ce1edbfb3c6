"""Chat templates of the structure of well-known models', and tokenizers of three kinds that can write them."""

from __future__ import annotations

import json

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

_CHATML = (
    "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{%- endif %}"
)
_TRIMMED_HEADERS = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
_THOUGHTS = """{%- set ns = namespace(last=0) %}
{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}
{%- for m in messages %}
{%- set content = m.content %}{%- set thoughts = '' %}
{%- if m.role == 'assistant' and '</think>' in content %}
{%- set thoughts = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
{%- set content = content.split('</think>')[-1].lstrip('\n') %}
{%- endif %}
{{- '<|im_start|>' + m.role + '\n' }}
{%- if m.role == 'assistant' and loop.index0 > ns.last and (loop.last or thoughts) %}
{{- '<think>\n' + thoughts.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}
{%- else %}{{- content }}{%- endif %}
{{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}GENERATION{%- endif %}"""
_INST = (
    "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('user and assistant take turns') }}{% endif %}{% if m.role == 'user' %}"
    "{{ USER }}{% else %}{{ ASSISTANT + eos_token }}{% endif %}{% endfor %}"
)

TEMPLATES = {
    "chatml": _CHATML,
    "qwen2.5": "{%- if messages[0].role != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{%- endif %}"
    + _CHATML,
    "qwen3": _THOUGHTS.replace(
        "GENERATION",
        "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}",
    ),
    "qwen3-thinking": _THOUGHTS.replace("GENERATION", "{{- '<think>\n' }}"),
    "llama2": _INST.replace("USER", "'[INST] ' + m.content | trim + ' [/INST]'").replace(
        "ASSISTANT", "' ' + m.content | trim + ' '"
    ),
    "llama3": _TRIMMED_HEADERS,
    "llama3.2": _TRIMMED_HEADERS.replace(
        "{% for",
        "{% if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
        "{{ '<|start_header_id|>system<|end_header_id|>\n\nToday: ' + date_string + '<|eot_id|>' }}{% for",
        1,
    ),
    "mistral": _INST.replace("USER", "'[INST] ' + m.content + '[/INST]'").replace("ASSISTANT", "' ' + m.content"),
    "gemma": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}"
        "{% endif %}{% set role = 'model' if m.role == 'assistant' else m.role %}"
        "{{ '<start_of_turn>' + role + '\n' + m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
    ),
    "phi3": (
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
    ),
    "zephyr": """{% for m in messages %}
{% if m['role'] == 'user' %}
{{ '<|user|>\n' + m['content'] + eos_token }}
{% else %}
{{ '<|' + m['role'] + '|>\n'  + m['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}""",
    "no-generation-prompt": "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}",
    "vicuna": "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ 'USER: ' + m.content }}{% else %}"
    "{{ ' ASSISTANT: ' + m.content + eos_token }}{% endif %}{% endfor %}",
}
"""Name → template. The last two have no generation prompt at all."""

KINDS = ("bytes", "legacy", "metaspace")
_TEXT = ["the answer is 42, reversed it is 24\n\nand so on\n", "assistant user model [INST] [/INST] ASSISTANT: USER: "]
_SPECIAL = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end|>"]
_SPECIAL += ["<start_of_turn>", "<end_of_turn>"]


def tokenizer_of(kind: str, template: str) -> PreTrainedTokenizerBase:
    """Byte-level BPE (GPT-2), or SentencePiece's: a space before every piece between special tokens (Llama 2), or
    before the first one.

    `<|assistant|>` and the like are text for all but Phi-3's, where white space behind them belongs to them.
    """
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    by_byte = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = by_byte if kind == "bytes" else pre_tokenizers.Metaspace()
    letters = pre_tokenizers.ByteLevel.alphabet() if kind == "bytes" else []
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=["<unk>", "<s>", "</s>"], initial_alphabet=letters, show_progress=False
    )
    tokenizer.train_from_iterator(_TEXT * 20, trainer)
    if kind == "bytes":
        tokenizer.decoder = decoders.ByteLevel()
    else:
        learned = json.loads(tokenizer.to_str())["model"]
        vocabulary = learned["vocab"] | {f"<0x{byte:02X}>": len(learned["vocab"]) + byte for byte in range(256)}
        merges = [tuple(merge) for merge in learned["merges"]]
        tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        if kind == "legacy":
            tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        else:
            tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        tokenizer.decoder = decoders.Sequence(steps)
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    greedy = template == "phi3"
    special = [*_SPECIAL, *(["<|user|>", "<|assistant|>"] if greedy else [])]
    made.add_special_tokens(
        {"additional_special_tokens": [AddedToken(one, rstrip=greedy, normalized=False) for one in special]}
    )
    made.add_tokens([AddedToken(one, normalized=False) for one in ("<think>", "</think>")])
    made.chat_template = TEMPLATES[template]
    return made
