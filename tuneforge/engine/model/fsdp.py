"""A model of which each rank holds a part (`--shard`): torch's FSDP2 (`fully_shard`), one unit a layer at a time.

Parameters, their gradients and whatever is kept of them (moments, averages, snapshots, evidence) are DTensors: each
rank has some rows of each. A unit's weights are gathered when its forward or backward pass begins and given back when
it ends, so all ranks must make the same passes. Gradients are summed, as between ranks that hold the whole model.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, distributed, nn

from tuneforge.engine.model.model import Model
from tuneforge.errors import HaltError, PluginError, UsageError
from tuneforge.plugin.config import RunConfig

_ELEMENTWISE_OPTIMIZERS = (
    torch.optim.SGD, torch.optim.AdamW, torch.optim.Adam, torch.optim.NAdam, torch.optim.RAdam, torch.optim.RMSprop,
    torch.optim.Adagrad,
)  # fmt: skip
"""Optimizers to which the rows of a tensor are independent of one another, each held against one process in a test."""


def check_config(config: RunConfig) -> None:
    """Refuse what a sharded model cannot do.

    Raises:
        UsageError: It was asked for.
    """
    whole_graph = {
        "--compile": config.compile,
        "--memory-format channels-last": config.memory_format == "channels-last",
    }
    for flag in (flag for flag, asked in whole_graph.items() if config.shard and asked):
        raise UsageError(
            f"{flag} does not go with --shard",
            why="weights are gathered a layer at a time, in their plain layout, while the pass goes on",
            fix="leave one of the two out",
        )


def shard(model: Model, device: torch.device) -> str:
    """Leave each rank its part of every parameter, on the device; the module is changed in place.

    Single numbers stay whole on every rank, as buffers do.

    Args:
        model: Whose module; it need not fit the device as a whole, a layer of it must.
        device: Of this rank.

    Returns:
        A sentence on what each rank holds.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    size = distributed.get_world_size()
    mesh = init_device_mesh(device.type, (size,))
    total = sum(each.numel() * each.element_size() for each in model.module.parameters())
    numbers = {each for each in model.module.parameters() if each.ndim == 0}
    units = [*_units(model), model.module]
    for module in units:
        unit = fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=numbers)
        unit.set_force_sum_reduction_for_comms(True)  # NCCL's own division by a factor is unknown to gloo
        unit.set_gradient_divide_factor(1.0)
    for each in numbers:
        each.data = each.data.to(device)
    _register_weight_checks(units)
    own = sum(part.numel() * part.element_size() for each in model.module.parameters() for part in [local_shard(each)])
    return f"sharded: {own / 1e6:,.1f} MB of {total / 1e6:,.1f} MB of weights on each rank, in {len(units)} units"


def _units(model: Model) -> Iterator[nn.Module]:
    """What is gathered at once: the layers of each group; weights that are tied between layers stay with the root."""
    uses = _count_uses(model.module)
    for prefix in (prefix for group in model.groups for prefix in group.prefixes):
        try:
            module = model.module.get_submodule(prefix)
        except AttributeError:  # a parameter by itself
            continue
        yield from (
            unit
            for unit in _flatten_containers(module)
            if all(uses[key] == count for key, count in _count_uses(unit).items())
        )


def _flatten_containers(module: nn.Module) -> Iterator[nn.Module]:
    if isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.Sequential)):
        for child in module.children():
            yield from _flatten_containers(child)
    elif next(module.parameters(), None) is not None:
        yield module


def _register_weight_checks(units: list[nn.Module]) -> None:
    """See at each pass that a unit computes with its own weights.

    FSDP2 gathers those it knows, so weights put in their place for a call would be passed over without a word.
    """
    known: set[int] = set()
    for unit in units:
        slots = [
            (child._parameters, name, each)
            for child in unit.modules()
            for name, each in child._parameters.items()
            if each is not None and is_sharded(each) and id(each) not in known
        ]
        known |= {id(each) for _, _, each in slots}
        unit.register_forward_pre_hook(functools.partial(_check_own_weights, slots), prepend=True)


def _check_own_weights(slots: Sequence[tuple[Mapping[str, Any], str, Tensor]], module: nn.Module, args: Any) -> None:
    del args
    if any(holder[name] is not own and is_sharded(holder[name]) for holder, name, own in slots):
        raise UsageError(
            f"{type(module).__name__} is called with other weights than its own",
            where="--shard",
            why="weights that are put in their place for a call are passed over where the model is sharded",
            fix="run without --shard, or with a strategy that has no second set of weights",
        )


def _count_uses(module: nn.Module) -> Counter[int]:
    return Counter(id(each) for child in module.modules() for each in child.parameters(recurse=False))


def is_sharded(tensor: Tensor) -> bool:
    """True for a tensor of which this rank holds a part; asked without importing DTensor, which takes a second."""
    return hasattr(tensor, "full_tensor")


def local_shard(tensor: Tensor) -> Tensor:
    """The rows (m, ...) that this rank holds, perhaps none; any other tensor as it is."""
    part: Tensor = tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return part


