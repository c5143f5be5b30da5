"""Callbacks: gradient clipping and an exponential moving average of the weights."""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, Any

from tuneforge import between, component, gt, hookimpl, option

if TYPE_CHECKING:
    from tuneforge import Run


@component(api=1)
class GradClip:
    """Clip the norm of all gradients together (Pascanu et al. 2013)."""

    norm: float = option(default=1.0, help="Maximum L2 norm of all gradients together.", check=gt(0))

    @hookimpl(wrapper=True)
    def optimizer_step(self, run: Run) -> Generator[None, Any, Any]:
        """Clip the gradients before the optimizer step."""
        import torch

        torch.nn.utils.clip_grad_norm_(run.model.module.parameters(), self.norm)
        result = yield
        return result


@component(api=1)
class EMA:
    """Evaluate and keep an exponential moving average of the weights that train.

    Each optimizer step adds `(1 - decay) * (w - e)` to the average `e`: in this form, an average that equals its weight
    stays bit-identical. Early in a phase the decay is `(1 + t) / (10 + t)` at step `t`, if that is smaller. Evaluation
    and best weights use the averages, and a phase ends on them.
    """

    decay: float = option(default=0.99, help="Decay of the average at each optimizer step.", check=between(0, 1))

    @hookimpl
    def phase_started(self, run: Run) -> None:
        """Start the averages of the trained parameters at their current values."""
        state = run.state(self)
        trained = {name: each for name, each in run.model.parameters().items() if each.requires_grad}
        state["average"] = {name: parameter.detach().clone() for name, parameter in trained.items()}

    @hookimpl(wrapper=True)
    def optimizer_step(self, run: Run) -> Generator[None, Any, Any]:
        """Update the averages after the optimizer step."""
        import torch

        result = yield
        average = run.state(self)["average"]
        named = run.model.parameters()
        decay = min(self.decay, (1 + run.steps_done) / (10 + run.steps_done))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.values()), [named[name] for name in average], 1 - decay)
        return result

    @hookimpl
    def evaluation_started(self, run: Run) -> None:
        """Swap the averages in during a phase."""
        if run.phase is not None:
            self._swap(run)

    @hookimpl
    def evaluation_ended(self, run: Run) -> None:
        """Swap the trained weights back in."""
        if run.phase is not None:
            self._swap(run)

    @hookimpl
    def phase_ended(self, run: Run) -> None:
        """Continue from the averages."""
        self._swap(run)
        run.state(self).clear()

    def _swap(self, run: Run) -> None:
        import torch

        named = run.model.parameters()
        with torch.no_grad():
            for name, average in run.state(self)["average"].items():
                live = named[name].clone()
                named[name].copy_(average)
                average.copy_(live)
