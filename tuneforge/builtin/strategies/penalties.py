"""Strategies that also change the loss: they wrap `train_step` in the component that says the steps."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from typing import TYPE_CHECKING, Any

from tuneforge import Phase, component, ge, gt, hookimpl, option, use
from tuneforge.plugin import StrategyStep

if TYPE_CHECKING:
    from tuneforge import Run


@component(api=1)
class L2SP:
    """Train every layer, pulled towards where it started.

    L2-SP (Li et al. 2018, arXiv 1802.01483): the loss gains alpha / 2 * |w - w0|^2 over the backbone and
    beta / 2 * |w|^2 over the head, biases and norms included; what is frozen is left out. w0 are the weights before
    the first step, and the optimizer's weight decay is off. The training loss that is reported holds both terms. Pick
    alpha on validation, from powers of ten: the defaults are those of much code for the paper, not a finding of it.
    Where the domains differ the pull hurts (Li et al. 2020, arXiv 2002.11770).
    """

    epochs: int = option(default=8, help="Epochs with every layer trained.", check=ge(1))
    lr: float = option(default=1e-3, help="Peak learning rate.", check=gt(0))
    alpha: float = option(default=0.1, help="Pull of the backbone towards its start.", check=ge(0))
    beta: float = option(default=0.01, help="Pull of the head towards 0.", check=ge(0))
    restore_best: bool = option(default=True, help="End on the weights of the best epoch.")

    @hookimpl
    def finetune_strategy(self) -> Iterable[StrategyStep]:
        """One phase over all layers."""
        schedule, best = use("cosine", warmup=0.1), self.restore_best
        return [Phase("all", epochs=self.epochs, lr=self.lr, schedule=schedule, weight_decay=0.0, restore_best=best)]

    @hookimpl
    def phase_started(self, run: Run) -> None:
        """Remember the backbone's w0, once a run."""
        backbone = {name: each for name, each in run.model.parameters().items() if run.model.depth_of(name)}
        run.state(self).setdefault("start", {name: each.detach().clone() for name, each in backbone.items()})

    @hookimpl(wrapper=True)
    def train_step(self, run: Run) -> Generator[None, Any, Any]:
        """Add both terms to the step's loss."""
        loss, outputs = yield
        start = run.state(self)["start"]
        trained = {name: each for name, each in run.model.parameters().items() if each.requires_grad}
        moved = sum((each - start[name]).square().sum() for name, each in trained.items() if name in start)
        head = sum(each.square().sum() for name, each in trained.items() if name not in start)
        return loss + self.alpha / 2 * moved + self.beta / 2 * head, outputs
