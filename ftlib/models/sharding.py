"""Shard a model over the GPUs of a job with PyTorch's FSDP2 (`torch.distributed.fsdp.fully_shard`).

Without sharding every GPU holds the whole model (DDP). Sharded, it holds a part of every weight; before a block
computes, its weights are gathered from all ranks, and freed after it. The precision is that of training without
sharding: no `mp_policy` is used, which would change the numbers.

- With adapters (LoRA, DoRA) the frozen base is sharded. The adapters stay plain tensors on every rank, so that their
  optimizer, gradient clipping and checkpoints are those of DDP; `average_gradients` takes DDP's place.
- Otherwise all weights are sharded. Trained weights, their gradients and their optimizer states are DTensors.

In the order of a run: the groups in which weights are gathered, `shard`, gradients of adapters, checkpoints (whole
tensors, whatever the number of ranks), and evaluation.
"""

from __future__ import annotations

import contextlib
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, distributed
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor

from ftlib.errors import UserError
from ftlib.models import sharded_loading
from ftlib.models.tensor_files import SafetensorsWriter, TensorEntry, read_header

Scope = Literal["none", "node", "full"]
"""Over which GPUs a model is sharded: `none` (DDP), those of a node (each node has the whole model), or all."""

LOWEST_TORCH = (2, 13)
"""The oldest torch with which sharded training was compared to training on one process. Older ones lack arguments of
`fully_shard`, or group tied embeddings differently."""


def require_torch(version: str = torch.__version__) -> None:
    """Check that this torch can shard.

    Raises:
        UserError: it is too old.
    """
    if tuple(int(number) for number in version.split(".")[:2]) < LOWEST_TORCH:
        lowest = ".".join(map(str, LOWEST_TORCH))
        raise UserError(
            f"parallel.shard: sharding needs torch {lowest} or newer, here it is {version}",
            "Use an image with a newer torch, or set parallel.shard: none.",
        )


