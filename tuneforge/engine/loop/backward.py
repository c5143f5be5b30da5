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

from tuneforge.engine.context.distributed import Ranks
from tuneforge.engine.context.run import Run
from tuneforge.engine.data.dataset import Batch, tensors_of
from tuneforge.engine.data.loader import batch_sizes
from tuneforge.engine.model.device import is_out_of_memory, root_of
from tuneforge.engine.model.freezing import put_back, set_modes, whole_state
from tuneforge.engine.model.fsdp import check_loss, no_room, own_part
from tuneforge.errors import HaltError, PluginError

IN_SUCCESSION = 10
"""Steps in succession that may be left out before the run halts: the weights, not a batch, are at fault then."""

ROLLBACKS = 5
"""Times that a phase may go back."""

_NAMED = 8  # samples named in a message


class _NotFiniteError(Exception):
    """A loss or a gradient that is no number.

    Args:
        what: It, with its value.
        batches: What it was computed from.
        outputs: What the model gave for the last of them, where the loss was bad.
    """

    def __init__(self, what: str, batches: list[Batch], outputs: Any = None) -> None:
        self.what, self.batches, self.outputs = what, batches, outputs


@attrs.define(eq=False)
class Gradients:
    """What a phase's steps are made of.

    Args:
        plan: The mode of each module.
        trained: What gets a gradient, by name.
        watches: True where each step is looked at; on an accelerator a look waits for it, so there only if asked for.
        moving: Modules with buffers that a forward pass of the phase may change, such as the statistics of a norm.
        rate: Factor on the rate; halved each time that the phase goes back.
        left_out: Optimizer steps that were not applied.
        again: Steps left out in succession, up to now.
        rollbacks: Times that the phase went back.
        before: Weights, optimizer and memories of components at the beginning of the epoch, where the run may go back.
    """

    plan: list[tuple[nn.Module, bool]]
    trained: list[tuple[str, nn.Parameter]]
    watches: bool
    moving: list[nn.Module]
    rate: float = 1.0
    left_out: tuple[int, ...] = ()
    again: int = 0
    rollbacks: int = 0
    before: dict[str, Any] = attrs.field(factory=dict)

    @classmethod
    def of(cls, run: Run, plan: list[tuple[nn.Module, bool]], state: dict[str, Any] | None) -> Gradients:
        """Those of a phase whose parameters are frozen already, from its beginning or from what `state` gave."""
        trained = [(name, each) for name, each in run.model.parameters().items() if each.requires_grad]
        watches = run.device.torch.type == "cpu" or run.config.on_nan != "halt"
        moving = [module for module, training in plan if training and next(module.buffers(False), None) is not None]
        return cls(plan, trained, watches, moving, **(state or {}))

    @property
    def statistics(self) -> list[Tensor]:
        """The statistics of norms that the phase moves."""
        norms = [module for module in self.moving if isinstance(module, _NormBase)]
        return [buffer for module in norms for buffer in module.buffers(False)]

    def share_statistics(self, run: Run) -> None:
        """Give all ranks the same buffers: statistics of norms the mean of theirs, others those of rank 0."""
        averaged = {id(each) for each in self.statistics}
        run.ranks.average(self.statistics)
        run.ranks.follow([each for module in self.moving for each in module.buffers(False) if id(each) not in averaged])

    def state(self) -> dict[str, Any]:
        """What a resumed phase goes on with."""
        names = ("rate", "left_out", "again", "rollbacks", "before")
        return {name: getattr(self, name) for name in names}

    def begin_epoch(self, run: Run) -> None:
        """Keep what the run may go back to."""
        if run.config.on_nan == "rollback":
            tensors = {name: tensor.clone() for name, tensor in whole_state(run.model.module).items()}
            kept = {"optimizer": run.optimization.state(run.model), "components": run.states}
            self.before = {"model": tensors, **copy.deepcopy(kept)}

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
        held = [{name: each.clone() for name, each in module.named_buffers("", False)} for module in self.moving]
        while True:
            losses, wrong, full = [], None, ""
            try:
                losses = self._passes(run, batches, sizes)
            except _NotFiniteError as error:
                wrong = error
            except (RuntimeError, MemoryError, PluginError) as error:
                if not is_out_of_memory(error):
                    raise
                if run.sharded:
                    raise no_room(
                        root_of(error), where=f"optimizer step {run.step + 1}", flag="--micro-batch"
                    ) from None
                full = str(root_of(error)).partition("\n")[0]
            anywhere_wrong, anywhere_full = wrong is not None, full != ""
            if not run.ranks.alone:
                anywhere_wrong, anywhere_full = run.ranks.agree(anywhere_wrong, anywhere_full)
            if anywhere_full:
                self._undo(run, held)
                self._halve(run, max(sizes) if run.ranks.alone else -(-max(sizes) // run.ranks.size), full)
                continue
            if not anywhere_wrong:
                if not run.ranks.alone:
                    run.ranks.sum_gradients([each for _, each in self.trained])
                if self.watches and (bad := _not_finite(run, self.trained)):
                    wrong = _NotFiniteError(f"the gradient of '{bad}' is no number", batches)
            if wrong is not None or anywhere_wrong:
                self._undo(run, held)
                self._answer(run, wrong)
                return None
            self.again = 0
            return losses

    def _passes(self, run: Run, batches: list[Batch], sizes: Sequence[int]) -> list[tuple[Tensor, int]]:
        total = sum(sizes)
        losses: list[tuple[Tensor, int]] = []
        for place, (batch, size) in enumerate(zip(batches, sizes, strict=True)):
            run.reseed(place)
            for piece, count in _shares(run, batch, size):
                set_modes(self.plan)
                if not count:
                    run.model.module.eval()  # no statistic is to move
                loss, outputs = outcome_of(run, piece)
                value = loss.item() if self.watches else 0.0
                wrong = not math.isfinite(value)
                anywhere_wrong = run.ranks.agree(wrong)[0] if run.sharded and self.watches else wrong
                if wrong:
                    raise _NotFiniteError(f"the training loss is {value}", [piece], outputs)
                if anywhere_wrong:  # no rank goes into a backward pass by itself; the one that found it says what it is
                    return losses
                torch.autograd.backward(loss if count == total else loss * (count / total))
                losses.append((loss.detach(), count))
        return losses

    def _undo(self, run: Run, held: list[dict[str, Tensor]]) -> None:
        """As if no forward pass had been, also where it put another tensor in a buffer's place."""
        run.model.module.zero_grad(set_to_none=True)
        for module, values in zip(self.moving, held, strict=True):
            for name, value in values.items():
                if module.get_buffer(name).shape == value.shape:
                    module.get_buffer(name).copy_(value)
                else:
                    setattr(module, name, value.clone())

    def _halve(self, run: Run, largest: int, why: str) -> None:
        now = min(run.micro_batch or largest, largest)
        least = 2 if self.statistics else 1  # a norm needs two samples
        if now <= least:
            raise HaltError(
                f"memory does not suffice for a training pass over {now} sample(s)",
                where=f"optimizer step {run.step + 1}",
                why=why,
                fix="use a smaller model or smaller inputs, or --precision bfloat16",
            )
        run.micro_batch = max(least, -(-now // 2))
        run.device.release()
        run.note(f"  out of memory at optimizer step {run.step + 1}: from here on {run.micro_batch} samples a pass")
        if self.statistics:
            run.note("  note: norms see smaller batches now, so the numbers are not those of whole batches")

    def _answer(self, run: Run, error: _NotFiniteError | None) -> None:
        """Do what was asked for: halt, leave the step out, or go back with a lower rate too.

        Args:
            run: With the phase under way.
            error: What was found; None where another rank found it.
        """
        assert run.phase is not None
        where = f"phase '{run.phase.name}', epoch {run.epoch + 1}, optimizer step {run.step + 1}"
        told = run.ranks.heard(None if error is None else [error.what, _suspects(run, error)])
        heard = [each for each in told if each is not None]
        what, why = heard[0][0], "; ".join(dict.fromkeys(each[1] for each in heard))
        self.again += 1
        policy = run.config.on_nan
        exhausted = {"skip": self.again > IN_SUCCESSION, "rollback": self.rollbacks >= ROLLBACKS}
        if exhausted.get(policy, True):
            times = {"skip": f"{IN_SUCCESSION} steps in succession", "rollback": f"{ROLLBACKS} times"}.get(policy)
            raise HaltError(
                what,
                where=where,
                why=why + (f"; it was left out {times} before" if times else ""),
                fix="mend those samples, lower the learning rate, add --with grad-clip, or use --on-nan skip",
            )
        self.left_out = (*self.left_out, run.step + 1)
        if policy == "skip":
            run.note(f"  left out: {where}: {what}; {why}")
            return
        self.rate, self.rollbacks = self.rate / 2, self.rollbacks + 1
        put_back(run.model.module, self.before["model"])
        if run.proof is not None:  # what a step before this one was due to move is back where it was
            run.proof.watched = dict.fromkeys(run.proof.watched)
        run.optimization.put_back(run.model, self.before["optimizer"])
        for key, memory in run.states.items():
            memory.clear()
            memory.update(copy.deepcopy(self.before["components"].get(key, {})))
        run.note(f"  went back to the beginning of the epoch: {where}: {what}; {why}; the rate is halved")


def outcome_of(run: Run, batch: Batch) -> tuple[Tensor, Any]:
    """The loss and the outputs that the step, and whatever wraps it, gives for a batch.

    Raises:
        PluginError: The step gave something else than a scalar loss and the outputs.
    """
    given = run.hooks.call.train_step(run=run, batch=batch)
    if isinstance(given, (tuple, list)) and len(given) == 2 and isinstance(given[0], Tensor) and given[0].numel() == 1:
        return check_loss(given[0] if given[0].ndim == 0 else given[0].reshape(())), given[1]
    raise PluginError(
        f"{run.hooks.provider('train_step').label} gave {type(given).__name__} from train_step",
        why="it must return a scalar loss and the outputs: return loss, outputs",
        fix="look at the step and at what wraps it",
    )


def _shares(run: Run, batch: Batch, size: int) -> list[tuple[Batch, int]]:
    """This rank's passes of a global batch, each with the samples that it counts for.

    Of a sharded model all ranks make as many passes, because each gives its part of the weights to them all: what a
    rank has no samples for counts for none.
    """
    counts = run.ranks.alone or run.ranks.count(size) > 0
    if not run.sharded:
        return [(piece, len(piece.rows)) for piece in run.pieces(batch)] if counts else []
    pieces = [(piece, len(piece.rows) if counts else 0) for piece in run.pieces(batch)]
    largest = Ranks(0, run.ranks.size).count(size)
    number = 1 if run.micro_batch is None else len(batch_sizes(largest, run.micro_batch))
    return pieces + [(pieces[-1][0], 0)] * (number - len(pieces))


def _not_finite(run: Run, trained: list[tuple[str, nn.Parameter]]) -> str:
    """The name of a tensor whose gradient is not finite, on any rank; "" where all are."""
    own = _not_finite_here(trained)
    if not run.sharded:
        return own
    return next(filter(None, run.ranks.heard(own)), "") if run.ranks.agree(own != "")[0] else ""


def _not_finite_here(trained: list[tuple[str, nn.Parameter]]) -> str:
    """The same of what this rank holds. A sum is infinite or no number where an element is, and costs one read."""
    for name, parameter in trained:
        gradient = parameter.grad
        if gradient is not None:
            values = gradient.coalesce().values() if gradient.is_sparse else own_part(gradient)
            if not math.isfinite(abs(values.sum().item())) and not bool(values.isfinite().all()):
                return name
    return ""


def _suspects(run: Run, error: _NotFiniteError) -> str:
    """The samples behind a bad number: those with a bad input, else target, else output, else all of them."""
    for words, things in _evidence(error):
        names = [
            run.data.train.id_of(int(row))
            for batch, thing in zip(error.batches, things, strict=True)
            for row in batch.rows[_bad_rows(thing, len(batch.rows))]
        ]
        if names:
            return f"{words} {_listed(names)}"
    names = [run.data.train.id_of(int(row)) for batch in error.batches for row in batch.rows]
    return f"their inputs and targets are finite; the samples were {_listed(names)}"


def _evidence(error: _NotFiniteError) -> Iterator[tuple[str, list[Any]]]:
    yield "there is an input that is no number in", [batch.inputs for batch in error.batches]
    yield "there is a target that is no number in", [batch.targets for batch in error.batches]
    if error.outputs is not None:
        yield "the model gave what is no number for", [error.outputs]


def _bad_rows(thing: Any, size: int) -> Tensor:
    """True (b,) for each sample of which a value is no number."""
    bad = torch.zeros(size, dtype=torch.bool)
    values = getattr(thing, "values", None)
    tensors = values if isinstance(values, tuple) else tensors_of(thing).values() if _holds_tensors(thing) else ()
    for tensor in tensors:
        plain = isinstance(tensor, Tensor) and not tensor.is_sparse and tensor.is_floating_point()
        if plain and tensor.ndim and len(tensor) == size:
            bad |= ~tensor.detach().reshape(size, -1).isfinite().all(1).cpu()
    return bad


def _holds_tensors(thing: Any) -> bool:
    return isinstance(thing, (Tensor, dict))


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
