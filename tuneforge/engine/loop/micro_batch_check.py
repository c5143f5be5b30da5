"""Before a batch is trained in parts: its loss and its gradient must be those of the whole batch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tuneforge.engine.context import batches
from tuneforge.engine.context.run import Run
from tuneforge.engine.data.dataset import Batch
from tuneforge.engine.data.sample_seeds import epoch_key
from tuneforge.engine.data.sampler import SampleRNG
from tuneforge.engine.loop.loss import compute_loss
from tuneforge.engine.model.device import is_out_of_memory
from tuneforge.engine.model.inspection import preserve_state
from tuneforge.engine.model.model import NORMS
from tuneforge.engine.model.modes import Modes, set_modes
from tuneforge.errors import UsageError

_NUM_SAMPLES = 64
_TOLERANCE = {"fp32": 1e-3}  # relative; parts of a batch differ from the whole in the last bits
_HALF_TOLERANCE = 3e-2
_DROPOUTS = nn.modules.dropout._DropoutNd  # the only common base class


class _UnequalError(Exception):
    """The parts do not add up to the whole; the text says how."""


class _FixedOutputs:
    """A forward pass that returns outputs computed before, so that only the loss is compared."""

    def __init__(self, forward_pass: Any, outputs: Tensor) -> None:
        self._forward_pass, self.outputs = forward_pass, outputs

    def __getattr__(self, name: str) -> Any:
        return getattr(self._forward_pass, name)

    def __call__(self, module: nn.Module, inputs: Any, *, evaluating: bool) -> Tensor:
        return self.outputs


def check_micro_batches(run: Run, modes: Modes, weights: Tensor | None, where: str) -> None:
    """Compare the loss, its gradient and the outputs of some training samples at once and in parts.

    A loss that is random, or that cannot be computed for these samples at once, is not compared. Dropout and
    normalization layers are left out. The run is left as it was.

    Args:
        run: The run, in a phase.
        modes: The mode of each module while the phase trains.
        weights: Factor of each training sample's loss (n,), or None.
        where: What asks for parts of a batch, for the message.

    Raises:
        UsageError: A loss is no mean over samples, or an output depends on the other samples of its batch.
    """
    others = {each.label: each.component for each in run.hooks.get_owners("train_step")}
    states = run.engine_state.component_states
    with preserve_state(run.model.module, {"its components": others, "their state": states}), _own_forward_pass(run):
        batch, sizes = _spread_batch(run, weights)
        if len(sizes) < 2:
            return
        try:
            outputs = _compare_outputs(run, modes, batch, sizes)
            if isinstance(outputs, Tensor):
                _compare_losses(run, batch, sizes, outputs)
        except _UnequalError as error:
            raise UsageError(
                f"{run.hooks.get_provider('train_step').label} or the model cannot be computed in parts of a batch",
                where=where,
                why=str(error),
                fix="return a loss that is a mean over samples, such as (losses * weights).mean() of losses with "
                "reduction='none' (for classes: --loss cross-entropy with class-weights), or train on whole batches",
            ) from None
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            run.log("  note: memory ran out before micro-batches could be compared with whole batches")


@contextlib.contextmanager
def _own_forward_pass(run: Run) -> Iterator[None]:
    forward_pass, cache, compiled = run.forward_pass, run.forward_pass.feature_cache, run.forward_pass.compiled_module
    forward_pass.feature_cache = forward_pass.compiled_module = None
    try:
        yield
    finally:
        run.forward_pass = forward_pass
        forward_pass.feature_cache, forward_pass.compiled_module = cache, compiled


def _spread_batch(run: Run, weights: Tensor | None) -> tuple[Batch, list[int]]:
    """Return samples from all over the training split, sorted by target, and sizes of parts with unlike targets."""
    split, seed = run.data.train, run.config.seed
    order = split.targets.double().flatten(1).sum(1).argsort() if split.targets.ndim > 1 else split.targets.argsort()
    count = min(len(order), _NUM_SAMPLES)
    indices = order.cpu()[torch.linspace(0, len(order) - 1, count).long()]
    inputs = run.prepare_inputs(split.fetch(indices, epoch_key(seed, run.epoch)))
    batch = batches.make_batch(run, split, indices, inputs, SampleRNG(seed, run.epoch, indices), weights)
    sizes = [count // 8, count // 8, count // 4]
    return batch, [size for size in (*sizes, count - sum(sizes)) if size]


def _compare_outputs(run: Run, modes: Modes, batch: Batch, sizes: Sequence[int]) -> Any:
    """Return the outputs of the batch (b, k), computed in parts in eval mode; compare some with those at once."""
    module = run.model.module
    with torch.no_grad():
        module.eval()
        found = [run.forward(part.inputs) for part in batches.split_batch(batch, sizes)]
        if not all(isinstance(each, Tensor) for each in found):
            return None
        outputs = torch.cat(found)
        few, few_sizes = next(batches.split_batch(batch, [sizes[0] + sizes[1], sum(sizes[2:])])), sizes[:2]
        _compare(run, "outputs", run.forward(few.inputs), outputs[: sum(few_sizes)])
        set_modes([(each, on and not isinstance(each, (_DROPOUTS, *NORMS))) for each, on in modes])
        with contextlib.suppress(RuntimeError, ValueError):  # in training a module may refuse so few samples
            whole, again = (_seeded_forward(run, few, seed) for seed in (0, 1))
            parts = torch.cat([_seeded_forward(run, part, 0) for part in batches.split_batch(few, few_sizes)])
            if torch.equal(whole, again):
                _compare(run, "outputs in training", whole, parts)
        module.eval()
    return outputs


def _seeded_forward(run: Run, batch: Batch, seed: int) -> Tensor:
    torch.manual_seed(seed)
    outputs: Tensor = run.forward(batch.inputs)
    return outputs


def _compare_losses(run: Run, batch: Batch, sizes: Sequence[int], outputs: Tensor) -> None:
    try:
        (whole, gradient), (again, _) = (_loss_and_gradient(run, batch, outputs, seed) for seed in (0, 1))
    except Exception:  # noqa: BLE001 - training will raise it, at the samples that it is about
        return
    if not torch.equal(whole, again) or not bool(whole.isfinite()):
        return
    parts, starts = list(batches.split_batch(batch, sizes)), torch.split(outputs, list(sizes))
    try:
        results = [_loss_and_gradient(run, part, rows, 0) for part, rows in zip(parts, starts, strict=True)]
    except Exception as error:
        raise _UnequalError(f"the loss of {sizes[0]} samples fails: {type(error).__name__}: {error}") from error
    shares = [size / sum(sizes) for size in sizes]
    total = torch.stack([loss * share for (loss, _), share in zip(results, shares, strict=True)]).sum()
    _compare(run, "loss", whole, total)
    gradients = [rows * share for (_, rows), share in zip(results, shares, strict=True) if rows is not None]
    if gradient is not None and len(gradients) == len(sizes):
        _compare(run, "gradient of the loss", gradient, torch.cat(gradients))


def _loss_and_gradient(run: Run, batch: Batch, outputs: Tensor, seed: int) -> tuple[Tensor, Tensor | None]:
    """Return the loss of a batch with these outputs (b, k), and its gradient by them, where it depends on them."""
    torch.manual_seed(seed)
    leaf = outputs.detach().clone().requires_grad_()
    forward_pass = run.forward_pass
    run.forward_pass = _FixedOutputs(forward_pass, leaf)  # type: ignore[assignment]  # it delegates the rest
    try:
        loss, _ = compute_loss(run, batch)
    finally:
        run.forward_pass = forward_pass
    gradient = torch.autograd.grad(loss, leaf, allow_unused=True)[0] if loss.requires_grad else None
    return loss.detach(), gradient


def _compare(run: Run, what: str, whole: Tensor, parts: Tensor) -> None:
    tolerance = _TOLERANCE.get(run.config.precision, _HALF_TOLERANCE)
    scale = float(whole.abs().max())
    difference = float((whole - parts).abs().max()) if whole.shape == parts.shape else float("inf")
    if difference > tolerance * scale + 1e-6:
        raise _UnequalError(f"the {what} of a batch and of its parts differ by {difference:.2g} of {scale:.2g}")
