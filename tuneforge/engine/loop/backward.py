"""The forward and backward passes of one optimizer step: micro-batches and gradient accumulation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from tuneforge.engine.context.batches import micro_batches
from tuneforge.engine.context.distributed import ProcessGroup
from tuneforge.engine.context.run import Run
from tuneforge.engine.data.dataset import Batch
from tuneforge.engine.data.loader import batch_sizes
from tuneforge.engine.loop.loss import compute_loss
from tuneforge.engine.loop.micro_batch_check import check_micro_batches
from tuneforge.engine.loop.nonfinite import NonFiniteError, NonFinitePolicy, find_nonfinite_gradient
from tuneforge.engine.loop.oom import CatchOutOfMemory, halve
from tuneforge.engine.model.modes import set_modes
from tuneforge.errors import HaltError, UsageError


@attrs.define(eq=False)
class BackwardPass:
    """Computes the gradients of a phase's optimizer steps.

    Args:
        modes: The mode of each module while the phase trains.
        trainable_parameters: The parameters that get a gradient, by name.
        checks_finite: True if every loss and gradient is checked for NaN and Inf. The check waits for the device, so on
            an accelerator it runs only if `--on-nan` asks for more than to halt.
        updating_modules: Modules with buffers that a forward pass may change, such as BatchNorm statistics.
        nonfinite: What happens if a loss or a gradient is non-finite.
        sparse_parameters: Those of trained embeddings with sparse gradients, which few optimizers take: their gradients
            are made dense.
        loss_weights: Factor of each training sample's loss (n,), or None.
    """

    modes: list[tuple[nn.Module, bool]]
    trainable_parameters: list[tuple[str, nn.Parameter]]
    checks_finite: bool
    updating_modules: list[nn.Module]
    nonfinite: NonFinitePolicy
    sparse_parameters: list[Tensor] = attrs.field(factory=list)
    loss_weights: Tensor | None = None

    @classmethod
    def from_run(cls, run: Run, modes: list[tuple[nn.Module, bool]], state: dict[str, Any] | None) -> BackwardPass:
        """Return the backward pass of a phase whose parameters are already frozen.

        Args:
            run: The run.
            modes: The mode of each module while the phase trains.
            state: The state of a `NonFinitePolicy`, in a phase that is resumed.
        """
        trainable = [(name, each) for name, each in run.model.parameters().items() if each.requires_grad]
        checks_finite = run.device.torch.type == "cpu" or run.config.on_nan != "halt"
        updating_modules = [
            module for module, training in modes if training and next(module.buffers(False), None) is not None
        ]
        nonfinite = NonFinitePolicy(**(state or {}))
        embeddings = [each for each, _ in modes if isinstance(each, (nn.Embedding, nn.EmbeddingBag)) and each.sparse]
        sparse = [each.weight for each in embeddings if each.weight.requires_grad]
        return cls(modes, trainable, checks_finite, updating_modules, nonfinite, sparse)

    @property
    def batchnorm_statistics(self) -> list[Tensor]:
        """The BatchNorm statistics that the phase updates."""
        norms = [module for module in self.updating_modules if isinstance(module, _NormBase)]
        return [buffer for module in norms for buffer in module.buffers(False)]

    def sync_buffers(self, run: Run) -> None:
        """Make the buffers equal on all ranks: average BatchNorm statistics, broadcast others from rank 0."""
        averaged = {id(each) for each in self.batchnorm_statistics}
        run.process_group.average_buffers(self.batchnorm_statistics)
        run.process_group.broadcast(
            [each for module in self.updating_modules for each in module.buffers(False) if id(each) not in averaged]
        )

    def compute(self, run: Run, batches: list[Batch], sizes: Sequence[int]) -> list[tuple[Tensor, int]] | None:
        """Run the forward and backward passes of one optimizer step; gradients are summed over all ranks.

        If memory runs out the step is repeated with half the micro-batch size.

        Args:
            run: The run, in a phase.
            batches: The batches whose gradients are accumulated; on several ranks, this rank's share of each.
            sizes: The number of samples of each batch on all ranks together.

        Returns:
            The loss of each micro-batch and its number of samples; None if the step has to be skipped.

        Raises:
            HaltError: A loss or a gradient is non-finite, or memory does not suffice for the smallest micro-batch.
        """
        buffers = [
            {name: each.clone() for name, each in module.named_buffers("", False)} for module in self.updating_modules
        ]
        while True:
            losses: list[tuple[Tensor, int]] = []
            nonfinite: NonFiniteError | None = None
            with CatchOutOfMemory(run, where=f"optimizer step {run.step + 1}", flag="--micro-batch") as memory:
                try:
                    losses = self._forward_backward(run, batches, sizes)
                except NonFiniteError as error:
                    nonfinite = error
            any_nonfinite, any_exhausted = run.process_group.all_reduce_any(nonfinite is not None, memory.exhausted)
            if any_exhausted:
                self._restore_buffers(run, buffers)
                self._halve_micro_batch(run, -(-max(sizes) // run.process_group.world_size), memory.message)
                continue
            if not any_nonfinite:
                if run.process_group.world_size > 1:
                    run.process_group.all_reduce_gradients([each for _, each in self.trainable_parameters])
                if self.checks_finite and (name := find_nonfinite_gradient(run, self.trainable_parameters)):
                    nonfinite = NonFiniteError(f"the gradient of '{name}' is NaN or Inf", batches)
            if nonfinite is not None or any_nonfinite:
                self._restore_buffers(run, buffers)
                self.nonfinite.handle(run, nonfinite)
                return None
            self.nonfinite.consecutive_skips = 0
            return losses

    def _forward_backward(self, run: Run, batches: list[Batch], sizes: Sequence[int]) -> list[tuple[Tensor, int]]:
        total = sum(sizes)
        losses: list[tuple[Tensor, int]] = []
        for number, (batch, size) in enumerate(zip(batches, sizes, strict=True)):
            run.reseed(number)
            for micro_batch, count in _local_micro_batches(run, batch, size):
                set_modes(self.modes)
                if not count:
                    run.model.module.eval()  # samples that count for nothing must not update BatchNorm statistics
                loss, outputs = compute_loss(run, micro_batch)
                value = loss.item() if self.checks_finite else 0.0
                is_nonfinite = any_nonfinite = not math.isfinite(value)
                if run.sharded and self.checks_finite:
                    any_nonfinite = run.process_group.all_reduce_any(is_nonfinite)[0]
                if is_nonfinite:
                    raise NonFiniteError(f"the training loss is {value}", [micro_batch], outputs)
                if any_nonfinite:  # the backward pass of a sharded model is a collective, so no rank may enter it alone
                    return losses
                if not loss.requires_grad:
                    raise _unreached_loss_error(run)
                torch.autograd.backward(loss if count == total else loss * (count / total))
                losses.append((loss.detach(), count))
        for parameter in self.sparse_parameters:
            if parameter.grad is not None:
                parameter.grad = parameter.grad.to_dense()
        return losses

    def _restore_buffers(self, run: Run, buffers: list[dict[str, Tensor]]) -> None:
        """Undo the forward passes: drop the gradients, and restore buffers, even those that were replaced."""
        run.model.module.zero_grad(set_to_none=True)
        for module, values in zip(self.updating_modules, buffers, strict=True):
            for name, value in values.items():
                if module.get_buffer(name).shape == value.shape:
                    module.get_buffer(name).copy_(value)
                else:
                    setattr(module, name, value.clone())

    def _halve_micro_batch(self, run: Run, batch_size: int, why: str) -> None:
        state = run.engine_state
        size = min(state.micro_batch_size or batch_size, batch_size)
        minimum = 2 if self.batchnorm_statistics else 1  # BatchNorm needs two samples
        if size <= minimum:
            raise HaltError(
                f"out of memory in a training pass of {size} sample(s)",
                where=f"optimizer step {run.step + 1}",
                why=why,
                fix="use a smaller model or smaller inputs, or --precision bf16",
            )
        if state.micro_batch_size is None:
            where = f"optimizer step {run.step + 1}, which ran out of memory ({why})"
            check_micro_batches(run, self.modes, self.loss_weights, where)
        size = state.micro_batch_size = halve(run, size, minimum=minimum)
        run.log(f"  out of memory at optimizer step {run.step + 1}: micro-batch size reduced to {size}")
        if self.batchnorm_statistics:
            run.log(
                "  note: BatchNorm now normalizes with micro-batches, so results differ from those of whole batches"
            )


def _unreached_loss_error(run: Run) -> UsageError:
    assert run.phase is not None
    return UsageError(
        "the loss does not depend on any parameter that the phase trains",
        where=f"phase '{run.phase.name}', which trains {' and '.join(run.phase.train)}",
        why="a detach(), torch.no_grad() or an operation without gradient lies between them and the loss",
        fix="train other layers, or remove it from the model or the loss",
    )


def _local_micro_batches(run: Run, batch: Batch, size: int) -> list[tuple[Batch, int]]:
    """Return this rank's micro-batches of a global batch of `size` samples, each with the samples that it counts for.

    All ranks of a sharded model run the same number of passes, because each pass gathers weights from all of them; a
    rank without samples runs passes that count for nothing.
    """
    if run.process_group.world_size == 1:
        return [(each, len(each.indices)) for each in micro_batches(run, batch)]
    counts = run.process_group.num_local(size) > 0
    if not run.sharded and not counts:
        return []
    passes = [(each, len(each.indices) if counts else 0) for each in micro_batches(run, batch)]
    if not run.sharded:
        return passes
    max_local_size = ProcessGroup(0, run.process_group.world_size).num_local(size)
    micro_batch_size = run.engine_state.micro_batch_size
    num_passes = 1 if micro_batch_size is None else len(batch_sizes(max_local_size, micro_batch_size))
    return passes + [(passes[-1][0], 0)] * (num_passes - len(passes))
