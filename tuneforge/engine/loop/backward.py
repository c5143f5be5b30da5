"""The gradients of one optimizer step: in smaller pieces where memory is short, and none that is no number."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from tuneforge.engine.context.batches import micro_batches
from tuneforge.engine.context.distributed import ProcessGroup
from tuneforge.engine.context.run import Run
from tuneforge.engine.data.dataset import Batch, named_tensors
from tuneforge.engine.data.loader import batch_sizes
from tuneforge.engine.model.device import is_out_of_memory, root_cause
from tuneforge.engine.model.freezing import full_state, restore_state, set_modes
from tuneforge.engine.model.fsdp import check_loss, local_shard, out_of_memory_error
from tuneforge.errors import HaltError, PluginError

MAX_CONSECUTIVE_SKIPS = 10
"""Steps in succession that may be left out before the run halts: the weights, not a batch, are at fault then."""

MAX_ROLLBACKS = 5
"""Times that a phase may go back."""

_MAX_LISTED_IDS = 8  # samples named in a message


class _NonFiniteError(Exception):
    """A loss or a gradient that is no number.

    Args:
        what: It, with its value.
        batches: What it was computed from.
        outputs: What the model gave for the last of them, where the loss was bad.
    """

    def __init__(self, what: str, batches: list[Batch], outputs: Any = None) -> None:
        self.what, self.batches, self.outputs = what, batches, outputs


@attrs.define(eq=False)
class BackwardPass:
    """What a phase's steps are made of.

    Args:
        modes: The mode of each module.
        trainable_parameters: What gets a gradient, by name.
        checks_finite: True where each step is looked at; on an accelerator a look waits for it, so there only if asked
            for.
        updating_modules: Modules with buffers that a forward pass of the phase may change, such as the statistics of a
            norm.
        lr_factor: Factor on the rate; halved each time that the phase goes back.
        skipped_steps: Optimizer steps that were not applied.
        consecutive_skips: Steps left out in succession, up to now.
        rollbacks: Times that the phase went back.
        epoch_start_state: Weights, optimizer and memories of components at the beginning of the epoch, where the run
            may go back.
    """

    modes: list[tuple[nn.Module, bool]]
    trainable_parameters: list[tuple[str, nn.Parameter]]
    checks_finite: bool
    updating_modules: list[nn.Module]
    lr_factor: float = 1.0
    skipped_steps: tuple[int, ...] = ()
    consecutive_skips: int = 0
    rollbacks: int = 0
    epoch_start_state: dict[str, Any] = attrs.field(factory=dict)

    @classmethod
    def from_run(cls, run: Run, modes: list[tuple[nn.Module, bool]], state: dict[str, Any] | None) -> BackwardPass:
        """Those of a phase whose parameters are frozen already, from its beginning or from what `state` gave."""
        trainable = [(name, each) for name, each in run.model.parameters().items() if each.requires_grad]
        checks_finite = run.device.torch.type == "cpu" or run.config.on_nan != "halt"
        updating_modules = [
            module for module, training in modes if training and next(module.buffers(False), None) is not None
        ]
        return cls(modes, trainable, checks_finite, updating_modules, **(state or {}))

    @property
    def norm_statistics(self) -> list[Tensor]:
        """The statistics of norms that the phase moves."""
        norms = [module for module in self.updating_modules if isinstance(module, _NormBase)]
        return [buffer for module in norms for buffer in module.buffers(False)]

    def sync_buffers(self, run: Run) -> None:
        """Give all ranks the same buffers: statistics of norms the mean of theirs, others those of rank 0."""
        averaged = {id(each) for each in self.norm_statistics}
        run.process_group.average_buffers(self.norm_statistics)
        run.process_group.broadcast(
            [each for module in self.updating_modules for each in module.buffers(False) if id(each) not in averaged]
        )

    def state(self) -> dict[str, Any]:
        """What a resumed phase goes on with."""
        names = ("lr_factor", "skipped_steps", "consecutive_skips", "rollbacks", "epoch_start_state")
        return {name: getattr(self, name) for name in names}

    def begin_epoch(self, run: Run) -> None:
        """Keep what the run may go back to."""
        if run.config.on_nan == "rollback":
            tensors = {name: tensor.clone() for name, tensor in full_state(run.model.module).items()}
            kept = {"optimizer": run.optimization.state(run.model), "components": run.engine_state.component_states}
            self.epoch_start_state = {"model": tensors, **copy.deepcopy(kept)}

    def compute(self, run: Run, batches: list[Batch], sizes: Sequence[int]) -> list[tuple[Tensor, int]] | None:
        """Forward and backward passes of one optimizer step; on several ranks, the sum of theirs.

        Args:
            run: With the phase under way.
            batches: What the step is computed from: this rank's share of each.
            sizes: Samples of each batch on all ranks together.

        Returns:
            The loss of each piece and the number of its samples; None where the step is not to be applied.

        Raises:
            HaltError: A loss or a gradient is no number, or memory does not suffice for the smallest piece.
        """
        held = [
            {name: each.clone() for name, each in module.named_buffers("", False)} for module in self.updating_modules
        ]
        while True:
            losses, wrong, full = [], None, ""
            try:
                losses = self._forward_backward(run, batches, sizes)
            except _NonFiniteError as error:
                wrong = error
            except (RuntimeError, MemoryError, PluginError) as error:
                if not is_out_of_memory(error):
                    raise
                if run.sharded:
                    raise out_of_memory_error(
                        root_cause(error), where=f"optimizer step {run.step + 1}", flag="--micro-batch"
                    ) from None
                full = str(root_cause(error)).partition("\n")[0]
            anywhere_wrong, anywhere_full = wrong is not None, full != ""
            if not run.process_group.is_single:
                anywhere_wrong, anywhere_full = run.process_group.all_reduce_any(anywhere_wrong, anywhere_full)
            if anywhere_full:
                self._restore_buffers(run, held)
                self._halve_micro_batch(
                    run,
                    max(sizes) if run.process_group.is_single else -(-max(sizes) // run.process_group.world_size),
                    full,
                )
                continue
            if not anywhere_wrong:
                if not run.process_group.is_single:
                    run.process_group.all_reduce_gradients([each for _, each in self.trainable_parameters])
                if self.checks_finite and (bad := _find_nonfinite_gradient(run, self.trainable_parameters)):
                    wrong = _NonFiniteError(f"the gradient of '{bad}' is no number", batches)
            if wrong is not None or anywhere_wrong:
                self._restore_buffers(run, held)
                self._handle_nonfinite(run, wrong)
                return None
            self.consecutive_skips = 0
            return losses

    def _forward_backward(self, run: Run, batches: list[Batch], sizes: Sequence[int]) -> list[tuple[Tensor, int]]:
        total = sum(sizes)
        losses: list[tuple[Tensor, int]] = []
        for place, (batch, size) in enumerate(zip(batches, sizes, strict=True)):
            run.reseed(place)
            for micro_batch, count in _local_micro_batches(run, batch, size):
                set_modes(self.modes)
                if not count:
                    run.model.module.eval()  # no statistic is to move
                loss, outputs = compute_loss(run, micro_batch)
                value = loss.item() if self.checks_finite else 0.0
                wrong = not math.isfinite(value)
                anywhere_wrong = (
                    run.process_group.all_reduce_any(wrong)[0] if run.sharded and self.checks_finite else wrong
                )
                if wrong:
                    raise _NonFiniteError(f"the training loss is {value}", [micro_batch], outputs)
                if anywhere_wrong:  # no rank goes into a backward pass by itself; the one that found it says what it is
                    return losses
                torch.autograd.backward(loss if count == total else loss * (count / total))
                losses.append((loss.detach(), count))
        return losses

    def _restore_buffers(self, run: Run, held: list[dict[str, Tensor]]) -> None:
        """As if no forward pass had been, also where it put another tensor in a buffer's place."""
        run.model.module.zero_grad(set_to_none=True)
        for module, values in zip(self.updating_modules, held, strict=True):
            for name, value in values.items():
                if module.get_buffer(name).shape == value.shape:
                    module.get_buffer(name).copy_(value)
                else:
                    setattr(module, name, value.clone())

    def _halve_micro_batch(self, run: Run, largest: int, why: str) -> None:
        state = run.engine_state
        now = min(state.micro_batch_size or largest, largest)
        least = 2 if self.norm_statistics else 1  # a norm needs two samples
        if now <= least:
            raise HaltError(
                f"memory does not suffice for a training pass over {now} sample(s)",
                where=f"optimizer step {run.step + 1}",
                why=why,
                fix="use a smaller model or smaller inputs, or --precision bf16",
            )
        state.micro_batch_size = max(least, -(-now // 2))
        run.device.empty_cache()
        run.log(
            f"  out of memory at optimizer step {run.step + 1}: from here on {state.micro_batch_size} samples a pass"
        )
        if self.norm_statistics:
            run.log("  note: norms see smaller batches now, so the numbers are not those of whole batches")

    def _handle_nonfinite(self, run: Run, error: _NonFiniteError | None) -> None:
        """Do what was asked for: halt, leave the step out, or go back with a lower rate too.

        Args:
            run: With the phase under way.
            error: What was found; None where another rank found it.
        """
        assert run.phase is not None
        where = f"phase '{run.phase.name}', epoch {run.epoch + 1}, optimizer step {run.step + 1}"
        told = run.process_group.all_gather_object(
            None if error is None else [error.what, _describe_nonfinite_samples(run, error)]
        )
        heard = [each for each in told if each is not None]
        what, why = heard[0][0], "; ".join(dict.fromkeys(each[1] for each in heard))
        self.consecutive_skips += 1
        policy = run.config.on_nan
        exhausted = {
            "skip": self.consecutive_skips > MAX_CONSECUTIVE_SKIPS,
            "rollback": self.rollbacks >= MAX_ROLLBACKS,
        }
        if exhausted.get(policy, True):
            times = {"skip": f"{MAX_CONSECUTIVE_SKIPS} steps in succession", "rollback": f"{MAX_ROLLBACKS} times"}.get(
                policy
            )
            raise HaltError(
                what,
                where=where,
                why=why + (f"; it was left out {times} before" if times else ""),
                fix="mend those samples, lower the learning rate, add --callback grad-clip, or use --on-nan skip",
            )
        self.skipped_steps = (*self.skipped_steps, run.step + 1)
        if policy == "skip":
            run.log(f"  left out: {where}: {what}; {why}")
            return
        self.lr_factor, self.rollbacks = self.lr_factor / 2, self.rollbacks + 1
        restore_state(run.model.module, self.epoch_start_state["model"])
        freeze_check = run.engine_state.freeze_check
        if freeze_check is not None:  # what a step before this one was due to move is back where it was
            freeze_check.unmoved = dict.fromkeys(freeze_check.unmoved)
        run.optimization.load_state(run.model, self.epoch_start_state["optimizer"])
        for key, memory in run.engine_state.component_states.items():
            memory.clear()
            memory.update(copy.deepcopy(self.epoch_start_state["components"].get(key, {})))
        run.log(f"  went back to the beginning of the epoch: {where}: {what}; {why}; the rate is halved")


def compute_loss(run: Run, batch: Batch) -> tuple[Tensor, Any]:
    """The loss and the outputs that the step, and whatever wraps it, gives for a batch.

    Raises:
        PluginError: The step gave something else than a scalar loss and the outputs.
    """
    result = run.hooks.call.train_step(run=run, batch=batch)
    if (
        isinstance(result, (tuple, list))
        and len(result) == 2
        and isinstance(result[0], Tensor)
        and result[0].numel() == 1
    ):
        return check_loss(result[0] if result[0].ndim == 0 else result[0].reshape(())), result[1]
    raise PluginError(
        f"{run.hooks.get_provider('train_step').label} gave {type(result).__name__} from train_step",
        why="it must return a scalar loss and the outputs: return loss, outputs",
        fix="look at the step and at what wraps it",
    )


def _local_micro_batches(run: Run, batch: Batch, size: int) -> list[tuple[Batch, int]]:
    """This rank's passes of a global batch, each with the samples that it counts for.

    Of a sharded model all ranks make as many passes, because each gives its part of the weights to them all: what a
    rank has no samples for counts for none.
    """
    counts = run.process_group.is_single or run.process_group.num_local(size) > 0
    if not run.sharded:
        return [(micro_batch, len(micro_batch.indices)) for micro_batch in micro_batches(run, batch)] if counts else []
    passes = [(micro_batch, len(micro_batch.indices) if counts else 0) for micro_batch in micro_batches(run, batch)]
    largest = ProcessGroup(0, run.process_group.world_size).num_local(size)
    size_limit = run.engine_state.micro_batch_size
    number = 1 if size_limit is None else len(batch_sizes(largest, size_limit))
    return passes + [(passes[-1][0], 0)] * (number - len(passes))


def _find_nonfinite_gradient(run: Run, trainable: list[tuple[str, nn.Parameter]]) -> str:
    """The name of a tensor whose gradient is not finite, on any rank; "" where all are."""
    own = _find_local_nonfinite_gradient(trainable)
    if not run.sharded:
        return own
    return (
        next(filter(None, run.process_group.all_gather_object(own)), "")
        if run.process_group.all_reduce_any(own != "")[0]
        else ""
    )


def _find_local_nonfinite_gradient(trainable: list[tuple[str, nn.Parameter]]) -> str:
    """The same of what this rank holds. A sum is infinite or no number where an element is, and costs one read."""
    for name, parameter in trainable:
        gradient = parameter.grad
        if gradient is not None:
            values = gradient.coalesce().values() if gradient.is_sparse else local_shard(gradient)
            if not math.isfinite(abs(values.sum().item())) and not bool(values.isfinite().all()):
                return name
    return ""


def _describe_nonfinite_samples(run: Run, error: _NonFiniteError) -> str:
    """The samples behind a bad number: those with a bad input, else target, else output, else all of them."""
    for words, things in _nonfinite_candidates(error):
        names = [
            run.data.train.id_of(int(row))
            for batch, thing in zip(error.batches, things, strict=True)
            for row in batch.indices[_nonfinite_rows(thing, len(batch.indices))]
        ]
        if names:
            return f"{words} {_join_ids(names)}"
    names = [run.data.train.id_of(int(row)) for batch in error.batches for row in batch.indices]
    return f"their inputs and targets are finite; the samples were {_join_ids(names)}"


def _nonfinite_candidates(error: _NonFiniteError) -> Iterator[tuple[str, list[Any]]]:
    yield "there is an input that is no number in", [batch.inputs for batch in error.batches]
    yield "there is a target that is no number in", [batch.targets for batch in error.batches]
    if error.outputs is not None:
        yield "the model gave what is no number for", [error.outputs]


def _nonfinite_rows(thing: Any, size: int) -> Tensor:
    """True (b,) for each sample of which a value is no number."""
    bad = torch.zeros(size, dtype=torch.bool)
    values = getattr(thing, "values", None)
    tensors = values if isinstance(values, tuple) else named_tensors(thing).values() if _has_tensors(thing) else ()
    for tensor in tensors:
        plain = isinstance(tensor, Tensor) and not tensor.is_sparse and tensor.is_floating_point()
        if plain and tensor.ndim and len(tensor) == size:
            bad |= ~tensor.detach().reshape(size, -1).isfinite().all(1).cpu()
    return bad


def _has_tensors(thing: Any) -> bool:
    return isinstance(thing, (Tensor, dict))


def _join_ids(names: list[str]) -> str:
    more = f" and {len(names) - _MAX_LISTED_IDS} more" if len(names) > _MAX_LISTED_IDS else ""
    return ", ".join(names[:_MAX_LISTED_IDS]) + more
