"""Execute a `Diagnosis` step: measure gradients, features or learning rates, and restore the state of the run."""

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
from tuneforge.engine.loop.loss import compute_loss
from tuneforge.engine.loop.oom import CatchOutOfMemory, halve
from tuneforge.engine.loop.phase_components import PhaseComponents
from tuneforge.engine.loop.sample_weights import epoch_sampler
from tuneforge.engine.loop.validation import check_validation
from tuneforge.engine.model.freezing import freeze, select
from tuneforge.engine.model.inspection import preserve_state
from tuneforge.engine.model.module_state import full_state, restore_state
from tuneforge.engine.model.optimizer import Optimization
from tuneforge.plugin.results import Diagnostics
from tuneforge.plugin.steps import Diagnosis, Phase

CANDIDATE_LRS = tuple(10 ** (exponent / 4) for exponent in range(-24, 1))
"""Learning rates of an `"lrs"` diagnosis: 1e-6 to 1, four per decade."""


def diagnose(run: Run, step: Diagnosis, components: PhaseComponents) -> Diagnostics:
    """Execute a `Diagnosis` step; the model and random generators are left as they were."""
    with _inspect(run):
        run.phase = Phase(step.name, train=step.train, steps=1)  # losses and callbacks may read the phase
        if step.measure == "gradients":
            values = _gradient_norms(run, step)
        elif step.measure == "features":
            values = _feature_drift(run, step)
        else:
            values = _losses_by_lr(run, step, components)
        return Diagnostics(step_name=step.name, values=values)


def measure_lrs(run: Run, step: Diagnosis) -> tuple[dict[Any, float], float, int]:
    """Measure the loss after one optimizer step at each of `CANDIDATE_LRS`, for a run that does not train.

    Returns:
        The losses by learning rate, the momentum of the optimizer, and the number of parameters that would train.

    Raises:
        SelectorError: `step.train` selects no parameter.
    """
    names, components = select(run.model, step.train), PhaseComponents(run.config)
    run.phase = Phase(step.name, train=step.train, steps=1)
    optimization = Optimization()
    optimization.set_param_groups(run.model, run.phase, names, components.peek_optimizer(run.phase), same=False)
    momentum = max(float(group.get("momentum", 0.0)) for group in optimization.param_groups())
    run.hooks.call.phase_started(run=run)  # a component that adds to the loss prepares here
    losses = dict(diagnose(run, step, components).values)
    named = run.model.parameters()
    return losses, momentum, sum(named[name].numel() for name in names)


def _gradient_norms(run: Run, step: Diagnosis) -> dict[Any, float]:
    """Return gradient norm over weight norm, averaged over batches (the relative gradient norm of Lee et al. 2023)."""
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
    """Return the norm of all gradients over the norm of all weights; infinity if every weight is 0."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    gradient = float(torch.nn.utils.get_total_norm(gradients)) if gradients else 0.0
    weight = float(torch.nn.utils.get_total_norm([parameter.detach() for parameter in parameters]))
    return gradient / weight if weight else math.inf if gradient else 0.0


def _feature_drift(run: Run, step: Diagnosis) -> dict[Any, float]:
    """Return the shift of each layer group's output from training to validation, in standard deviations per channel."""
    modules = {
        group.name: run.model.module.get_submodule(_last_module(run, group.prefixes)) for group in run.model.groups
    }
    check_validation(run, step)
    train = _moments(run, modules, _first_batches(run, step.batches))
    val = _moments(run, modules, islice(run.evaluation_batches(run.data.val), step.batches))
    drift = {}
    for name in train:
        (mean, variance), (other_mean, other_variance) = train[name], val[name]
        spread = ((variance + other_variance) / 2).sqrt().clamp_min(1e-6)
        drift[name] = float(((mean - other_mean).abs() / spread).mean())
    return drift


