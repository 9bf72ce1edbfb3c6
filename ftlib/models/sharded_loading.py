"""Load a model in parts: each rank reads its own rows of every weight, and no rank ever holds the whole model.

In the order of a start:

1. `reading_own_part`: `from_pretrained` builds the model without memory for weights, and fills it with this rank's
   rows. transformers itself maps the names in the files to those of the model, ties weights and computes buffers.
2. `detach_parts`: the model gets placeholders for its weights, with shape and dtype but without memory; the rows that
   were read are kept beside them. So adapters are added and parts are frozen as without sharding.
3. `initialize_from_parts`: what an adapter takes from the base's weights (DoRA's magnitudes, modules that train
   fully), with one whole weight in memory at a time.
4. `take_parts` and `attach_parts`, before and after `fully_shard`: the rows go where they belong.

The weights are those of a start without sharding, bit for bit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.nn import Parameter
from transformers import PreTrainedModel, modeling_utils
from transformers.core_model_loading import convert_and_load_state_dict_in_model

from ftlib.errors import UserError
from ftlib.models.tensor_files import StoredTensor, read_header

_PART = "_ftlib_part"
"""Attribute of a placeholder: this rank's rows, as a DTensor."""


@contextlib.contextmanager
def reading_own_part(mesh: DeviceMesh, device: torch.device) -> Iterator[None]:
    """Context in which `from_pretrained` returns a model whose parameters are DTensors.

    Args:
        mesh: from `sharding.make_mesh`.
        device: where the rows are placed.
    """

    def load(
        model: PreTrainedModel, state_dict: None, checkpoint_files: Sequence[str], load_config: Any, *_: Any
    ) -> tuple[Any, Any]:
        _distribute(model, mesh)
        settings = dataclasses.replace(load_config, device_map={"": device})
        found = convert_and_load_state_dict_in_model(model, _open_files(checkpoint_files), settings)
        _share_fault(None)  # next, all ranks compare tied weights: one that could not read its part would not
        return found

    name = "_load_pretrained_model"
    original = PreTrainedModel.__dict__[name]
    setattr(PreTrainedModel, name, staticmethod(load))
    try:
        yield
    finally:
        setattr(PreTrainedModel, name, original)


def _open_files(paths: Sequence[str]) -> dict[str, Any]:
    """Return the tensors of the files of a checkpoint, which are read when they are needed."""
    if not paths[0].endswith(".safetensors"):  # pickles of tensors, which torch maps into memory
        found: dict[str, Any] = {}
        for path in paths:
            found |= modeling_utils.load_state_dict(path, weights_only=True)
        return found
    return {name: _Rows(tensor) for path in paths for name, tensor in read_header(Path(path)).items()}


class _Rows:
    """A tensor in a file, with the interface of safetensors' slices; these would map the whole file into memory."""

    def __init__(self, tensor: StoredTensor) -> None:
        self._tensor = tensor

    def get_shape(self) -> list[int]:
        return list(self._tensor.shape)

    def __getitem__(self, index: Any) -> Tensor:
        shape = self._tensor.shape
        if index is ... or not shape:
            return self._tensor.read().reshape(shape)
        rows, *others = index
        start, stop, _ = rows.indices(shape[0])
        own = self._tensor.read(start, max(start, stop)).reshape(-1, *shape[1:])
        where = (slice(None), *others)
        return own[where]


def _distribute(model: torch.nn.Module, mesh: DeviceMesh) -> None:
    """Make every parameter of a model on the meta device a DTensor there, sharded as `fully_shard` does it."""
    placements: list[Placement] = [*[Replicate()] * (mesh.ndim - 1), Shard(0)]

    def distribute(parameter: Parameter) -> Parameter:
        part = distribute_tensor(parameter.detach(), mesh, placements, src_data_rank=None)
        return Parameter(part, requires_grad=parameter.requires_grad)

    _replace_parameters(model, distribute)


def _replace_parameters(model: torch.nn.Module, change: Callable[[Parameter], Parameter]) -> None:
    """Replace all parameters; those that modules share stay shared."""
    changed: dict[Parameter, Parameter] = {}  # compared by identity
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if parameter not in changed:
                    changed[parameter] = change(parameter)
                module._parameters[name] = changed[parameter]


def detach_parts(model: torch.nn.Module, device: str) -> None:
    """Replace the DTensors of a loaded model by placeholders without memory, which know their parts.

    Args:
        device: "meta"; or "cpu", for adapters to be added, which peft places beside the base's weights.

    Raises:
        RuntimeError: weights were loaded whole.
    """

    def detach(parameter: Parameter) -> Parameter:
        part = _own_part(parameter)
        empty = torch.zeros(1 if device == "cpu" else part.shape, dtype=part.dtype, device=device).expand(part.shape)
        placeholder = Parameter(empty, requires_grad=parameter.requires_grad)
        setattr(placeholder, _PART, part)
        return placeholder

    _replace_parameters(model, detach)


