"""Sharded models (`--shard`): torch's FSDP2 (`fully_shard`), with one unit per layer.

Parameters, their gradients and everything of their shape (optimizer state, averages, snapshots, the freeze check's
copies) are DTensors: each rank holds some rows of each. A unit's weights are gathered when its forward or backward
pass begins and freed when it ends, so all ranks must make the same passes. Gradients are summed over the ranks, as
without sharding.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed, nn

from tuneforge.errors import HaltError, PluginError, UsageError
from tuneforge.plugin.config import RunConfig

if TYPE_CHECKING:
    from tuneforge.engine.model.model import Model

_ELEMENTWISE_OPTIMIZERS = (
    torch.optim.SGD, torch.optim.AdamW, torch.optim.Adam, torch.optim.NAdam, torch.optim.RAdam, torch.optim.RMSprop,
    torch.optim.Adagrad,
)  # fmt: skip
"""Optimizers that treat every element by itself, so that updating shards equals updating the full tensor. A test
compares each with a single process.
"""


def check_config(config: RunConfig) -> None:
    """Refuse settings that a sharded model does not support.

    Raises:
        UsageError: One of them is set.
    """
    whole_graph = {
        "--compile": config.compile,
        "--memory-format channels-last": config.memory_format == "channels-last",
    }
    for flag in (flag for flag, asked in whole_graph.items() if config.shard and asked):
        raise UsageError(
            f"{flag} cannot be combined with --shard",
            why="weights are gathered layer by layer during the forward pass, as contiguous tensors",
            fix="drop one of the two flags",
        )


def shard(model: Model, device: torch.device) -> str:
    """Shard every parameter over the ranks, in place, and move this rank's shards to the device.

    Scalars and buffers are replicated on every rank.

    Args:
        model: Whose module; it need not fit on the device as a whole, but each layer must.
        device: The device of this rank.

    Returns:
        A sentence on how much each rank holds.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    size = distributed.get_world_size()
    mesh = init_device_mesh(device.type, (size,))
    total = sum(each.numel() * each.element_size() for each in model.module.parameters())
    scalars = {each for each in model.module.parameters() if each.ndim == 0}
    units = [*_units(model), model.module]
    for module in units:
        unit = fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=scalars)
        unit.set_force_sum_reduction_for_comms(True)  # gloo has no NCCL premultiplied sum
        unit.set_gradient_divide_factor(1.0)
    for each in scalars:
        each.data = each.data.to(device)
    _register_weight_checks(units)
    own = sum(part.numel() * part.element_size() for each in model.module.parameters() for part in [local_shard(each)])
    return f"sharded: {own / 1e6:,.1f} MB of {total / 1e6:,.1f} MB of weights on each rank, in {len(units)} units"


def _units(model: Model) -> Iterator[nn.Module]:
    """Yield the modules that are gathered as one: the layers of each group.

    Layers that share weights with others stay in the root unit, so that the shared weights are gathered once.
    """
    uses = _count_uses(model.module)
    for prefix in (prefix for group in model.groups for prefix in group.prefixes):
        try:
            module = model.module.get_submodule(prefix)
        except AttributeError:  # the prefix names a parameter, not a module
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
    """Make each unit check in each pass that it computes with its own weights.

    FSDP2 gathers only the parameters that it knows: weights swapped in for one call (`functional_call`) would be
    ignored silently.
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
            why="FSDP2 ignores weights that replace a layer's own for one call",
            fix="run without --shard, or with a strategy that needs only one set of weights",
        )


def _count_uses(module: nn.Module) -> Counter[int]:
    return Counter(id(each) for child in module.modules() for each in child.parameters(recurse=False))


def is_sharded(tensor: Tensor) -> bool:
    """Return True for a DTensor, of which this rank holds a shard; `isinstance` would import DTensor, which is slow."""
    return hasattr(tensor, "full_tensor")


def local_shard(tensor: Tensor) -> Tensor:
    """Return the rows (m, ...) that this rank holds, possibly none; return a tensor that is not sharded as it is."""
    part: Tensor = tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return part


def full_tensor(tensor: Tensor) -> Tensor:
    """Return all rows (n, ...), gathered from all ranks; return a tensor that is not sharded as it is."""
    full: Tensor = tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return full


def shard_like(target: Tensor, tensor: Tensor) -> Tensor:
    """Return the tensor, sharded if `target` is: each rank takes its rows of the full tensor that all ranks hold."""
    if not is_sharded(target) or is_sharded(tensor):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = target.device_mesh, target.placements  # type: ignore[attr-defined]
    return distribute_tensor(tensor.to(target.device), mesh, placements, src_data_rank=None)


def any_rank(flag: bool, tensor: Tensor) -> bool:
    """Return True if the flag is True on any rank that holds a shard of the tensor."""
    raised = torch.tensor([flag], dtype=torch.int32, device=tensor.device)
    distributed.all_reduce(raised, op=distributed.ReduceOp.MAX, group=tensor.device_mesh.get_group())  # type: ignore[attr-defined]
    return bool(raised)


def gather_state(state: Any, *, keep: bool) -> Any:
    """Return nested plain data and tensors with every sharded tensor gathered on the CPU; shared tensors stay shared.

    Args:
        state: Of the same structure on all ranks, which must all call this.
        keep: False on ranks that write nothing: they take part and hold no more than one full tensor at a time.
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
        return type(value)(map(gather, value)) if type(value) in (list, tuple) else value

    return gather(state)