def make_mesh(device: torch.device, scope: Scope, nodes: int) -> DeviceMesh:
    """Return the ranks that share a model, for `shard`. All ranks must call it.

    Args:
        nodes: number of nodes; ranks are numbered node by node, as Slurm's block distribution does.
    """
    world = distributed.get_world_size()
    if scope == "node" and nodes > 1:
        return init_device_mesh(device.type, (nodes, world // nodes), mesh_dim_names=("replicate", "shard"))
    return init_device_mesh(device.type, (world,), mesh_dim_names=("shard",))


def groups(model: torch.nn.Module) -> list[list[torch.nn.Module]]:
    """Return the modules whose weights are gathered together: each block, and the embeddings with a head tied to them.

    All other weights are gathered with the root: a head of its own, norms, PaliGemma's projector.

    Args:
        model: from `prepare_for_training`.
    """
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    found = [[block] for block in _blocks(base)]
    inputs, head = base.get_input_embeddings(), base.get_output_embeddings()
    tied = head is not None and head.weight is inputs.weight
    return [*found, [inputs, head] if tied else [inputs]]


def _blocks(module: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """Yield the entries of the outermost lists of modules: the blocks of the language model and of the vision tower."""
    for child in module.children():
        if isinstance(child, torch.nn.ModuleList):
            yield from (block for block in child if any(True for _ in block.parameters()))
        else:
            yield from _blocks(child)


def replicated_parameters(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """Return the parameters that sharding leaves whole on every rank: those of adapters."""
    if not hasattr(model, "peft_config"):
        return []
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def shard(model: torch.nn.Module, mesh: DeviceMesh, device: torch.device) -> None:
    """Shard a model in place and move this rank's part to its device. Ranks do not communicate here.

    Args:
        model: from `prepare_for_training`: adapters and `requires_grad` must not change afterwards.

    Raises:
        RuntimeError: weights were left whole, or what is trained has changed.
    """
    from torch.distributed.fsdp import fully_shard

    # Logits are a view, but the loss does not write into them.
    warnings.filterwarnings("ignore", r"FSDP2-wrapped module .* returned a view tensor", UserWarning)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    whole = replicated_parameters(model)
    for parameter in whole:
        parameter.data = parameter.data.to(device)  # fully_shard does not move ignored parameters
    parts = sharded_loading.take_parts(model)
    for group in groups(model):
        fully_shard(group, mesh=mesh, ignored_params=set(whole))
    fully_shard(model, mesh=mesh, ignored_params=set(whole))
    sharded_loading.attach_parts(model, parts)
    _check(model, trained, whole)


def _check(model: torch.nn.Module, trained: list[str], replicated: Iterable[torch.nn.Parameter]) -> None:
    """Fail loudly if sharding did not do what this module relies on."""
    left = {id(parameter) for parameter in replicated}
    whole = [name for name, one in model.named_parameters() if not isinstance(one, DTensor) and id(one) not in left]
    if whole:
        raise RuntimeError(f"{len(whole)} parameters were not sharded, such as {whole[0]}")
    after = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if after != trained:
        raise RuntimeError(f"sharding changed what is trained: {len(trained)} parameters before, {len(after)} after")


def is_sharded(model: torch.nn.Module) -> bool:
    """Return whether `shard` was applied to a model."""
    from torch.distributed.fsdp import FSDPModule

    return isinstance(model, FSDPModule)


def trains_shards(model: torch.nn.Module) -> bool:
    """Return whether trained parameters are sharded: not with adapters."""
    return any(isinstance(one, DTensor) for one in model.parameters() if one.requires_grad)


# Gradients of adapters, which FSDP does not reduce.


_COLLECTIVE_BYTES = 256 << 20
"""Gradients are copied to be reduced together, at least this much at a time."""


def broadcast_parameters(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Copy rank 0's parameters to all ranks, which must all call it."""
    with torch.no_grad():
        for parameter in parameters:
            distributed.broadcast(parameter.data, src=0)


def average_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Replace gradients by their mean over all ranks, which must all call it; one collective for at least
    `_COLLECTIVE_BYTES` of a dtype.
    """
    waiting: dict[torch.dtype, list[Tensor]] = {}
    sizes: Counter[torch.dtype] = Counter()
    full: list[list[Tensor]] = []
    for gradient in (parameter.grad for parameter in parameters):
        if gradient is not None:
            waiting.setdefault(gradient.dtype, []).append(gradient)
            sizes[gradient.dtype] += gradient.nbytes
            if sizes[gradient.dtype] >= _COLLECTIVE_BYTES:
                full.append(waiting.pop(gradient.dtype))
                del sizes[gradient.dtype]
    for gradients in [*full, *waiting.values()]:
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        distributed.all_reduce(flat)
        flat /= distributed.get_world_size()
        for gradient, mean in zip(gradients, flat.split([one.numel() for one in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))


def differing_parameters(parameters: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the tensors that are not equal, bit for bit, on all ranks, which must all call it."""
    names = []
    for name, tensor in parameters.items():
        first = tensor.detach().clone()
        distributed.broadcast(first, src=0)
        differs = torch.tensor(int(not torch.equal(first, tensor.detach())), device=tensor.device)
        distributed.all_reduce(differs, distributed.ReduceOp.MAX)
        if differs:
            names.append(name)
    return names


# Checkpoints hold whole tensors, so that any number of ranks can read them, with sharding or without. They are written
# tensor by tensor, in the same order on all ranks: one whole tensor is in memory at a time.


def gather(tensor: Tensor, keep: bool = True) -> Tensor | None:
    """Return a whole tensor on the CPU if it is sharded, else the tensor. All ranks must call it in the same order.

    Args:
        keep: whether this rank needs the result; other ranks get None.
    """
    if not isinstance(tensor, DTensor):
        return tensor if keep else None
    whole: Tensor = tensor.detach().full_tensor()  # type: ignore[attr-defined]
    return whole.cpu() if keep else None


def local_part(tensor: Tensor) -> Tensor:
    """Return what this rank holds of a tensor; of a sharded one that may be nothing."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def own_part(whole: Tensor, like: Tensor) -> Tensor:
    """Return this rank's part of a whole tensor as a DTensor, if the given parameter is one. No communication."""
    if not isinstance(like, DTensor):
        return whole
    placed = whole.to(like.device)
    return distribute_tensor(placed, like.device_mesh, like.placements, src_data_rank=None)


def write_tensors(tensors: Mapping[str, Tensor], file: Path | None, dtypes: Mapping[str, torch.dtype]) -> None:
    """Write whole tensors to a safetensors file. All ranks must call it with the same names.

    Args:
        file: None on ranks that do not write.
        dtypes: name → dtype in the file, for names that are not written in the tensor's own.
    """
    entries = [TensorEntry(name, tuple(one.shape), dtypes.get(name, one.dtype)) for name, one in tensors.items()]
    entries.sort(key=lambda entry: -entry.dtype.itemsize)  # for alignment
    writer = SafetensorsWriter(file, entries) if file else None
    try:
        for entry in entries:
            whole = gather(tensors[entry.name], keep=writer is not None)
            if writer and whole is not None:
                writer.write(entry.name, 0, whole.to("cpu", entry.dtype).reshape(1, -1))
    except BaseException:
        if writer:
            writer.discard()
        raise
    if writer:
        writer.close()


def write_optimizer_state(optimizer: torch.optim.Optimizer, file: Path | None) -> None:
    """Write `optimizer.state_dict()` with whole tensors, for `torch.load`. All ranks must call it.

    Args:
        file: None on ranks that do not write.
    """
    state: dict[str, Any] = optimizer.state_dict()
    offsets: dict[str, Any] = {}
    if file:
        # First the file with gaps for the tensors, then each tensor into its gap.
        with FakeTensorMode(), torch.serialization.skip_data(materialize_fake_tensors=True):
            torch.save(_map_state(state, lambda one: torch.empty(one.shape, dtype=one.dtype)), file)
        with FakeTensorMode():
            offsets = torch.load(file, weights_only=True)["state"]
    with file.open("r+b") if file else contextlib.nullcontext() as written:
        for number, values in state["state"].items():
            for name, value in values.items():
                if not isinstance(value, Tensor):
                    continue
                whole = gather(value, keep=written is not None)
                if written and whole is not None:
                    written.seek(offsets[number][name].untyped_storage()._checkpoint_offset)
                    written.write(whole.to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _map_state(state: dict[str, Any], change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """Return an optimizer's state with other tensors."""
    changed = {
        number: {name: change(value) if isinstance(value, Tensor) else value for name, value in values.items()}
        for number, values in state["state"].items()
    }
    return {**state, "state": changed}


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load a state of whole tensors, from `write_optimizer_state`, into an optimizer of sharded parameters."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def own(number: int, value: Any) -> Any:
        if isinstance(value, Tensor) and value.shape == parameters[number].shape:
            return own_part(value, parameters[number])
        return value

    parts = {
        number: {name: own(number, value) for name, value in states.items()}
        for number, states in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": parts})


def gather_weights(
    model: torch.nn.Module, file: Path | None, trained_dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Return all weights under their names, for `save_pretrained`. All ranks must call it.

    They are gathered into a file that is mapped into memory. Tied weights are one tensor with several names.

    Args:
        file: it is removed from its folder, and from the storage when the last tensor is freed. None on ranks that do
            not need the weights, where the result is empty.
        trained_dtype: the dtype of the result's trained weights; None: the dtype that they train in.
    """
    named = {name: parameter.detach() for name, parameter in model.named_parameters()}
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    write_tensors(named, file, dict.fromkeys(trained, trained_dtype) if trained_dtype else {})
    if not file:
        return {}
    mapped = {name: stored.map() for name, stored in read_header(file).items()}
    file.unlink()
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    weights = {name: mapped[first[id(one)]] for name, one in model.named_parameters(remove_duplicate=False)}
    persistent = model.state_dict().keys()
    return weights | {name: buffer for name, buffer in model.named_buffers() if name in persistent}


# Evaluation during training.


@contextlib.contextmanager
def whole(model: torch.nn.Module) -> Iterator[None]:
    """Context in which every rank holds all weights as plain tensors. All ranks must enter it.

    No collective is left in a forward pass inside, so that ranks may evaluate different numbers of rows. The whole
    model must fit one GPU beside this rank's part of the optimizer's state.
    """
    from torch.distributed.fsdp import FSDPModule

    parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
    if not parts:
        yield
        return
    # Before the first training step the root is not known yet: a generation, which enters below it, would become one.
    model._get_fsdp_state()._lazy_init()  # type: ignore[operator]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(part is not model, recurse=False)
            part.reshard()
