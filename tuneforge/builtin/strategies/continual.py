"""Continual learning: `lwf` distills the predictions of the starting weights, `replay` mixes old samples in.

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
    """Learn new classes while distilling the starting weights on the old classes; needs no old samples.

    Learning without Forgetting (Li and Hoiem 2016, arXiv 1606.09282): the loss gets the term strength * H(p, q), the
    mean cross-entropy over the batch of q = softmax(logits / T) over the old classes against p, the same for the
    starting weights in eval mode; T = 2 and strength = 1 as in the paper. Old classes are those whose rows of the head
    are pretrained.
    """

    needs_inputs = True
    head_epochs: int = option(default=3, help="Epochs with the head trained, if it has random rows.", check=ge(1))
    epochs: int = option(default=8, help="Epochs with every layer trained.", check=ge(1))
    lr: float = option(default=1e-3, help="Peak learning rate.", check=gt(0))
    strength: float = option(default=1.0, help="Weight of the distillation term.", check=ge(0))
    temperature: float = option(default=2.0, help="Temperature of both distributions.", check=gt(0))
    restore_best: bool = option(default=True, help="End each phase on the weights of its best epoch.")

    @hookimpl
    def finetune_strategy(self, task: TaskInfo) -> Iterable[StrategyStep]:
        """Return a phase over the head where it has randomly initialized rows, and one over all layers."""
        require_old_classes(task)
        best, why = self.restore_best, "the head has randomly initialized rows"
        head = Phase("head", train="head", epochs=self.head_epochs, lr=self.lr, restore_best=best, why=why)
        both = Phase("all", epochs=self.epochs, lr=self.lr, schedule=use("cosine", warmup=0.1), restore_best=best)
        return [head, both] if has_random_head_rows(task) else [both]

    @hookimpl
    def phase_started(self, run: Run) -> None:
        """Store the starting weights, once a run."""
        run.state(self).setdefault("start", {n: each.clone() for n, each in run.model.module.state_dict().items()})

    @hookimpl(wrapper=True)
    def train_step(self, run: Run, batch: Batch) -> Generator[None, Any, Any]:
        """Add the distillation term to the loss of the step."""
        loss, outputs = yield
        start = run.state(self).get("start", run.model.module.state_dict())  # a diagnosis may run before any phase
        old = [
            run.data.targets.labels.index(name)
            for name in run.model.pretrained_labels
            if name in run.data.targets.labels
        ]
        teacher_logits = forward_with_weights(start, run, batch.inputs)[:, old] / self.temperature
        log_probs = (outputs[:, old] / self.temperature).log_softmax(1)
        return loss - self.strength * (teacher_logits.softmax(1) * log_probs).sum(1).mean(), outputs


@component(api=1)
class Replay:
    """Train every layer on new samples mixed with old ones, against catastrophic forgetting.

    Rehearsal (Robins 1995), by default half and half as in Rolnick et al. 2019 (arXiv 1811.11682): each epoch draws the
    fraction `share` of its samples from the sample group `old` of the training split, and the rest from the others; an
    epoch has as many draws as the split has samples. The data must have that group, as `--data continued` does.
    """

    epochs: int = option(default=8, help="Epochs with every layer trained.", check=ge(1))
    lr: float = option(default=1e-3, help="Peak learning rate.", check=gt(0))
    share: float = option(default=0.5, help="Fraction of old samples in each epoch.", check=FRACTION)
    restore_best: bool = option(default=True, help="End on the weights of the best epoch.")

    @hookimpl
    def finetune_strategy(self) -> Iterable[StrategyStep]:
        """Return one phase over all layers."""
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
    """Return the outputs (b, k) of the model with other weights, in eval mode, without changing the run."""
    import torch

    module = run.model.module
    args, named = ((), dict(inputs)) if isinstance(inputs, Mapping) else ((inputs,), {})
    with _eval_mode(module), torch.no_grad(), run.autocast():
        outputs = torch.func.functional_call(module, dict(weights), args, named, tie_weights=False)
    logits: Tensor = outputs[0] if isinstance(outputs, (tuple, list)) else outputs
    return logits.float()


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
    """Require a pretrained row of the head for at least one class.

    Raises:
        SelectorError: There is none.
    """
    if not task.old_classes:
        raise SelectorError(
            "the model knows none of the classes, so there is nothing to preserve",
            where=f"classes: {', '.join(task.classes[:12]) or 'none'}",
            why="old classes are those whose rows of the head are pretrained, matched by name",
            fix="start from a model that was fine-tuned on some of them, or use --strategy full",
        )
