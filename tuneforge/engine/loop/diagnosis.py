"""`Diagnosis` steps: measure, and leave weights, buffers, gradients, modes and random generators as they were."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from tuneforge.engine.context.batches import micro_batches
from tuneforge.engine.context.run import Run
from tuneforge.engine.data.dataset import Batch
from tuneforge.engine.data.sampler import EpochSampler
from tuneforge.engine.loop.backward import compute_loss
from tuneforge.engine.loop.phase_components import PhaseComponents
from tuneforge.engine.model.device import is_out_of_memory, root_cause
from tuneforge.engine.model.freezing import freeze, full_state, restore_state, select, set_modes
from tuneforge.engine.model.fsdp import out_of_memory_error
from tuneforge.engine.model.optimizer import Optimization
from tuneforge.errors import PluginError
from tuneforge.plugin.results import Diagnostics
from tuneforge.plugin.steps import Diagnosis, Phase

CANDIDATE_LRS = tuple(10 ** (exponent / 4) for exponent in range(-24, 1))
"""Rates of an `"lrs"` diagnosis: 1e-6 to 1, four a decade."""


def diagnose(run: Run, step: Diagnosis, components: PhaseComponents) -> Diagnostics:
    """Do a `Diagnosis` step."""
    with _preserve_state(run):
        run.phase = Phase(step.name, train=step.train, steps=1)  # what a step that asks for its phase finds
        measures = {"gradients": _gradient_norms, "features": _feature_drift, "lrs": _losses_by_lr}
        return Diagnostics(step_name=step.name, values=measures[step.measure](run, step, components))


def _gradient_norms(run: Run, step: Diagnosis, components: PhaseComponents) -> dict[Any, float]:
    """Gradient norm over weight norm, mean over batches (the relative gradient norm of Lee et al. 2023)."""
    del components
    names = select(run.model, step.train)
    freeze(run.model, names)
    named = run.model.parameters()
    members: dict[Any, list[nn.Parameter]] = {}
    for name in names:
        members.setdefault(_group_name(run, name) if step.by == "group" else name, []).append(named[name])
    total = dict.fromkeys(members, 0.0)
    count = 0
    for batch in _first_batches(run, step.batches):
        count += 1
        run.model.module.zero_grad(set_to_none=True)
        _backward(run, batch)
        for key, parameters in members.items():
            total[key] += _relative_gradient_norm(parameters)
    return {key: value / count for key, value in total.items()}


def _relative_gradient_norm(parameters: list[nn.Parameter]) -> float:
    """Joint norm of the gradients over the joint norm of the weights; infinite where all weights are 0."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    gradient = float(torch.nn.utils.get_total_norm(gradients)) if gradients else 0.0
    weight = float(torch.nn.utils.get_total_norm([parameter.detach() for parameter in parameters]))
    return gradient / weight if weight else math.inf if gradient else 0.0


def _feature_drift(run: Run, step: Diagnosis, components: PhaseComponents) -> dict[Any, float]:
    """How far each group's output on validation lies from that on training, in standard deviations a channel."""
    del components
    modules = {
        group.name: run.model.module.get_submodule(_last_module(run, group.prefixes)) for group in run.model.groups
    }
    train = _moments(run, modules, _first_batches(run, step.batches))
    val = _moments(run, modules, islice(run.evaluation_batches(run.data.val), step.batches))
    drift = {}
    for name in train:
        (mean, variance), (other_mean, other_variance) = train[name], val[name]
        spread = ((variance + other_variance) / 2).sqrt().clamp_min(1e-6)
        drift[name] = float(((mean - other_mean).abs() / spread).mean())
    return drift


def _moments(run: Run, modules: dict[str, nn.Module], batches: Iterator[Batch]) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and variance (channels,) of each module's output over the samples of some batches."""
    seen: dict[str, list[Tensor]] = {name: [] for name in modules}

    def catcher(name: str) -> Any:
        return lambda module, args, output: seen[name].append(_channel_means(output))

    handles = [module.register_forward_hook(catcher(name)) for name, module in modules.items()]
    try:
        with torch.no_grad():
            for batch in batches:
                run.forward(batch.inputs)
    finally:
        for handle in handles:
            handle.remove()
    stacked = {name: torch.cat(found).double().cpu() for name, found in seen.items() if found}
    return {name: (rows.mean(0), rows.var(0, correction=0)) for name, rows in stacked.items()}


