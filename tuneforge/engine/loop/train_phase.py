"""Train one phase: freeze, train, evaluate each epoch, stop, prove, restore. Read it from top to bottom."""

from __future__ import annotations

import functools
import itertools
import math
import time
from collections.abc import Mapping
from typing import Any

import attrs
import torch
from torch import Tensor

from tuneforge.engine.context.run import Run
from tuneforge.engine.data.loader import batch_sizes
from tuneforge.engine.feature_cache.cache import kept_prefix
from tuneforge.engine.loop.backward import Gradients
from tuneforge.engine.loop.build import Parts
from tuneforge.engine.loop.compile import compiled
from tuneforge.engine.loop.evaluation import evaluate
from tuneforge.engine.loop.metric_set import single_numbers, watched
from tuneforge.engine.loop.sampling import Draws
from tuneforge.engine.model.freeze_check import Proof
from tuneforge.engine.model.freezing import freeze, modes, put_back, select, whole_state
from tuneforge.engine.storage import fault_injection as faults
from tuneforge.errors import HaltError, UsageError
from tuneforge.plugin.results import Report
from tuneforge.plugin.steps import Phase


def train(run: Run, phase: Phase, parts: Parts, resumed: dict[str, Any] | None = None) -> Report:
    """Do a `Phase` step, from its beginning or from where a checkpoint left it.

    Args:
        run: With data and model.
        phase: What to do.
        parts: Gives optimizer and schedule.
        resumed: What `Progress.state` gave, in a run that goes on.

    Raises:
        SelectorError: The phase names parameters that do not exist.
        HaltError: The loss is no number, or the proof of freezing failed.
    """
    trained = select(run.model, phase.train)
    freeze(run.model, trained)
    plan = modes(run.model, run.example, norms=phase.norms)
    optimizer, same = parts.optimizer(phase)
    schedule = parts.schedule(phase)
    run.optimization.arrange(run.model, phase, trained, optimizer, same=same)
    draws = Draws.of(run, phase)
    gradients = Gradients.of(run, plan, resumed["gradients"] if resumed is not None else None)
    freezes = len(trained) < len(run.model.parameters())
    if freezes and not run.model.pretrained:
        run.note("  note: every weight is fresh, so freezing keeps nothing; --strategy full trains all from the start")
    course = _Course(phase, *watched(run.data.targets, phase.monitor, phase.monitor_mode))
    run.phase, run.steps_done, run.progress = phase, 0, 0.0
    run.total_steps = phase.steps or _steps_per_epoch(run) * (phase.epochs or 0)
    if resumed is None:
        run.proof = Proof.begin(run.model, trained, plan)
        progress = Progress(course, gradients, run.device.sum())
        run.hooks.call.phase_started(run=run)
    else:
        run.proof = Proof.restored(resumed["proof"])
        progress = Progress.restored(resumed, course, gradients, run)
        _say_what_comes_next(run, draws, progress, schedule)
    proof = run.proof
    if freezes:
        pause = functools.partial(run.save, progress)
        run.prefix = kept_prefix(run, plan, epochs=_num_epochs(run, phase), pause=pause)
    if run.config.compile and not course.reason:
        if run.ranks.alone and run.micro_batch is None:
            run.compiled = compiled(run, plan)
        else:
            run.note("  not compiled: passes are smaller than a batch")

    while not course.reason:
        began = time.perf_counter()
        loss = _train_epoch(run, draws, progress, schedule)
        proof.narrow(run.model)
        run.epoch += 1
        take = functools.partial(course.take, run, loss, trained)
        figures = evaluate(run, run.data.val, "val", then=take)
        _record(run, course, loss, figures, seconds=time.perf_counter() - began)
        course.reason = course.reason or run.budget.spent(run)
        run.save(progress)
        faults.point("epoch")

    return _concluded(run, phase, trained, course, gradients)


def _concluded(run: Run, phase: Phase, trained: list[str], course: _Course, gradients: Gradients) -> Report:
    """End a phase: prove what froze and what moved, go back to the best weights where asked, and report.

    Raises:
        HaltError: What was frozen moved, what trained did not, or the ranks have drifted apart.
    """
    run.ranks.prove_equal(whole_state(run.model.module))
    run.hooks.call.phase_ended(run=run)
    assert run.proof is not None
    unmoved = run.proof.conclude(run.model)
    views = run.prefix.views if run.prefix is not None else 0
    if phase.restore_best and course.best_epoch != len(course.history):
        put_back(run.model.module, course.best_state)
        run.optimization.forget()
    run.phase = run.proof = run.prefix = run.compiled = None
    sizes = {name: parameter.numel() for name, parameter in run.model.parameters().items()}
    return Report(
        step=phase.name,
        reason=course.reason,
        epochs=len(course.history),
        steps=run.steps_done,
        best_epoch=course.best_epoch,
        train={"loss": course.history[-1]["train"]["loss"]},
        val=course.best_figures if phase.restore_best else course.figures,
        history=course.history,
        trained=sum(sizes[name] for name in trained),
        frozen=sum(sizes.values()) - sum(sizes[name] for name in trained),
        unmoved=unmoved,
        left_out=gradients.left_out,
        views=views,
    )


