"""What is trained, and in which type: low-rank adapters on named layers, the attention weights, or all weights but
frozen parts.

The one place that knows which parameters a method trains; the families say which part of a model a parameter belongs
to. Everything here works on the meta device too, where a model has shapes and no weights.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ftlib.config.schema import Attention, Full, Lora, Model
from ftlib.errors import UserError
from ftlib.models.columns import KeptColumns
from ftlib.models.encoding import model_inputs
from ftlib.models.linear_cross_entropy import LossHead
from ftlib.models.registry import InputProcessor, ModelFamily, family_of, model_family

if TYPE_CHECKING:
    from peft import PeftModel


_BLOCKS = {"attention": re.compile(r"attn|attention"), "mlp": re.compile(r"mlp|feed_forward|ffn")}
"""Target → how the block is called that holds its layers, in SigLIP, Gemma, Llama, GPT-NeoX, GPT-2 and their kin."""

_NO_DECAY = re.compile(r"lora_magnitude_vector|bias|norm\b")
"""Of names in lower case: what is no vector in some models, such as the biases of experts."""

_PARTS = ("language", "vision", "projector")
"""Targets that are all linear layers of a part."""


def prepare_for_training(
    model: PreTrainedModel,
    adapter: Lora | Full | Attention,
    base_name: str,
    family: str | ModelFamily = "paligemma",
    revision: str | None = None,
) -> torch.nn.Module:
    """Mark the trainable parameters, adding adapters if the method has any.

    Args:
        base_name, revision: what the saved adapter names as its base model.

    Raises:
        UserError: everything would be frozen, or a target is no linear layer of this model.
    """
    kind = model_family(family) if isinstance(family, str) else family
    model.enable_input_require_grads = _skip_input_gradients
    kept = KeptColumns(model)
    if isinstance(adapter, Lora):
        adapted = _add_lora(model, kind, adapter)
        kept.watch(adapted)
        LossHead(adapted)
        settings = adapted.peft_config["default"]
        settings.base_model_name_or_path, settings.revision = base_name, revision  # not the folder it was read from
        for parameter in master_weights(adapted, adapter):
            parameter.data = parameter.data.float()
        return adapted
    kept.watch(model)
    LossHead(model)
    if isinstance(adapter, Attention):
        _train_attention(model, kind)
    else:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(kind.module_group(model, name) not in adapter.freeze)
        for parameter in master_weights(model, adapter):
            parameter.data = parameter.data.float()
        for module in model.modules():
            if isinstance(module, torch.nn.LayerNorm):
                module.register_forward_pre_hook(_cast_to_weight_dtype)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError("adapter.freeze: nothing is left to train")
    return model


def _skip_input_gradients() -> None:
    """Stands in for what transformers does to embeddings at gradient checkpointing: it makes their output want a
    gradient. Only the reentrant kind needs that, which ftlib refuses; it would run the backward pass through a frozen
    vision tower, and cut the program of torch.compile there.
    """


def master_weights(model: torch.nn.Module, adapter: Lora | Full | Attention) -> list[torch.nn.Parameter]:
    """The model's own weights that train in float32, whatever `model.dtype` is; with adapters, those of
    `modules_to_save`.
    """
    if isinstance(adapter, Lora):
        return [one for name, one in model.named_parameters() if ".modules_to_save." in name]
    if isinstance(adapter, Full) and not adapter.master_weights:
        return []
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def parameter_part(model: torch.nn.Module, name: str, settings: Model) -> str:
    """The part of the model that a parameter belongs to, adapters among them.

    Args:
        model: from `prepare_for_training`.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    return family_of(settings).module_group(base, name.removeprefix("base_model.model."))


def no_decay_parameter_names(model: torch.nn.Module) -> set[str]:
    """Names of the trainable parameters that weight decay leaves alone, since zero is not where they rest.

    DoRA's magnitudes (columns' lengths), norms' scales, biases, and embeddings with a head that is tied to them. Every
    vector is one of these; a head of its own decays, as other linear layers do.
    """
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    tables = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    return {
        name
        for name, parameter in named.items()
        if parameter.dim() < 2 or id(parameter) in tables or _NO_DECAY.search(name.lower())
    }


def _cast_to_weight_dtype(norm: torch.nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
    """On the CPU torch refuses a frozen LayerNorm in 16 bits behind trained weights in float32, with autocast too."""
    weight, (value, *_) = norm.weight, inputs
    if weight is None or value.device.type != "cpu" or weight.dtype in (torch.float32, value.dtype):
        return None
    return (value.to(weight.dtype),)  # type: ignore[arg-type]


def count_parameters(model: torch.nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters; tied ones count once, quantized ones by the weights that they stand for."""
    parameters = list(model.parameters())
    return sum(map(_size, (p for p in parameters if p.requires_grad))), sum(map(_size, parameters))


def _size(parameter: torch.nn.Parameter) -> int:
    """A 4-bit parameter is packed; its `quant_state` (bitsandbytes) knows the weight's shape."""
    state = getattr(parameter, "quant_state", None)
    return math.prod(state.shape) if state is not None else parameter.numel()


def _add_lora(model: PreTrainedModel, family: ModelFamily, adapter: Lora) -> PeftModel:
    from peft import LoraConfig, get_peft_model

    _check_dora(model, adapter)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=adapter.r,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        use_dora=adapter.method == "dora",
        use_rslora=adapter.rslora,
        target_modules=_layer_pattern(
            _adapted_layers(model, family, adapter), (name for name, _ in model.named_modules())
        ),
        modules_to_save=[_module_of_part(model, family, part) for part in adapter.modules_to_save] or None,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),  # GPT-2's weights lie transposed
    )
    return get_peft_model(model, config)


