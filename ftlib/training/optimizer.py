"""Learning rates and weight decays of single parameters: `parts`, and LoRA+ (`adapter.loraplus_lr_ratio`).

transformers makes an optimizer with two groups of parameters, with and without weight decay. Its groups are split here,
so that every optimizer of TrainingArguments works. The schedule multiplies the rate of each group.
"""

from __future__ import annotations

from collections.abc import Collection

import torch

from ftlib.config.schema import Config, Lora, PartOptimization
from ftlib.errors import UserError
from ftlib.models.adapters import parameter_part

_LORAPLUS = (".lora_B.", ".lora_magnitude_vector.")
"""Parameters whose rate LoRA+ multiplies, as in PEFT's create_loraplus_optimizer."""


def has_own_settings(config: Config) -> bool:
    """Return whether some parameters have another learning rate or weight decay than `training:` says."""
    adapter = config.adapter
    return bool(config.parts) or (isinstance(adapter, Lora) and adapter.loraplus_lr_ratio != 1)


def split_groups(
    optimizer: torch.optim.Optimizer, model: torch.nn.Module, config: Config, decayed: Collection[str]
) -> float:
    """Split the groups of an optimizer that has not made a step.

    Args:
        decayed: names of the parameters that have weight decay.

    Returns:
        The factor between the learning rate of the first group and that of the config; 1 if any group has that.

    Raises:
        UserError: a key of `parts` names a part without trained parameters.
    """
    ratio = config.adapter.loraplus_lr_ratio if isinstance(config.adapter, Lora) else 1.0
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found: dict[tuple[float, float | None, int], dict[str, object]] = {}
    seen = set()
    for number, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            name = names[id(parameter)]
            part = parameter_part(model, name, config.model)
            seen.add(part)
            own = config.parts.get(part, PartOptimization())  # type: ignore[call-overload]
            factor = own.learning_rate_factor * (ratio if any(word in name for word in _LORAPLUS) else 1)
            decay = group.get("weight_decay")
            if own.weight_decay is not None and name in decayed:
                decay = own.weight_decay
            changed = {"lr": group["lr"] * factor, **({} if decay is None else {"weight_decay": decay})}
            split = found.setdefault((factor, decay, number), {**group, **changed, "params": []})
            split["params"].append(parameter)  # type: ignore[attr-defined]
    if idle := set(config.parts) - seen:
        raise UserError(
            f"parts.{min(idle)} has no effect: no parameter of this part is trained",
            "Remove it, or train the part (adapter.targets, adapter.modules_to_save).",
        )
    ordered = sorted(found, key=lambda key: key[0] != 1)  # the Trainer logs the rate of the first group
    optimizer.param_groups[:] = [found[key] for key in ordered]
    return ordered[0][0]