def _say_what_comes_next(run: Run, draws: Draws, progress: Progress, schedule: Any) -> None:
    """Say where a resumed phase goes on; leaves the rate as the last step had it."""
    order = draws.order(run)
    start = progress.batch * run.config.batch_size
    if progress.course.reason:
        run.note(f"  goes on at the end of the phase, after optimizer step {run.step}")
    elif _epoch_over(run) or start >= order.size:
        run.note(f"  goes on at the evaluation after optimizer step {run.step}, epoch {run.epoch + 1}")
    else:
        _set_rate(run, progress, schedule, run.steps_done)
        samples = ", ".join(map(run.data.train.id_of, order.rows(start, min(start + 4, order.size)).tolist()))
        place = f"optimizer step {run.step + 1}, epoch {run.epoch + 1}, batch {progress.batch + 1}"
        run.note(f"  goes on at {place}, lr {run.optimization.rates()[0]:.3g}, next samples {samples}")
    if run.steps_done:
        _set_rate(run, progress, schedule, run.steps_done - 1)


def _set_rate(run: Run, progress: Progress, schedule: Any, step: int) -> None:
    """The rate of a step of the phase: that of its middle, lowered where the run went back."""
    run.optimization.set_factor(progress.gradients.rate * schedule.factor((step + 0.5) / run.total_steps))


def _epoch_over(run: Run) -> bool:
    """True where no further step may be taken, though samples of the epoch may be left."""
    return run.steps_done >= run.total_steps or bool(run.budget.reached(run))


def _num_epochs(run: Run, phase: Phase) -> int:
    return phase.epochs or math.ceil(run.total_steps / _steps_per_epoch(run))


def _steps_per_epoch(run: Run) -> int:
    return math.ceil(len(batch_sizes(len(run.data.train), run.config.batch_size)) / run.config.accumulate)


def _train_epoch(run: Run, draws: Draws, progress: Progress, schedule: Any) -> float:
    """One pass over the training split, or what is left of it. Returns the mean loss."""
    order = draws.order(run)
    gradients, proof = progress.gradients, run.proof
    assert proof is not None
    run.model.module.train()  # so that a module's own train() is told; the modes of the phase follow
    if progress.batch == 0:
        gradients.begin_epoch(run)
    sizes = batch_sizes(order.size, run.config.batch_size)
    left = iter(() if _epoch_over(run) else run.training_batches(order, draws.weights, start=progress.batch))
    while batches := list(itertools.islice(left, run.config.accumulate)):
        _set_rate(run, progress, schedule, run.steps_done)
        if run.ranks.alone:
            losses = gradients.compute(run, batches, [len(batch.rows) for batch in batches])
        else:
            losses = gradients.compute(run, batches, sizes[progress.batch : progress.batch + len(batches)])
        if losses is not None:
            for loss, count in losses:
                progress.loss.add_(loss, alpha=count)
                progress.count += count
            run.hooks.call.optimizer_step(run=run)
        run.device.mark_step()
        run.step += 1
        run.steps_done += 1
        run.progress = run.steps_done / run.total_steps
        progress.batch += len(batches)
        if proof.watched and run.steps_done.bit_count() == 1:  # after steps 1, 2, 4, 8, ...
            proof.narrow(run.model)
        faults.point("step")
        spent = run.budget.spent(run)
        run.save(progress)
        faults.point("step-saved")
        if spent or run.steps_done == run.total_steps:
            break
    gradients.share_statistics(run)
    return progress.next_epoch(run, whole=progress.batch == len(sizes))