def _module_of_part(model: PreTrainedModel, family: ModelFamily, part: str) -> str:
    """The last word in the name of the module that is this part of the model: peft compares the ends of names.

    Raises:
        UserError: the model has no such module.
    """
    for name, module in model.named_modules():
        if {family.module_group(model, f"{name}.{inner}") for inner, _ in module.named_parameters()} == {part}:
            return name.rpartition(".")[2]
    raise UserError(f"adapter.modules_to_save: no module of this model is its {part}")


def _check_dora(model: PreTrainedModel, adapter: Lora) -> None:
    """On the CPU peft loses the scales of 8-bit weights when it looks at their columns' lengths.

    Raises:
        UserError: DoRA was asked for on such weights.
    """
    eight_bits = getattr(model, "is_loaded_in_8bit", False) and model.device.type == "cpu"
    if adapter.method == "dora" and eight_bits:
        problem = "adapter.method: dora on model.quantization: int8 needs a GPU"
        raise UserError(problem, "On the CPU take model.quantization: nf4, or adapter.method: lora.")


def _train_attention(model: PreTrainedModel, family: ModelFamily) -> None:
    model.requires_grad_(False)
    layers = _linear_layers(model, family)
    for name in _matching_layers("attention", layers):
        if layers[name] == "language":
            model.get_submodule(name).float().requires_grad_(True)


def _linear_layers(model: PreTrainedModel, family: ModelFamily) -> dict[str, str]:
    """Name → part of every linear layer but the head, quantized ones among them."""
    head = model.get_output_embeddings()
    return {
        name: family.module_group(model, f"{name}.weight")
        for name, module in model.named_modules()
        if isinstance(module, (torch.nn.Linear, Conv1D)) and module is not head
    }


def _adapted_layers(model: PreTrainedModel, family: ModelFamily, adapter: Lora) -> set[str]:
    """The layers that `adapter.targets` names, but for those of frozen parts.

    Raises:
        UserError: a target that names no layer, or only frozen ones.
    """
    layers = _linear_layers(model, family)
    found: set[str] = set()
    for target in adapter.targets:
        named = _matching_layers(target, layers)
        if not named:
            have = ", ".join(sorted({name.rpartition(".")[2] for name in layers}))
            raise UserError(f"adapter.targets: {target}: no such linear layer in this model", f"There are: {have}")
        thawed = {name for name in named if layers[name] not in (*adapter.freeze, *adapter.modules_to_save)}
        if not thawed:
            frozen = ", ".join(sorted({layers[name] for name in named}))
            problem = f"adapter.targets: {target}: nothing is left to adapt, since adapter.freeze names {frozen}"
            if set(adapter.modules_to_save) & {layers[name] for name in named}:
                problem = f"adapter.targets: {target}: adapter.modules_to_save trains these layers fully"
            raise UserError(problem, "Name another target, or take the part out of adapter.freeze.")
        found |= thawed
    return found


def _matching_layers(target: str, layers: dict[str, str]) -> set[str]:
    """The layers of a kind of block, of a part, of a name or end of a path, or that an expression matches wholly.

    Args:
        layers: name → part.

    Raises:
        UserError: no layer has this name, and it is no regular expression.
    """
    if target in _BLOCKS:
        return {name for name in layers if _BLOCKS[target].search(f".{name}".removesuffix(".linear").split(".")[-2])}
    if target in _PARTS:
        return {name for name, part in layers.items() if part == target}
    try:
        matched = {name for name in layers if re.fullmatch(target, name)}
    except re.error as error:
        raise UserError(f"adapter.targets: {target}: not a regular expression: {error}") from None
    return {name for name in layers if f".{name}".endswith(f".{target}")} or matched


def _layer_pattern(chosen: set[str], modules: Iterable[str]) -> str:
    """A regular expression for exactly these modules; short where they differ only in the number of their layer."""
    alike = {r"\.".join(r"\d+" if word.isdigit() else re.escape(word) for word in name.split(".")) for name in chosen}
    short = "|".join(sorted(alike))
    if {name for name in modules if re.fullmatch(short, name)} == chosen:
        return short
    return "|".join(re.escape(name) for name in sorted(chosen))


# Whether a model keeps rows apart that are packed into one sequence.


def validate_packing(model: torch.nn.Module, processor: InputProcessor) -> None:
    """Refuse an architecture in which a packed row's logits depend on the row before it.

    Some take positions and make their masks without them (OPT, Falcon); convolutions and recurrences carry on from one
    token to the next. The gradient tells, in any type of numbers: of what is not seen it is zero, exactly, while 8-bit
    weights let the logits themselves change a little with whatever else is computed beside them. Neither weights,
    their gradients, random state nor the model's mode change.

    Raises:
        UserError: the rows see each other.
    """
    before, row = (processor.encode_answer(text) for text in ("One row.", "And another?"))
    mode, device = model.training, next(model.parameters()).device
    ids = torch.tensor([[*before, *row]], device=device)
    places = torch.tensor([[*range(len(before)), *range(len(row))]], device=device)
    model.eval()
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()  # type: ignore[operator]
    arguments = model_inputs({"inputs_embeds": embedded, "position_ids": places})
    logits = model(**arguments).logits[:, len(before) :]
    (gradient,) = torch.autograd.grad(logits.float().logsumexp(dim=-1).sum(), embedded)
    model.train(mode)
    if gradient[:, : len(before)].any():
        kind = model.config.model_type  # type: ignore[union-attr]
        problem = f"loss.packing: in this model's architecture ({kind}) rows that share a sequence see each other"
        raise UserError(problem, "Set loss.packing: false.")