def _moments(run: Run, modules: dict[str, nn.Module], batches: Iterator[Batch]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the mean and variance (channels,) of each module's output over all samples of the batches."""
    means: dict[str, list[Tensor]] = {name: [] for name in modules}

    def capture(name: str) -> Any:
        return lambda module, args, output: means[name].append(_channel_means(output))

    handles = [module.register_forward_hook(capture(name)) for name, module in modules.items()]
    try:
        with torch.no_grad():
            for batch in batches:
                run.forward(batch.inputs)
    finally:
        for handle in handles:
            handle.remove()
    stacked = {name: torch.cat(captured).double().cpu() for name, captured in means.items() if captured}
    return {name: (rows.mean(0), rows.var(0, correction=0)) for name, rows in stacked.items()}


def _channel_means(output: Any) -> Tensor:
    """Return (b, channels): feature maps averaged over space, sequences averaged over positions."""
    tensor: Tensor = output[0] if isinstance(output, (tuple, list)) else output
    if tensor.ndim == 3:
        return tensor.mean(1)
    return tensor.flatten(2).mean(2) if tensor.ndim > 3 else tensor


def _losses_by_lr(run: Run, step: Diagnosis, components: PhaseComponents) -> dict[Any, float]:
    """Return the loss after one optimizer step at each of `CANDIDATE_LRS`, each time from the same weights."""
    names = select(run.model, step.train)
    freeze(run.model, names)
    start = {name: tensor.clone() for name, tensor in full_state(run.model.module).items()}
    losses: dict[Any, float] = dict.fromkeys(CANDIDATE_LRS, 0.0)
    count = 0
    for batch in _first_batches(run, step.batches):
        count += 1
        restore_state(run.model.module, start)
        run.model.module.zero_grad(set_to_none=True)
        _backward(run, batch)
        named = run.model.parameters()
        gradients = {name: each.grad.clone() for name in names if (each := named[name]).grad is not None}
        for lr in CANDIDATE_LRS:
            if math.isfinite(losses[lr]):
                restore_state(run.model.module, start)
                losses[lr] += _loss_after_step(run, step, components, batch, gradients, lr)
    return {lr: loss / count for lr, loss in losses.items()}


def _loss_after_step(
    run: Run, step: Diagnosis, components: PhaseComponents, batch: Batch, gradients: dict[str, Tensor], lr: float
) -> float:
    """Return the loss of a batch after one optimizer step with these gradients; all learning rates share them."""
    optimization, phase = Optimization(), Phase(step.name, train=step.train, steps=1, lr=lr)
    names = select(run.model, step.train)
    optimization.set_param_groups(run.model, phase, names, components.peek_optimizer(phase), same=False)
    named = run.model.parameters()
    for name, gradient in gradients.items():
        named[name].grad = gradient.clone()
    optimization.step()
    with torch.no_grad():
        return sum(float(compute_loss(run, each)[0]) * share for each, share in _micro_batches(run, batch))


def _backward(run: Run, batch: Batch) -> None:
    """Add the gradient of a batch's loss; while memory runs out, repeat with half the micro-batch size."""
    # Every rank of a sharded model computes this same batch, and their gradients are summed.
    num_summed = run.process_group.world_size if run.sharded else 1
    while True:
        size = min(run.engine_state.micro_batch_size or len(batch.indices), len(batch.indices))
        with CatchOutOfMemory(run, where="diagnosis", flag="--micro-batch", can_halve=size > 1) as memory:
            for micro_batch, share in _micro_batches(run, batch):
                torch.autograd.backward(compute_loss(run, micro_batch)[0] * (share / num_summed))
        if run.sharded:
            run.process_group.all_reduce_gradients(
                [each for each in run.model.parameters().values() if each.requires_grad]
            )
        if not run.process_group.all_reduce_any(memory.exhausted)[0]:
            return
        run.model.module.zero_grad(set_to_none=True)
        size = run.engine_state.micro_batch_size = halve(run, size)
        run.log(f"  out of memory during a diagnosis: micro-batch size reduced to {size} until it ends")


def _micro_batches(run: Run, batch: Batch) -> Iterator[tuple[Batch, float]]:
    """Return the micro-batches of a batch, each with its share of the samples."""
    return ((each, len(each.indices) / len(batch.indices)) for each in micro_batches(run, batch))


def _first_batches(run: Run, count: int) -> Iterator[Batch]:
    return islice(run.training_batches(epoch_sampler(run), None, per_rank=False), count)


def _group_name(run: Run, parameter: str) -> str:
    return next(group.name for group in run.model.groups if group.contains(parameter))


def _last_module(run: Run, prefixes: tuple[str, ...]) -> str:
    paths = {path for path, _ in run.model.module.named_modules()}
    return next((prefix for prefix in reversed(prefixes) if prefix in paths), "")


@contextlib.contextmanager
def _inspect(run: Run) -> Iterator[None]:
    """Put the model into eval mode, and leave it and the run as they were."""
    # A diagnosis runs in eval mode, where a micro-batch may be smaller than BatchNorm allows in training.
    micro_batch_size = run.engine_state.micro_batch_size
    with preserve_state(run.model.module):
        run.model.module.eval()
        try:
            yield
        finally:
            run.phase, run.engine_state.micro_batch_size = None, micro_batch_size