def scatter_state(state: Any, parameters: Mapping[str, Tensor], device: torch.device) -> Any:
    """Return what `gather_state` was given: a tensor with a parameter's name and shape is sharded as the parameter is.

    Args:
        state: Nested plain data and full tensors.
        parameters: The sharded parameters by name.
        device: Where all other tensors are moved to.
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
        return type(value)(scatter(item, name) for item in value) if type(value) in (list, tuple) else value

    return scatter(state, "")


def make_optimizer(component: Any, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Return the optimizer that a component creates, with torch's fused kernels where they exist.

    Raises:
        UsageError: A model is sharded, and the optimizer is not known to treat each element by itself.
    """
    if not any(is_sharded(each) for group in groups for each in group["params"]):
        fused = all(group.get("fused", True) for group in groups)
        made: torch.optim.Optimizer = component.make(groups, fused=fused)
        return made
    plain: torch.optim.Optimizer = component.make(groups, fused=False)
    if type(plain) not in _ELEMENTWISE_OPTIMIZERS:
        raise UsageError(
            f"{type(plain).__name__} cannot be combined with --shard",
            where="--optimizer",
            why="each rank holds some rows of a tensor, and only optimizers that treat each element by itself update "
            "shards as they update the full tensor",
            fix=f"use one of {', '.join(kind.__name__ for kind in _ELEMENTWISE_OPTIMIZERS)}",
        )
    fused = isinstance(plain, (torch.optim.AdamW, torch.optim.Adam))  # torch has no fused SGD for DTensors
    return component.make(groups, fused=True) if fused else plain


def check_loss(loss: Tensor) -> Tensor:
    """Return the loss as it is.

    Raises:
        UsageError: It was computed directly from weights, of which each rank holds a shard.
    """
    if is_sharded(loss):
        raise UsageError(
            "the loss is computed directly from weights",
            where="--shard",
            why="each rank holds a shard of them, so a penalty on weights would differ from that of one process",
            fix="run without --shard, or with a strategy that has no such penalty",
        )
    return loss


def incompatible_error(error: PluginError) -> UsageError:
    """Return the error for a model that does not accept the data once it is sharded.

    The usual cause is a model that uses a layer's weights without calling the layer.
    """
    return UsageError(
        f"{error.what} once it is sharded",
        where=error.where,
        why=error.why,
        fix="check that it runs without --shard; a layer must be called for its weights to be gathered",
    )


def out_of_memory_error(error: BaseException, *, where: str, flag: str) -> HaltError:
    """Return the error that ends a sharded run whose memory ran out.

    The other ranks are in the middle of a pass, so no rank can repeat it with a smaller batch.
    """
    return HaltError(
        "a sharded run ran out of memory",
        where=where,
        why=str(error).partition("\n")[0],
        fix=f"start again with a smaller {flag}, or on more ranks",
    )