@attrs.define(eq=False)
class Progress:
    """Where a phase is: what a checkpoint must hold, beside weights and optimizer, to go on to the bit.

    Args:
        course: The figures so far.
        gradients: What the steps are made of.
        loss: Sum of the losses of this epoch's samples, on the device.
        count: Samples of this epoch so far.
        batch: The batch that comes next.
    """

    course: _Course
    gradients: Gradients
    loss: Tensor
    count: int = 0
    batch: int = 0

    @property
    def best(self) -> bool:
        """True at the end of an epoch that is the best of the phase so far."""
        return self.batch == 0 and 0 < self.course.best_epoch == len(self.course.history)

    def next_epoch(self, run: Run, *, whole: bool) -> float:
        """Begin the next epoch, and give the mean loss of the one that ended.

        Raises:
            HaltError: It is no number, or no step of a whole epoch could be applied.
        """
        self.loss, self.count = self._of_all(run)
        if not self.count and whole:
            raise HaltError(
                "no step of a whole epoch could be applied",
                where=f"epoch {run.epoch + 1}",
                why="a loss or a gradient was no number in every one of them, so it is the weights that are at fault",
                fix="start again with a lower learning rate, or with --with grad-clip",
            )
        earlier = [entry["train"]["loss"] for entry in run.history[-1:]]
        mean = float(self.loss) / self.count if self.count else next(iter(earlier), 0.0)
        self.loss, self.count, self.batch = torch.zeros_like(self.loss), 0, 0
        return _finite(run, mean)

    def state(self, run: Run) -> dict[str, Any]:
        """All of it as tensors and plain data."""
        assert run.proof is not None
        loss, count = self._of_all(run)
        return {
            "loss": loss,
            "count": count,
            "batch": self.batch,
            "steps_done": run.steps_done,
            "gradients": self.gradients.state(),
            "course": {name: getattr(self.course, name) for name in _COURSE_STATE},
            "proof": run.proof.state(),
        }

    @classmethod
    def restored(cls, state: dict[str, Any], course: _Course, gradients: Gradients, run: Run) -> Progress:
        """What `state` gave, with the run's counters of the phase."""
        for name in _COURSE_STATE:
            setattr(course, name, state["course"][name])
        run.steps_done = state["steps_done"]
        run.progress = run.steps_done / run.total_steps
        if not run.ranks.leads:  # the sum is of all ranks, and rank 0 goes on with it
            return cls(course, gradients, torch.zeros_like(state["loss"]), 0, state["batch"])
        return cls(course, gradients, state["loss"], state["count"], state["batch"])

    def _of_all(self, run: Run) -> tuple[Tensor, int]:
        """Sum and count over all ranks."""
        if run.ranks.alone:
            return self.loss, self.count
        loss, count = run.ranks.total(self.loss, torch.tensor(self.count))
        return loss, int(count)


_COURSE_STATE = ("reason", "best", "best_epoch", "best_figures", "best_state", "figures", "history")


def _finite(run: Run, loss: float) -> float:
    if math.isfinite(loss):
        return loss
    assert run.phase is not None
    raise HaltError(
        f"the training loss is {loss}",
        where=f"phase '{run.phase.name}', epoch {run.epoch + 1}",
        why="a step in this epoch produced a value that is no number; the weights are lost from there on",
        fix="lower the learning rate, add --with grad-clip, or look for bad values in the data",
    )


def _record(run: Run, course: _Course, loss: float, figures: Mapping[str, Any], *, seconds: float) -> None:
    assert run.phase is not None
    run.history.append(
        {
            "step": run.step,
            "epoch": run.epoch,
            "phase": run.phase.name,
            "lr": run.optimization.rates()[0],
            "train": {"loss": loss},
            "val": single_numbers(figures),
            "best": course.best_epoch == len(course.history),
            "seconds": seconds,
        }
    )
    run.hooks.call.epoch_ended(run=run)


@attrs.define(eq=False)
class _Course:
    """How a phase goes: its figures so far, the best of them, and why it ended."""

    phase: Phase
    monitor: str
    sign: float
    reason: str = ""
    best: float = math.nan
    best_epoch: int = 0
    best_figures: Mapping[str, Any] = attrs.field(factory=dict)
    best_state: dict[str, Tensor] = attrs.field(factory=dict)
    figures: Mapping[str, Any] = attrs.field(factory=dict)
    history: list[dict[str, Any]] = attrs.field(factory=list)

    def take(self, run: Run, loss: float, trained: list[str], figures: Mapping[str, Any]) -> None:
        """Take in an epoch's figures: is it the best so far, and does the phase go on?

        Where the phase asks for best weights, those of the best epoch are kept: what trained, and every buffer.
        """
        numbers = single_numbers(figures)
        decides = self.phase.patience is not None or self.phase.restore_best or self.phase.monitor is not None
        if decides and self.monitor not in numbers:
            raise UsageError(
                f"no metric gives the figure '{self.monitor}'",
                where=f"phase '{self.phase.name}'",
                why="early stopping and best weights watch it",
                fix=f"watch one of {', '.join(sorted(numbers))}",
            )
        self.figures = figures
        self.history.append({"epoch": len(self.history) + 1, "train": {"loss": loss}, "val": numbers})
        value = numbers.get(self.monitor, math.nan)
        gain = self.sign * (value - self.best)
        if self.best_epoch == 0 or gain > self.phase.min_gain or (math.isnan(self.best) and not math.isnan(value)):
            self.best, self.best_epoch, self.best_figures = value, len(self.history), figures
            if self.phase.restore_best:
                frozen = set(run.model.parameters()) - set(trained)
                state = whole_state(run.model.module)
                self.best_state = {name: tensor.clone() for name, tensor in state.items() if name not in frozen}
        self.reason = self._reason(run.steps_done >= run.total_steps)

    def _reason(self, done: bool) -> str:
        since = len(self.history) - self.best_epoch
        if self.phase.patience is not None and since >= self.phase.patience:
            return f"early stop: {self.monitor} has not gained for {since} epoch(s), best {self.best:.4f}"
        if done:
            return f"{self.phase.epochs} epoch(s) done" if self.phase.epochs else f"{self.phase.steps} step(s) done"
        return ""