def full_tensor(tensor: Tensor) -> Tensor:
    """All rows (n, ...), gathered from all ranks; any other tensor as it is."""
    full: Tensor = tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return full


def shard_like(target: Tensor, tensor: Tensor) -> Tensor:
    """The tensor, sharded where `target` is: each rank takes its rows of what all of them hold whole."""
    if not is_sharded(target) or is_sharded(tensor):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = target.device_mesh, target.placements  # type: ignore[attr-defined]
    return distribute_tensor(tensor.to(target.device), mesh, placements, src_data_rank=None)


def any_rank(flag: bool, tensor: Tensor) -> bool:
    """Whether the flag is raised on any rank that holds a part of the tensor."""
    raised = torch.tensor([flag], dtype=torch.int32, device=tensor.device)
    distributed.all_reduce(raised, op=distributed.ReduceOp.MAX, group=tensor.device_mesh.get_group())  # type: ignore[attr-defined]
    return bool(raised)


def gather_state(state: Any, *, keep: bool) -> Any:
    """Nested plain data and tensors with every sharded tensor whole, on the CPU; one met twice stays one.

    Args:
        state: Of the same structure on all ranks, which all ask at the same time.
        keep: False on ranks that write nothing: they take part, and hold no more than a tensor at a time.
    """
    found: dict[int, Tensor] = {}

    def gather(value: Any) -> Any:
        if isinstance(value, Tensor) and is_sharded(value):
            if id(value) not in found:
                full = full_tensor(value.detach())
                found[id(value)] = full.cpu() if keep else torch.empty(0)
            return found[id(value)]
        if isinstance(value, Mapping):
            return {key: gather(item) for key, item in value.items()}
        return [gather(item) for item in value] if isinstance(value, (list, tuple)) else value

    return gather(state)


def scatter_state(state: Any, parameters: Mapping[str, Tensor], device: torch.device) -> Any:
    """What `gather_state` was given: a tensor under a parameter's name, of its shape, is sharded as the parameter is.

    Args:
        state: Nested plain data and whole tensors.
        parameters: By name, sharded.
        device: For all other tensors.
    """
    found: dict[int, Tensor] = {}

    def scatter(value: Any, name: str) -> Any:
        if isinstance(value, Tensor):
            if id(value) not in found:
                fits = name in parameters and value.shape == parameters[name].shape
                found[id(value)] = shard_like(parameters[name], value) if fits else value.to(device)
            return found[id(value)]
        if isinstance(value, Mapping):
            return {key: scatter(item, key if key in parameters else name) for key, item in value.items()}
        return [scatter(item, name) for item in value] if isinstance(value, (list, tuple)) else value

    return scatter(state, "")


def make_optimizer(component: Any, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """The optimizer that a component makes, fused where torch can.

    Raises:
        UsageError: It looks at more than one element of a tensor at a time, and a rank has only some of the rows.
    """
    if not any(is_sharded(each) for group in groups for each in group["params"]):
        made: torch.optim.Optimizer = component.make(groups, fused=True)
        return made
    plain: torch.optim.Optimizer = component.make(groups, fused=False)
    if type(plain) not in _ELEMENTWISE_OPTIMIZERS:
        raise UsageError(
            f"{type(plain).__name__} does not go with --shard",
            where="--optimizer",
            why="each rank has some rows of a tensor, and only optimizers that treat each element by itself are known "
            "to give what they give on the whole",
            fix=f"use one of {', '.join(kind.__name__ for kind in _ELEMENTWISE_OPTIMIZERS)}",
        )
    fused = isinstance(plain, (torch.optim.AdamW, torch.optim.Adam))  # torch has no fused SGD for sharded tensors
    return component.make(groups, fused=True) if fused else plain


def check_loss(loss: Tensor) -> Tensor:
    """The loss as it is.

    Raises:
        UsageError: It was computed from the weights themselves, of which each rank has a part.
    """
    if is_sharded(loss):
        raise UsageError(
            "the loss reads the weights themselves",
            where="--shard",
            why="each rank has a part of them, so a penalty on weights would be counted otherwise than in one process",
            fix="run without --shard, or with a strategy that has no such penalty",
        )
    return loss


def incompatible_error(error: PluginError) -> UsageError:
    """Why a sharded model does not take the data; mostly one that uses a layer's weights without calling the layer."""
    return UsageError(
        f"{error.what}, sharded as it is",
        where=error.where,
        why=error.why,
        fix="see that it runs without --shard; each layer must be called for its weights to be gathered",
    )


def out_of_memory_error(error: BaseException, *, where: str, flag: str) -> HaltError:
    """The end of a run whose memory ran out: the other ranks are in the midst of a pass, so none can begin again."""
    return HaltError(
        "memory ran out while the model was sharded",
        where=where,
        why=str(error).partition("\n")[0],
        fix=f"begin again with a smaller {flag}, or on more ranks",
    )
