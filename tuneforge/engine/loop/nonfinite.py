"""Losses and gradients that are NaN or Inf: find them, name the samples behind them, and apply `--on-nan`."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from tuneforge.engine.context.run import Run
from tuneforge.engine.data.dataset import Batch, named_tensors
from tuneforge.engine.model.extra_state import get_extra_states, set_extra_states
from tuneforge.engine.model.fsdp import local_shard
from tuneforge.engine.model.module_state import full_state, restore_state
from tuneforge.errors import HaltError

MAX_CONSECUTIVE_SKIPS = 10
"""Steps that may be skipped in succession before the run halts: by then the weights are at fault, not a batch."""

MAX_ROLLBACKS = 5
"""Rollbacks of a phase before the run halts."""

_MAX_LISTED_IDS = 8  # samples named in a message


class NonFiniteError(Exception):
    """A loss or a gradient is NaN or Inf.

    Args:
        what: Which one, with its value.
        batches: The batches it was computed from.
        outputs: The model's outputs for the last of them, if the loss is non-finite.
    """

    def __init__(self, what: str, batches: list[Batch], outputs: Any = None) -> None:
        self.what, self.batches, self.outputs = what, batches, outputs


@attrs.define(eq=False)
class NonFinitePolicy:
    """What a phase does about non-finite losses and gradients (`--on-nan`), and what it has done so far.

    Args:
        lr_factor: Factor on the learning rate; halved by each rollback.
        skipped_steps: Optimizer steps that were not applied.
        consecutive_skips: Steps skipped in succession, up to now.
        rollbacks: Rollbacks of this phase.
        epoch_start_state: Weights, optimizer state and component state at the beginning of the epoch; empty unless the
            policy is `rollback`.
    """

    lr_factor: float = 1.0
    skipped_steps: tuple[int, ...] = ()
    consecutive_skips: int = 0
    rollbacks: int = 0
    epoch_start_state: dict[str, Any] = attrs.field(factory=dict)

    def state(self) -> dict[str, Any]:
        """Return the state as tensors and plain data; its items are the keyword arguments of the constructor."""
        return {name: getattr(self, name) for name in attrs.fields_dict(type(self))}

    def begin_epoch(self, run: Run) -> None:
        """Store the state that a rollback restores."""
        if run.config.on_nan == "rollback":
            tensors = {name: tensor.clone() for name, tensor in full_state(run.model.module).items()}
            state = {
                "optimizer": run.optimization.state(run.model),
                "components": run.engine_state.component_states,
                "extra_states": get_extra_states(run.model.module),
            }
            self.epoch_start_state = {"model": tensors, **copy.deepcopy(state)}

    def handle(self, run: Run, error: NonFiniteError | None) -> None:
        """Skip the current step or roll back, as `--on-nan` says.

        Args:
            run: The run, in a phase.
            error: What this rank found; None if only another rank found something.

        Raises:
            HaltError: The policy is `halt`, or steps were skipped or rolled back too often.
        """
        assert run.phase is not None
        where = f"phase '{run.phase.name}', epoch {run.epoch + 1}, optimizer step {run.step + 1}"
        own = None if error is None else [error.what, _describe_samples(run, error)]
        found = [each for each in run.process_group.all_gather_object(own) if each is not None]
        what, why = found[0][0], "; ".join(dict.fromkeys(each[1] for each in found))
        self.consecutive_skips += 1
        policy = run.config.on_nan
        limit = self._exceeded_limit(policy)
        if policy == "halt" or limit:
            raise HaltError(
                what,
                where=where,
                why=why + limit,
                fix="correct those samples, lower the learning rate, add --callback grad-clip, or use --on-nan skip",
            )
        self.skipped_steps = (*self.skipped_steps, run.step + 1)
        if policy == "skip":
            run.log(f"  skipped step: {where}: {what}; {why}")
            return
        self._roll_back(run)
        run.log(f"  rolled back to the beginning of the epoch: {where}: {what}; {why}; the learning rate is halved")

    def _exceeded_limit(self, policy: str) -> str:
        if policy == "skip" and self.consecutive_skips > MAX_CONSECUTIVE_SKIPS:
            return f"; {MAX_CONSECUTIVE_SKIPS} steps in succession were skipped before"
        if policy == "rollback" and self.rollbacks >= MAX_ROLLBACKS:
            return f"; the phase was rolled back {MAX_ROLLBACKS} times before"
        return ""

    def _roll_back(self, run: Run) -> None:
        self.lr_factor, self.rollbacks = self.lr_factor / 2, self.rollbacks + 1
        restore_state(run.model.module, self.epoch_start_state["model"])
        set_extra_states(run.model.module, copy.deepcopy(self.epoch_start_state["extra_states"]))
        freeze_check = run.engine_state.freeze_check
        if freeze_check is not None:  # the steps since are undone, so their gradients must no longer change anything
            freeze_check.unmoved = dict.fromkeys(freeze_check.unmoved)
        run.optimization.load_state(run.model, self.epoch_start_state["optimizer"])
        for key, state in run.engine_state.component_states.items():
            state.clear()
            state.update(copy.deepcopy(self.epoch_start_state["components"].get(key, {})))


def check_finite_weights(run: Run, where: str) -> None:
    """Check the parameters and buffers that the last step or epoch may have changed.

    A tensor that was non-finite when the run began, such as an attention mask with -Inf, is left out.

    Raises:
        HaltError: One of them is NaN or Inf, although each loss and each gradient was finite.
    """
    freeze_check = run.engine_state.freeze_check
    skipped = run.engine_state.nonfinite_at_start.union(freeze_check.frozen if freeze_check is not None else ())
    names = find_nonfinite_tensors(full_state(run.model.module), skipped)
    if run.sharded:  # all ranks raise together
        names = list(dict.fromkeys(itertools.chain(*run.process_group.all_gather_object(names))))
    if names:
        more = f" and {len(names) - _MAX_LISTED_IDS} more" if len(names) > _MAX_LISTED_IDS else ""
        raise HaltError(
            f"weights or buffers are NaN or Inf: {', '.join(names[:_MAX_LISTED_IDS])}{more}",
            where=where,
            why="losses and gradients were finite, so an update was too large or an input has extreme values",
            fix="lower the learning rate, add --callback grad-clip, or look for extreme values in the data",
        )


def find_nonfinite_tensors(tensors: Mapping[str, Tensor], skipped: Collection[str] = ()) -> list[str]:
    """Return the names of the tensors with an element that is NaN or Inf, but for those in `skipped`."""
    return [name for name, each in tensors.items() if name not in skipped and not _is_finite(each)]


def find_nonfinite_gradient(run: Run, trainable: list[tuple[str, nn.Parameter]]) -> str:
    """Return the name of a parameter whose gradient is non-finite; "" if there is none.

    If the model is sharded, the gradients of all ranks are searched.
    """
    name = _find_local_nonfinite_gradient(trainable)
    if not run.sharded:
        return name
    if not run.process_group.all_reduce_any(name != "")[0]:
        return ""
    return next(filter(None, run.process_group.all_gather_object(name)), "")


def _find_local_nonfinite_gradient(trainable: list[tuple[str, nn.Parameter]]) -> str:
    for name, parameter in trainable:
        if parameter.grad is not None and not _is_finite(parameter.grad):
            return name
    return ""


def _is_finite(tensor: Tensor) -> bool:
    values = tensor.coalesce().values() if tensor.is_sparse else local_shard(tensor)
    # The sum is non-finite if an element is, and needs no temporary tensor; a finite one may overflow it.
    return math.isfinite(abs(values.sum().item())) or bool(values.isfinite().all())


def _describe_samples(run: Run, error: NonFiniteError) -> str:
    """Name the samples with a non-finite input, else those with a non-finite target, else output, else all samples."""
    for prefix, values in _candidate_causes(error):
        ids = [
            run.data.train.id_of(int(index))
            for batch, value in zip(error.batches, values, strict=True)
            for index in batch.indices[_nonfinite_rows(value, len(batch.indices))]
        ]
        if ids:
            return f"{prefix} {_join_ids(ids)}"
    ids = [run.data.train.id_of(int(index)) for batch in error.batches for index in batch.indices]
    return f"inputs and targets are finite; the samples were {_join_ids(ids)}"


def _candidate_causes(error: NonFiniteError) -> Iterator[tuple[str, list[Any]]]:
    yield "there is NaN or Inf in the input of", [batch.inputs for batch in error.batches]
    yield "there is NaN or Inf in the target of", [batch.targets for batch in error.batches]
    if error.outputs is not None:
        yield "there is NaN or Inf in the model's output for", [error.outputs]


def _nonfinite_rows(value: Any, size: int) -> Tensor:
    """Return a mask (b,) that is True for each sample with a non-finite element."""
    mask = torch.zeros(size, dtype=torch.bool)
    features = getattr(value, "values", None)
    if isinstance(features, tuple):
        tensors = list(features)
    else:
        tensors = list(named_tensors(value).values()) if isinstance(value, (Tensor, dict)) else []
    for tensor in tensors:
        is_dense_float = isinstance(tensor, Tensor) and not tensor.is_sparse and tensor.is_floating_point()
        if is_dense_float and tensor.ndim and len(tensor) == size:
            mask |= ~tensor.detach().reshape(size, -1).isfinite().all(1).cpu()
    return mask


def _join_ids(ids: list[str]) -> str:
    more = f" and {len(ids) - _MAX_LISTED_IDS} more" if len(ids) > _MAX_LISTED_IDS else ""
    return ", ".join(ids[:_MAX_LISTED_IDS]) + more