def _own_part(loaded: Parameter) -> DTensor:
    """Return a part that is not a view of something larger, such as a file that is mapped into memory."""
    part = loaded.detach()
    if not isinstance(part, DTensor):
        raise RuntimeError("transformers has loaded a weight of a sharded model as a whole")
    local = part.to_local()
    if local.untyped_storage().nbytes() == local.numel() * local.element_size():
        return part
    return _like(part, local.clone())


def _like(part: DTensor, local: Tensor) -> DTensor:
    return DTensor.from_local(
        local, part.device_mesh, part.placements, run_check=False, shape=part.shape, stride=part.stride()
    )


def replace_trained_parts(model: torch.nn.Module, exact: torch.nn.Module) -> None:
    """Replace the parts of trained parameters by those of another model, loaded in parts."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            setattr(parameter, _PART, _own_part(exact.get_parameter(name)))


def initialize_from_parts(model: torch.nn.Module) -> None:
    """Compute what the adapters of a model take from weights of the base. All ranks must call it.

    Args:
        model: from `prepare_for_training`, on placeholders.
    """
    from peft.tuners.lora.layer import LoraLayer

    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, LoraLayer):
                for name, dora in module.lora_magnitude_vector.items():
                    _initialize_dora(module, name, dora)
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for name, parameter in parameters.items():
            if ".modules_to_save." in name:  # peft's copy of a module, made of placeholders
                original = re.sub(r"\.modules_to_save\.\w+\.", ".original_module.", name)
                parameter.copy_(_whole(parameters[original]))


def _whole(placeholder: Parameter) -> Tensor:
    """Gather a weight of the base on the CPU."""
    part: Any = getattr(placeholder, _PART)
    whole: Tensor = part.full_tensor().cpu()
    return whole


def _initialize_dora(module: Any, name: str, dora: Any) -> None:
    base = module.get_base_layer()
    placeholder, magnitude = base.weight, dora.weight
    base.weight = Parameter(_whole(placeholder), requires_grad=False)
    factors = (module.lora_A[name].weight, module.lora_B[name].weight)
    lora_a, lora_b = (factor.to(base.weight.dtype) for factor in factors)  # as when peft adds an adapter
    dora.update_layer(base_layer=base, lora_A=lora_a, lora_B=lora_b, scaling=module.scaling[name])
    dora.weight = Parameter(dora.weight.to(magnitude.dtype), requires_grad=magnitude.requires_grad)
    base.weight = placeholder


def take_parts(model: torch.nn.Module) -> dict[str, DTensor]:
    """Move placeholders to the meta device, for `fully_shard`, and return parameter → this rank's part.

    All names of shared parameters are in it. It is empty unless the model was loaded in parts.
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    parts = {name: getattr(parameter, _PART) for name, parameter in named.items() if hasattr(parameter, _PART)}

    def move(parameter: Parameter) -> Parameter:
        if not hasattr(parameter, _PART):
            return parameter
        empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
        return Parameter(empty, requires_grad=parameter.requires_grad)

    _replace_parameters(model, move)
    return parts


def attach_parts(model: torch.nn.Module, parts: dict[str, DTensor]) -> None:
    """Fill a model whose placeholders were sharded by `fully_shard`.

    Args:
        parts: from `take_parts`. It is emptied on the way: a part that changes its dtype is in memory once.
    """
    filled: dict[int, Parameter] = {}
    for name, empty in list(model.named_parameters(remove_duplicate=False)):
        if name not in parts:
            continue
        local = parts.pop(name).to_local()
        if id(empty) not in filled:
            assert isinstance(empty, DTensor)
            filled[id(empty)] = Parameter(_like(empty, local.to(empty.dtype)), requires_grad=empty.requires_grad)
        module, _, last = name.rpartition(".")
        setattr(model.get_submodule(module), last, filled[id(empty)])


class _SharedFault(UserError):
    """A fault that all ranks know of."""


@contextlib.contextmanager
def failing_together() -> Iterator[None]:
    """Context in which a fault that one rank finds becomes the fault of all, which must all enter it."""
    fault: tuple[str, str] | None = None
    try:
        yield
    except _SharedFault:
        raise
    except UserError as error:
        fault = error.problem, error.remedy
    _share_fault(fault)


def _share_fault(fault: tuple[str, str] | None) -> None:
    """Raise a fault on all ranks if one has any: a problem and its remedy. All ranks must call it."""
    found: list[tuple[str, str] | None] = [None] * distributed.get_world_size()
    distributed.all_gather_object(found, fault)
    if first := next((one for one in found if one), None):
        raise _SharedFault(*first)
