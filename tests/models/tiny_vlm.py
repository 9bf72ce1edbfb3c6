"""Tiny random vision-language models of twelve architectures, with the processors of transformers, made offline.

Each has a language model of two layers, 32 wide, and a byte-level tokenizer. `save(name, folder)` writes one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AddedToken, AutoModelForImageTextToText, PreTrainedModel, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

WIDTH = 32
CHATML_TURN = ("<|im_start|>", "<|im_end|>")

_TEXT: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 4096,
}
_TOWER: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
_QWEN_TOWER: dict[str, Any] = {
    "depth": 2,
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "num_heads": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": WIDTH,
}
_HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}


def tokenizer(
    special: Sequence[str], eos: str, pad: str, bos: str | None = None, **named: str
) -> PreTrainedTokenizerFast:
    """Byte-level BPE without merges.

    Args:
        named: tokens that become attributes of the tokenizer, such as image_token.
    """
    base = Tokenizer(models.BPE({character: index for index, character in enumerate(bytes_to_unicode().values())}, []))
    base.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    base.decoder = decoders.ByteLevel()
    base.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=base,
        eos_token=eos,
        pad_token=pad,
        bos_token=bos,
        extra_special_tokens=named,
        model_max_length=100_000,
    )


def template(
    image: str,
    turn: tuple[str, str] = CHATML_TURN,
    bos: str = "",
    assistant: str = "assistant",
    trim: str = "",
    answers: str = "both",
) -> str:
    """A chat template: a role's name and a newline, then images and texts, then the end of the turn.

    Args:
        image: what stands in an image's place.
        trim: " | trim" removes blanks around texts.
        answers: "both": content of the assistant is a text or a list; "lists": only a list.
    """
    parts = (
        "{%- for part in m['content'] -%}{%- if part['type'] == 'image' -%}{{ '" + image + "' }}{%- else -%}"
        "{{ part['text']" + trim + " }}{%- endif -%}{%- endfor -%}"
    )
    either = "{%- if m['content'] is string -%}{{ m['content']" + trim + " }}{%- else -%}" + parts + "{%- endif -%}"
    content = parts if answers == "lists" else either
    role = "{{ '" + assistant + "' if m['role'] == 'assistant' else m['role'] }}"
    return (
        bos + "{%- for m in messages -%}{{ '" + turn[0] + "' }}" + role + "{{ '\\n' }}" + content + "{{ '" + turn[1]
        + "\\n' }}{%- endfor -%}{%- if add_generation_prompt -%}{{ '" + turn[0] + assistant + "\\n' }}{%- endif -%}"
    )  # fmt: skip


def _ids(tokens: PreTrainedTokenizerFast) -> dict[str, Any]:
    return {f"{name}_token_id": getattr(tokens, f"{name}_token_id") for name in ("pad", "eos", "bos")}


def _text(tokens: PreTrainedTokenizerFast, **more: Any) -> dict[str, Any]:
    return _TEXT | {"vocab_size": -(-len(tokens) // 64) * 64} | _ids(tokens) | more


def _without_head_size(text: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in text.items() if name != "head_dim"}


def _rope(sections: list[int] | None = None, **more: Any) -> dict[str, Any]:
    sections_of = {} if sections is None else {"mrope_section": sections}
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, **sections_of, **more}}


Made = tuple[Any, Any]
"""A config and a processor."""


def _qwen(
    kind: str, patch: int, tower: dict[str, Any], text: dict[str, Any], head_size: bool, images: dict[str, Any]
) -> Made:
    processor_kind = {"Qwen3_5": "Qwen3VL"}.get(kind, kind)
    tokens = tokenizer(
        ["<|endoftext|>", *CHATML_TURN, "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"],
        "<|im_end|>",
        "<|endoftext|>",
    )
    edge = 2 * patch
    pixels = transformers.Qwen2VLImageProcessorPil(
        patch_size=patch,
        merge_size=2,
        temporal_patch_size=2,
        size={"shortest_edge": edge**2, "longest_edge": 16 * edge**2},
        **images,
    )
    video = {"Qwen2_5_VL": "Qwen2VL"}.get(processor_kind, processor_kind)
    processor = getattr(transformers, f"{processor_kind}Processor")(
        image_processor=pixels,
        tokenizer=tokens,
        video_processor=getattr(transformers, f"{video}VideoProcessor")(),
        chat_template=template("<|vision_start|><|image_pad|><|vision_end|>"),
    )
    number = tokens.convert_tokens_to_ids
    names = {"image": "image_pad", "video": "video_pad", "vision_start": "vision_start", "vision_end": "vision_end"}
    whole = _text(tokens, **text)
    config = getattr(transformers, f"{kind}Config")(
        text_config=whole if head_size else _without_head_size(whole),
        vision_config={**_QWEN_TOWER, "patch_size": patch, **tower},
        **{f"{name}_token_id": number(f"<|{token}|>") for name, token in names.items()},
        **_ids(tokens),
    )
    return config, processor


def qwen2_5_vl() -> Made:
    tower = {"window_size": 112, "fullatt_block_indexes": [1]}
    return _qwen("Qwen2_5_VL", 14, tower, _rope([1, 1, 2]), False, {})


def qwen3_vl() -> Made:
    tower = {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    return _qwen("Qwen3VL", 16, tower, _rope([2, 1, 1], mrope_interleaved=True), True, _HALF)


def qwen3_5() -> Made:
    linear = {
        "layer_types": ["linear_attention", "full_attention"],
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
    }
    rope = _rope([2, 1, 1], partial_rotary_factor=1.0, mrope_interleaved=True)
    return _qwen("Qwen3_5", 16, {"num_position_embeddings": 16}, linear | rope, True, _HALF)


def glm46v() -> Made:
    sides = [f"<|{side}_of_{kind}|>" for kind in ("image", "video") for side in ("begin", "end")]
    tokens = tokenizer(["<|endoftext|>", *CHATML_TURN, "<|image|>", "<|video|>", *sides], "<|im_end|>", "<|endoftext|>")
    pixels = transformers.Glm46VImageProcessorPil(
        patch_size=14,
        merge_size=2,
        temporal_patch_size=2,
        size={"shortest_edge": 2 * 28**2, "longest_edge": 32 * 28**2},
    )
    processor = transformers.Glm46VProcessor(
        image_processor=pixels,
        tokenizer=tokens,
        video_processor=transformers.Glm46VVideoProcessor(),
        chat_template=template("<|begin_of_image|><|image|><|end_of_image|>"),
    )
    number = tokens.convert_tokens_to_ids
    numbers = {f"{kind}_token_id": number(f"<|{kind}|>") for kind in ("image", "video")}
    for side, word in (("start", "begin"), ("end", "end")):
        numbers |= {f"{kind}_{side}_token_id": number(f"<|{word}_of_{kind}|>") for kind in ("image", "video")}
    config = transformers.Glm46VConfig(
        text_config=_without_head_size(_text(tokens, **_rope([1, 1, 2], partial_rotary_factor=1.0))),
        vision_config={**_QWEN_TOWER, "patch_size": 14, "image_size": 56},
        **numbers,
        **_ids(tokens),
    )
    return config, processor


_GEMMA_TURN = ("<start_of_turn>", "<end_of_turn>")


def gemma3() -> Made:
    named = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    tokens = tokenizer(
        ["<pad>", "<eos>", "<bos>", *_GEMMA_TURN, *named.values()], "<end_of_turn>", "<pad>", "<bos>", **named
    )
    processor = transformers.Gemma3Processor(
        image_processor=transformers.Gemma3ImageProcessorPil(size={"height": 56, "width": 56}),
        tokenizer=tokens,
        chat_template=template("<start_of_image>", _GEMMA_TURN, "{{ bos_token }}", "model", " | trim"),
        image_seq_length=4,
    )
    local = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 8}
    config = transformers.Gemma3Config(
        text_config=_text(tokens, **local),
        vision_config={
            **_TOWER,
            "model_type": "siglip_vision_model",
            "image_size": 56,
            "patch_size": 14,
            "vision_use_head": False,
        },
        mm_tokens_per_image=4,
        **{f"{name}_index": tokens.convert_tokens_to_ids(token) for name, token in named.items()},
        **_ids(tokens),
    )
    return config, processor


def gemma4() -> Made:
    images = {"boi_token": "<|image>", "eoi_token": "<image|>", "image_token": "<|image|>"}
    audio = {"boa_token": "<|audio>", "eoa_token": "<audio|>", "audio_token": "<|audio|>"}
    special = ["<pad>", "<eos>", "<bos>", *_GEMMA_TURN, *images.values(), *audio.values(), "<|video|>"]
    tokens = tokenizer(special, "<end_of_turn>", "<pad>", "<bos>", **images, **audio)
    number = tokens.convert_tokens_to_ids
    processor = transformers.Gemma4Processor(
        feature_extractor=transformers.Gemma4AudioFeatureExtractor(),
        image_processor=transformers.Gemma4ImageProcessorPil(patch_size=4, max_soft_tokens=70, pooling_kernel_size=3),
        tokenizer=tokens,
        video_processor=transformers.Gemma4VideoProcessor(),
        chat_template=template("<|image|>", _GEMMA_TURN, "{{ bos_token }}", "model", " | trim"),
        image_seq_length=70,
    )
    layers = {
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"],
        "global_head_dim": 8,
        "num_global_key_value_heads": 2,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": -(-len(tokens) // 64) * 64,
        "use_bidirectional_attention": "vision",
    }
    tower = {"num_key_value_heads": 4, "head_dim": 8, "patch_size": 4, "pooling_kernel_size": 3}
    config = transformers.Gemma4Config(
        text_config=_text(tokens, **layers),
        vision_config={**_TOWER, **tower, "position_embedding_size": 256},
        audio_config=None,
        **{f"{name}_id": number(token) for name, token in (images | audio).items() if name != "eoa_token"},
        eoa_token_index=number("<audio|>"),
        video_token_id=number("<|video|>"),
        **_ids(tokens),
    )
    return config, processor


def _idefics(kind: str) -> Made:
    grid = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    named = {
        "image_token": "<image>",
        "fake_image_token": "<fake_token_around_image>",
        "global_image_token": "<global-img>",
        "end_of_utterance_token": "<end_of_utterance>",
    }
    tokens = tokenizer(
        ["<|endoftext|>", *CHATML_TURN, *named.values(), *grid],
        "<end_of_utterance>",
        "<|im_end|>",
        "<|im_start|>",
        **named,
    )
    pixels = getattr(transformers, f"{kind}ImageProcessorPil")(
        size={"longest_edge": 64}, max_image_size={"longest_edge": 32}, do_image_splitting=True
    )
    video = {"video_processor": transformers.SmolVLMVideoProcessor()} if kind == "SmolVLM" else {}
    processor = getattr(transformers, f"{kind}Processor")(
        image_processor=pixels,
        tokenizer=tokens,
        image_seq_len=4,
        chat_template=template("<image>", ("<|im_start|>", "<end_of_utterance>"), answers="lists"),
        **video,
    )
    config = getattr(transformers, f"{kind}Config")(
        text_config=_text(tokens, model_type="llama"),
        vision_config={**_TOWER, "image_size": 32, "patch_size": 8},
        scale_factor=2,
        image_token_id=tokens.convert_tokens_to_ids("<image>"),
        **_ids(tokens),
    )
    return config, processor


def idefics3() -> Made:
    return _idefics("Idefics3")


def smolvlm() -> Made:
    return _idefics("SmolVLM")


def llava_onevision() -> Made:
    named = {"image_token": "<image>", "video_token": "<video>"}
    tokens = tokenizer(["<|endoftext|>", *CHATML_TURN, *named.values()], "<|im_end|>", "<|endoftext|>", **named)
    grids = [[28, 28], [28, 56], [56, 28], [56, 56]]
    processor = transformers.LlavaOnevisionProcessor(
        image_processor=transformers.LlavaOnevisionImageProcessorPil(
            size={"height": 28, "width": 28}, image_grid_pinpoints=grids
        ),
        tokenizer=tokens,
        video_processor=transformers.LlavaOnevisionVideoProcessor(),
        num_image_tokens=4,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_9",
        chat_template=template("<image>\\n"),
    )
    tower = {"model_type": "siglip_vision_model", "image_size": 28, "patch_size": 14, "vision_use_head": False}
    config = transformers.LlavaOnevisionConfig(
        text_config=_without_head_size(_text(tokens, model_type="qwen2")),
        vision_config={**_TOWER, **tower},
        **{f"{name}_index": tokens.convert_tokens_to_ids(token) for name, token in named.items()},
        image_grid_pinpoints=grids,
        vision_feature_layer=-1,
        **_ids(tokens),
    )
    return config, processor


def internvl() -> Made:
    named = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    tokens = tokenizer(["<|endoftext|>", *CHATML_TURN, *named.values()], "<|im_end|>", "<|endoftext|>", **named)
    processor = transformers.InternVLProcessor(
        image_processor=transformers.GotOcr2ImageProcessorPil(
            size={"height": 28, "width": 28}, crop_to_patches=True, min_patches=1, max_patches=4
        ),
        tokenizer=tokens,
        video_processor=transformers.InternVLVideoProcessor(),
        image_seq_length=4,
        chat_template=template("<IMG_CONTEXT>\\n"),
    )
    config = transformers.InternVLConfig(
        text_config=_without_head_size(_text(tokens, model_type="qwen2")),
        vision_config={**_TOWER, "image_size": [28, 28], "patch_size": [7, 7]},
        image_token_id=tokens.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
        downsample_ratio=0.5,
        **_ids(tokens),
    )
    return config, processor


def lfm2_vl() -> Made:
    named = {
        "image_token": "<image>",
        "image_start_token": "<|image_start|>",
        "image_end_token": "<|image_end|>",
        "image_thumbnail_token": "<|img_thumbnail|>",
    }
    grid = [f"<|img_row_{row}_col_{column}|>" for row in range(1, 11) for column in range(1, 11)]
    special = ["<|pad|>", "<|startoftext|>", *CHATML_TURN, *named.values(), *grid]
    tokens = tokenizer(special, "<|im_end|>", "<|pad|>", "<|startoftext|>", **named)
    pixels = transformers.Lfm2VlImageProcessor(
        downsample_factor=2,
        do_image_splitting=True,
        min_tiles=2,
        max_tiles=4,
        min_image_tokens=4,
        max_image_tokens=16,
        encoder_patch_size=4,
        tile_size=32,
        size={"height": 32, "width": 32},
        max_num_patches=64,
    )
    processor = transformers.Lfm2VlProcessor(
        image_processor=pixels, tokenizer=tokens, chat_template=template("<image>")
    )
    layers = {"model_type": "lfm2", "layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}
    tower = {"model_type": "siglip2_vision_model", "patch_size": 4, "num_patches": 64, "vision_use_head": False}
    config = transformers.Lfm2VlConfig(
        text_config=_without_head_size(_text(tokens, **layers)),
        vision_config={**_TOWER, **tower},
        image_token_id=tokens.convert_tokens_to_ids("<image>"),
        downsample_factor=2,
        projector_hidden_size=WIDTH,
        **_ids(tokens),
    )
    return config, processor


def mistral3() -> Made:
    special = ["<s>", "</s>", "<pad>", "<|im_start|>", "[IMG]", "[IMG_BREAK]", "[IMG_END]"]
    tokens = tokenizer(special, "</s>", "<pad>", "<s>")
    processor = transformers.PixtralProcessor(
        image_processor=transformers.PixtralImageProcessorPil(patch_size=14, size={"longest_edge": 112}),
        tokenizer=tokens,
        patch_size=14,
        spatial_merge_size=2,
        chat_template=template("[IMG]", ("<|im_start|>", "</s>")),
    )
    tower = {"model_type": "pixtral", "head_dim": 8, "image_size": 112, "patch_size": 14}
    config = transformers.Mistral3Config(
        text_config=_text(tokens, model_type="mistral"),
        vision_config={**_TOWER, **tower},
        image_token_index=tokens.convert_tokens_to_ids("[IMG]"),
        spatial_merge_size=2,
        **_ids(tokens),
    )
    return config, processor


ALL: dict[str, Callable[[], Made]] = {
    build.__name__: build
    for build in (
        qwen2_5_vl, qwen3_vl, qwen3_5, glm46v, gemma3, gemma4, idefics3, smolvlm, llava_onevision, internvl, lfm2_vl,
        mistral3,
    )
}  # fmt: skip


def save(name: str, folder: Path) -> None:
    """Write a model and its processor."""
    config, processor = ALL[name]()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: PreTrainedModel = AutoModelForImageTextToText.from_config(config)
        for parameter in model.parameters():
            if parameter.dim() > 1 and not parameter.any():  # Gemma 3's projector: no image would count
                torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
