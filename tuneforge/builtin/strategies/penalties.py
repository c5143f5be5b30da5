"""`l2-sp`: a strategy that also adds a penalty to the loss, by wrapping `train_step`."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from typing import TYPE_CHECKING, Any

from tuneforge import Phase, component, ge, gt, hookimpl, option, use
from tuneforge.plugin import StrategyStep

if TYPE_CHECKING:
    from tuneforge import Run


@component(api=1)
class L2SP:
    """Train every layer with an L2 penalty on the distance from the starting weights.

    L2-SP (Li et al. 2018, arXiv 1802.01483): the loss gets the terms alpha / 2 * |w - w0|^2 over the
    backbone and beta / 2 * |w|^2 over the head, biases and norms included, frozen parameters excluded. w0 are the
    weights before the first step, and the optimizer's weight decay is off. The reported training loss includes both
    terms. Choose alpha on validation, from powers of ten: the defaults are those of common implementations, not a
    result of the paper. Where the domains differ, the penalty hurts (Li et al. 2020, arXiv 2002.11770).
    """

    epochs: int = option(default=8, help="Epochs with every layer trained.", check=ge(1))
    lr: float = option(default=1e-3, help="Peak learning rate.", check=gt(0))
    alpha: float = option(default=0.1, help="Penalty on the distance from the starting weights.", check=ge(0))
    beta: float = option(default=0.01, help="Penalty on the head's weights.", check=ge(0))
    restore_best: bool = option(default=True, help="End on the weights of the best epoch.")

    @hookimpl
    def finetune_strategy(self) -> Iterable[StrategyStep]:
        """Return one phase over all layers."""
        schedule, best = use("cosine", warmup=0.1), self.restore_best
        return [Phase("all", epochs=self.epochs, lr=self.lr, schedule=schedule, weight_decay=0.0, restore_best=best)]

    @hookimpl
    def phase_started(self, run: Run) -> None:
        """Store w0 of the backbone, once a run."""
        backbone = {name: each for name, each in run.model.parameters().items() if run.model.depth_of(name)}
        run.state(self).setdefault("start", {name: each.detach().clone() for name, each in backbone.items()})

    @hookimpl(wrapper=True)
    def train_step(self, run: Run) -> Generator[None, Any, Any]:
        """Add both terms to the loss of the step."""
        loss, outputs = yield
        start = run.state(self)["start"]
        trained = {name: each for name, each in run.model.parameters().items() if each.requires_grad}
        moved = sum((each - start[name]).square().sum() for name, each in trained.items() if name in start)
        head = sum(each.square().sum() for name, each in trained.items() if name not in start)
        return loss + self.alpha / 2 * moved + self.beta / 2 * head, outputs