def _channel_means(output: Any) -> Tensor:
    """One number a channel and sample, (b, channels): maps are averaged over space, sequences over positions."""
    tensor: Tensor = output[0] if isinstance(output, (tuple, list)) else output
    if tensor.ndim == 3:
        return tensor.mean(1)
    return tensor.flatten(2).mean(2) if tensor.ndim > 3 else tensor


def _losses_by_lr(run: Run, step: Diagnosis, components: PhaseComponents) -> dict[Any, float]:
    """The loss on a batch after one optimizer step at each of `CANDIDATE_LRS`, always from the same weights."""
    names = select(run.model, step.train)
    freeze(run.model, names)
    start = {name: tensor.clone() for name, tensor in full_state(run.model.module).items()}
    batches = list(_first_batches(run, step.batches))
    losses: dict[Any, float] = {}
    for lr in CANDIDATE_LRS:
        total = 0.0
        for batch in batches:
            restore_state(run.model.module, start)
            optimization = Optimization()
            phase = Phase(step.name, train=step.train, steps=1, lr=lr)
            optimization.set_param_groups(run.model, phase, names, components.peek_optimizer(phase), same=False)
            run.model.module.zero_grad(set_to_none=True)
            _backward(run, batch)
            optimization.step()
            with torch.no_grad():
                total += sum(
                    float(compute_loss(run, micro_batch)[0]) * share
                    for micro_batch, share in _micro_batches(run, batch)
                )
        losses[lr] = total / len(batches)
    return losses


def _backward(run: Run, batch: Batch) -> None:
    """Add the gradient of a batch's loss; in smaller passes where memory does not suffice."""
    summed = run.process_group.world_size if run.sharded else 1  # gradients of so many ranks, each of this same batch
    while True:
        size = min(run.engine_state.micro_batch_size or len(batch.indices), len(batch.indices))
        full = False
        try:
            for micro_batch, share in _micro_batches(run, batch):
                torch.autograd.backward(compute_loss(run, micro_batch)[0] * (share / summed))
        except (RuntimeError, MemoryError, PluginError) as error:
            full = is_out_of_memory(error) and size > 1
            if not full:
                raise
            if run.sharded:
                raise out_of_memory_error(root_cause(error), where="diagnosis", flag="--micro-batch") from None
        if run.sharded:
            run.process_group.all_reduce_gradients(
                [each for each in run.model.parameters().values() if each.requires_grad]
            )
        if not run.process_group.all_reduce_any(full)[0]:
            return
        run.model.module.zero_grad(set_to_none=True)
        size = run.engine_state.micro_batch_size = -(-size // 2)
        run.device.empty_cache()
        run.log(f"  out of memory while gradients are measured: {size} samples a pass here")


def _micro_batches(run: Run, batch: Batch) -> Iterator[tuple[Batch, float]]:
    """The passes of a batch, each with its share of the samples."""
    return ((piece, len(piece.indices) / len(batch.indices)) for piece in micro_batches(run, batch))


def _first_batches(run: Run, count: int) -> Iterator[Batch]:
    sampler = EpochSampler(len(run.data.train), run.config.seed, run.epoch)
    return islice(run.training_batches(sampler, None, per_rank=False), count)


def _group_name(run: Run, parameter: str) -> str:
    return next(group.name for group in run.model.groups if group.contains(parameter))


def _last_module(run: Run, prefixes: tuple[str, ...]) -> str:
    paths = {path for path, _ in run.model.module.named_modules()}
    return next((prefix for prefix in reversed(prefixes) if prefix in paths), "")


@contextlib.contextmanager
def _preserve_state(run: Run) -> Iterator[None]:
    """Put weights, buffers, gradients' requirement, modes and random generators back, to the bit."""
    module = run.model.module
    state = {name: tensor.clone() for name, tensor in full_state(module).items()}
    requires_grad = {name: parameter.requires_grad for name, parameter in run.model.parameters().items()}
    modes = [(child, child.training) for child in module.modules()]
    micro_batch = run.engine_state.micro_batch_size  # a diagnosis is in eval mode, where a pass over one sample will do
    with (
        torch.random.fork_rng(device_type=run.device.torch.type) if run.device.torch.type == "cuda" else _fork_cpu_rng()
    ):
        module.eval()
        try:
            yield
        finally:
            run.phase, run.engine_state.micro_batch_size = None, micro_batch
            restore_state(module, state)
            set_modes(modes)
            freeze(run.model, [name for name, requires in requires_grad.items() if requires])


def _fork_cpu_rng() -> contextlib.AbstractContextManager[None]:
    return torch.random.fork_rng(devices=[])
