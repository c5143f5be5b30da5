"""Strategies that learn something new and keep the old: `lwf` distils old answers, `replay` mixes old samples in.

Shapes: b samples in a batch, k classes, of which o are old.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from tuneforge import Phase, SelectorError, TaskInfo, component, ge, gt, hookimpl, option, use
from tuneforge.builtin.checks import FRACTION
from tuneforge.builtin.strategies.fixed import has_random_head_rows
from tuneforge.plugin import StrategyStep

if TYPE_CHECKING:
    from torch import Tensor

    from tuneforge import Batch, Run


@component(api=1)
class LwF:
    """Learn new classes while the old ones go on answering as the starting weights do; needs no old sample.

    Learning without Forgetting (Li and Hoiem 2016, arXiv 1606.09282): the loss gains strength * H(p, q), the batch's
    mean cross-entropy of q = softmax(logits / T) over the old classes against p, the same of the starting weights in
    eval mode; T = 2 and strength 1 as there. Old classes are those whose rows of the head came with the model.
    """

    needs_inputs = True
    head_epochs: int = option(default=3, help="Epochs of the head before, where it has fresh rows.", check=ge(1))
    epochs: int = option(default=8, help="Epochs with every layer trained.", check=ge(1))
    lr: float = option(default=1e-3, help="Peak learning rate.", check=gt(0))
    strength: float = option(default=1.0, help="Factor on the old classes' term.", check=ge(0))
    temperature: float = option(default=2.0, help="Softens both sides of it.", check=gt(0))
    restore_best: bool = option(default=True, help="End each phase on the weights of its best epoch.")

    @hookimpl
    def finetune_strategy(self, task: TaskInfo) -> Iterable[StrategyStep]:
        """One phase over the head where it has fresh rows, one over all layers."""
        require_old_classes(task)
        best, why = self.restore_best, "fresh rows of the head say nothing yet"
        head = Phase("head", train="head", epochs=self.head_epochs, lr=self.lr, restore_best=best, why=why)
        both = Phase("all", epochs=self.epochs, lr=self.lr, schedule=use("cosine", warmup=0.1), restore_best=best)
        return [head, both] if has_random_head_rows(task) else [both]

    @hookimpl
    def phase_started(self, run: Run) -> None:
        """Remember the starting weights, once a run."""
        run.state(self).setdefault("start", {n: each.clone() for n, each in run.model.module.state_dict().items()})

    @hookimpl(wrapper=True)
    def train_step(self, run: Run, batch: Batch) -> Generator[None, Any, Any]:
        """Add the old classes' term to the step's loss."""
        loss, outputs = yield
        start = run.state(self).get("start", run.model.module.state_dict())  # a probe may come before any phase
        old = [
            run.data.targets.labels.index(name)
            for name in run.model.pretrained_labels
            if name in run.data.targets.labels
        ]
        taught = forward_with_weights(start, run, batch.inputs)[:, old] / self.temperature
        said = (outputs[:, old] / self.temperature).log_softmax(1)
        return loss - self.strength * (taught.softmax(1) * said).sum(1).mean(), outputs


@component(api=1)
class Replay:
    """Train every layer on new samples mixed with old ones, so that what was known is not forgotten.

    Rehearsal (Robins 1995), in the equal shares of Rolnick et al. 2019 (arXiv 1811.11682): each epoch draws the share
    `share` of its samples from the part `old` of the training split, and the rest from what is new; an epoch has as
    many draws as the split has samples. The data must name that part, as `--data continued` does.
    """

    epochs: int = option(default=8, help="Epochs with every layer trained.", check=ge(1))
    lr: float = option(default=1e-3, help="Peak learning rate.", check=gt(0))
    share: float = option(default=0.5, help="Share of old samples in each epoch.", check=FRACTION)
    restore_best: bool = option(default=True, help="End on the weights of the best epoch.")

    @hookimpl
    def finetune_strategy(self) -> Iterable[StrategyStep]:
        """One phase over all layers."""
        mix, schedule = {"old": self.share}, use("cosine", warmup=0.1)
        return [
            Phase(
                "all",
                epochs=self.epochs,
                lr=self.lr,
                mixture_weights=mix,
                schedule=schedule,
                restore_best=self.restore_best,
            )
        ]


def forward_with_weights(weights: Mapping[str, Tensor], run: Run, inputs: Any) -> Tensor:
    """What the model would answer with other weights, in eval mode (b, k); nothing of the run changes."""
    import torch

    module = run.model.module
    args, named = ((), dict(inputs)) if isinstance(inputs, Mapping) else ((inputs,), {})
    with _eval_mode(module), torch.no_grad(), run.autocast():
        answers = torch.func.functional_call(module, dict(weights), args, named, tie_weights=False)
    found: Tensor = answers[0] if isinstance(answers, (tuple, list)) else answers
    return found.float()


@contextlib.contextmanager
def _eval_mode(module: Any) -> Iterator[None]:
    modes = [(each, each.training) for each in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for each, training in modes:
            each.training = training


def require_old_classes(task: TaskInfo) -> None:
    """See that there is something to keep.

    Raises:
        SelectorError: The model came with the rows of no class of the data.
    """
    if not task.old_classes:
        raise SelectorError(
            "the model knows none of the classes, so there is nothing to keep",
            where=f"classes: {', '.join(task.classes[:12]) or 'none'}",
            why="old classes are those whose rows of the head came with the model, found by name",
            fix="start from a model that was tuned on some of them, or use --strategy full",
        )
