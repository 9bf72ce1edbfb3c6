"""How a model attends, and where its scores and logits are capped: settled before its weights are loaded.

Gemma 2, the text model of PaliGemma 2, caps attention scores and final logits (`cap · tanh(x / cap)`) and attends
locally in every second layer (arXiv:2408.00118). Three ways of computing that are wrong without a word: torch's SDPA
leaves the scores' cap out, FlashAttention leaves PaliGemma's two-way prompt out, and transformers older than 5.23 may
leave PaliGemma's final cap out. None of them is reached from here.

PaliGemma 2 was trained, and its scores were reached, with every layer attending to everything (big_vision,
models/ppp/gemma.py) and without the final cap (configs/proj/paligemma/transfers/forkme.py: "Better for transfer").
"""

from __future__ import annotations

import inspect
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask
from transformers import PreTrainedConfig, PreTrainedModel

from ftlib.errors import UserError

AttentionChoice = Literal["auto", "eager", "sdpa", "flex"]
FinalSoftcapChoice = Literal["auto", "on", "off"]

_NAMES = {"eager": "eager", "sdpa": "sdpa", "flex": "flex_attention"}
_FLEX_PROGRAMS = 128
_USE_AUTO_HINT = "Take model.attention: auto; it stays the same run."


def choose_implementation(config: PreTrainedConfig, attention: AttentionChoice) -> str | dict[str, str | None] | None:
    """What `from_pretrained` is asked for as `attn_implementation`, whatever the checkpoint says of it.

    None leaves the choice to transformers, as for a vision tower always.

    `auto` is eager where attention scores are capped, and transformers' own choice (SDPA, where a model has it)
    elsewhere.

    Raises:
        UserError: SDPA for a model whose attention scores are capped; flex without a GPU, where torch compiles it
            slowly and not always rightly.
    """
    text = config.get_text_config()
    cap = getattr(text, "attn_logit_softcapping", None)
    if cap and attention == "sdpa":
        problem = f"model.attention: sdpa: this model caps attention scores at {cap:g}, which SDPA leaves out"
        raise UserError(problem, "Take auto, eager or flex.")
    if attention == "flex" and not torch.cuda.is_available():
        raise UserError("model.attention: flex runs on a GPU, and torch sees none here", _USE_AUTO_HINT)
    if attention == "flex":
        raise_recompile_limit()
    return unchecked_implementation(config, attention)


def raise_recompile_limit() -> None:
    """Let dynamo keep all programs of flex attention and its masks.

    They serve batches of any length, but training and asking, with an image or from a cache, of one row or of several
    and in one block or in several, need some of their own: more than the 8 that dynamo keeps. Beyond these it would run
    flex attention as it stands in Python, with all scores in memory, which nobody takes it for.
    """
    import torch._dynamo

    name = dynamo_setting_name("recompile_limit", "cache_size_limit")
    setattr(torch._dynamo.config, name, max(_FLEX_PROGRAMS, getattr(torch._dynamo.config, name)))


def dynamo_setting_name(name: str, before_2_7: str) -> str:
    """What this torch calls a setting of dynamo."""
    return name if hasattr(torch._dynamo.config, name) else before_2_7


def unchecked_implementation(
    config: PreTrainedConfig, attention: AttentionChoice
) -> str | dict[str, str | None] | None:
    """`choose_implementation` for a model that is counted, not run: nothing is refused."""
    text = config.get_text_config()
    cap = getattr(text, "attn_logit_softcapping", None)
    name = ("eager" if cap else None) if attention == "auto" else _NAMES[attention]
    if text is config or name is None:
        return name
    return {"": None, **dict.fromkeys(config.sub_configs), "text_config": name}


def use_full_attention(config: PreTrainedConfig) -> None:
    """Make every layer of the text model attend to everything, in the config that weights are loaded with."""
    text = config.get_text_config()
    if getattr(text, "layer_types", None):
        text.layer_types = ["full_attention"] * text.num_hidden_layers


def configure_final_softcap(config: PreTrainedConfig, choice: FinalSoftcapChoice, usual: bool) -> None:
    """Take the cap on the final logits out of a config, unless it is wanted.

    Args:
        usual: what `auto` stands for.

    Raises:
        UserError: a cap is asked for, and the model has none.
    """
    text = config.get_text_config()
    cap = getattr(text, "final_logit_softcapping", None)
    if choice == "on" and not cap:
        raise UserError("model.final_softcap: on: this model has no cap on its final logits", "Take auto.")
    if cap and (choice == "off" or (choice == "auto" and not usual)):
        text.final_logit_softcapping = None


def apply_final_softcap(model: PreTrainedModel) -> None:
    """Cap the head's logits here where the installed transformers leaves it out, as 5.19 does for PaliGemma 2."""
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    if not cap or "final_logit_softcapping" in inspect.getsource(inspect.unwrap(type(model).forward)):
        return

    def capped(head: torch.nn.Module, inputs: tuple[Tensor, ...], logits: Tensor) -> Tensor:
        return torch.tanh(logits / cap) * cap

    model.get_output_embeddings().register_forward_hook(capped)


def supports_custom_mask(model: torch.nn.Module, length: int) -> bool:
    """Whether all layers look where a mask of our own lets them, and nowhere else, in a sequence of this length.

    A shorter window of the model's would be widened by the mask; alibi counts places, not positions; and what is not
    attention (convolutions, recurrences) carries on from one token to the next, whatever the mask.
    """
    text: Any = model.config.get_text_config()  # type: ignore[union-attr,operator]
    kinds = set(getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None) or ["sliding_attention"])
    if getattr(text, "alibi", False) or not kinds <= {"full_attention", "sliding_attention"}:
        return False
    windows = [getattr(text, name, None) for name in ("sliding_window", "window_size")]
    return kinds == {"full_attention"} or all(length <= window for window in windows if window)


def as_attention_mask(model: torch.nn.Module, visible: Tensor, dtype: torch.dtype) -> Any:
    """What a position may look at, in the form that the model's attention takes.

    Args:
        visible: shape (rows, length, length), bool.
        dtype: of the model's numbers.

    Returns:
        Shape (rows, 1, length, length): 0 where it may look, the type's least number where not; a BlockMask for flex.
    """
    if _uses_flex(model):
        rows, queries, keys = visible.shape
        return create_block_mask(
            lambda row, head, query, key: visible[row, query, key],
            rows,
            None,
            queries,
            keys,
            device=str(visible.device),
        )
    least = torch.finfo(dtype).min
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill(~visible, least)[:, None]


def validate_trainable(model: PreTrainedModel) -> None:
    """Refuse what flex attention cannot train.

    Raises:
        UserError: dropout inside attention.
    """
    if not _uses_flex(model):
        return
    text = model.config.get_text_config()
    if getattr(text, "attention_dropout", 0.0) or getattr(text, "attn_pdrop", 0.0):
        raise UserError("model.attention: flex does not know dropout, and this model drops attention", _USE_AUTO_HINT)


def _uses_flex(model: Any) -> bool:
    return bool(model.config.get_text_config()._attn_implementation == _NAMES["flex"])
