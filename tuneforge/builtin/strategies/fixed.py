"""Strategies whose steps are known in advance.

They import no torch, so that `tuneforge run --strategy NAME --help` shows their options at once.
"""

from __future__ import annotations

from collections.abc import Iterable

from tuneforge import (
    HeadFit,
    Phase,
    SelectorError,
    TaskInfo,
    WeightAverage,
    between,
    component,
    ge,
    gt,
    hookimpl,
    option,
    use,
)
from tuneforge.plugin import Check, StrategyStep

_FACTOR = Check(
    "greater than 0 and at most 1", lambda value: bool(0 < value <= 1), {"exclusiveMinimum": 0, "maximum": 1}
)
_SHARES = Check(
    "one or more numbers from 0 to 1", lambda values: bool(values) and all(0 <= value <= 1 for value in values)
)


@component(api=1)
class Full:
    """Train every layer from the first step.

    The plain way, which the others are compared with: the rate rises over the share `warmup` of the steps, then falls
    along a cosine; biases and norms are not decayed.
    """

    epochs: int = option(default=8, help="Epochs with every layer trained.", check=ge(1))
    lr: float = option(default=1e-3, help="Peak learning rate.", check=gt(0))
    warmup: float = option(default=0.1, help="Share of the steps in which the rate rises.", check=between(0, 1))
    patience: int | None = option(
        default=None, help="Stop after this many epochs without gain; none: never.", check=ge(1)
    )
    restore_best: bool = option(default=True, help="End on the weights of the best epoch.")

    @hookimpl
    def finetune_strategy(self) -> Iterable[StrategyStep]:
        """One phase over all layers."""
        return [
            Phase(
                "all",
                train="all",
                epochs=self.epochs,
                lr=self.lr,
                schedule=use("cosine", warmup=self.warmup),
                patience=self.patience,
                restore_best=self.restore_best,
            )
        ]


@component(api=1)
class HeadOnly:
    """Train the head on a frozen backbone, by gradient descent (a linear probe: Alain and Bengio 2016, 1610.01644).

    Warm-up 10 %, then a cosine. `Fit`, with which `lp-ft` begins, solves the same problem without a rate.
    """

    epochs: int = option(default=5, help="Epochs with the head trained.", check=ge(1))
    lr: float = option(default=2e-3, help="Peak learning rate.", check=gt(0))
    patience: int | None = option(
        default=None, help="Stop after this many epochs without gain; none: never.", check=ge(1)
    )
    restore_best: bool = option(default=True, help="End on the weights of the best epoch.")

    @hookimpl
    def finetune_strategy(self) -> Iterable[StrategyStep]:
        """One phase over the head."""
        return [
            Phase(
                "head",
                train="head",
                epochs=self.epochs,
                lr=self.lr,
                schedule=use("cosine", warmup=0.1),
                patience=self.patience,
                restore_best=self.restore_best,
            )
        ]


@component(api=1)
class FreezeThenUnfreeze:
    """Train the head on a frozen backbone, then every layer at rates that fall towards the input.

    fastai's `fine_tune` (Howard and Gugger 2020): the head at `lr` under one-cycle, pct_start 0.99; then all layers,
    from `lr / 2` at the head geometrically to `lr / 2 / lr_mult` at the first group, pct_start 0.3, div 5; decay 0.01.
    """

    head_epochs: int = option(default=1, help="Epochs with the backbone frozen.", check=ge(1))
    epochs: int = option(default=8, help="Epochs with every layer trained.", check=ge(1))
    lr: float = option(default=2e-3, help="Peak learning rate of the head while the backbone is frozen.", check=gt(0))
    lr_mult: float = option(default=100.0, help="Rate of the head over that of the first layer group.", check=ge(1))
    patience: int | None = option(default=None, help="Stop a phase after this many epochs without gain.", check=ge(1))
    restore_best: bool = option(default=True, help="End each phase on the weights of its best epoch.")

    @hookimpl
    def finetune_strategy(self, task: TaskInfo) -> Iterable[StrategyStep]:
        """Two phases."""
        return [
            Phase(
                "head",
                train="head",
                epochs=self.head_epochs,
                lr=self.lr,
                schedule=use("one-cycle", pct_start=0.99),
                weight_decay=0.01,
                patience=self.patience,
                restore_best=self.restore_best,
            ),
            Phase(
                "all",
                epochs=self.epochs,
                lr=self.lr / 2,
                layer_decay=self.lr_mult ** (-1 / max(1, len(task.groups) - 1)),
                schedule=use("one-cycle", pct_start=0.3, div=5.0),
                weight_decay=0.01,
                patience=self.patience,
                restore_best=self.restore_best,
            ),
        ]


@component(api=1)
class GradualUnfreeze:
    """Thaw one more layer group an epoch, from the head down, then train all of them on.

    ULMFiT (Howard and Ruder 2018, arXiv 1801.06146): each group's rate is that of the group above divided by 2.6,
    and the rate follows a slanted triangle in each phase.
    """

    group_epochs: int = option(default=1, help="Epochs before the next layer group is thawed.", check=ge(1))
    epochs: int = option(default=4, help="Epochs with every layer trained, at the end.", check=ge(1))
    lr: float = option(default=2e-3, help="Peak learning rate of the head.", check=gt(0))
    factor: float = option(default=2.6, help="Rate of a layer group over that of the group below it.", check=ge(1))
    restore_best: bool = option(default=True, help="End each phase on the weights of its best epoch.")

    @hookimpl
    def finetune_strategy(self, task: TaskInfo) -> Iterable[StrategyStep]:
        """One phase for each number of thawed groups."""
        most = len(task.groups)
        return [
            Phase(
                "all" if thawed == most else f"top-{thawed}",
                train=f"groups[-{thawed}:]",
                epochs=self.epochs if thawed == most else self.group_epochs,
                lr=self.lr,
                layer_decay=1 / self.factor,
                schedule=use("slanted-triangular"),
                restore_best=self.restore_best,
            )
            for thawed in range(1, most + 1)
        ]


@component(api=1)
class LayerDecay:
    """Train every layer, each layer group at a rate lower by one factor than the group above it.

    The rate of a group is `lr * decay ** depth`, where depth counts layer groups down from the head's 0. The default of
    0.75 is that of MAE's code (He et al. 2021, arXiv 2111.06377) and of timm, after BEiT, for each block of a
    transformer; ELECTRA (Clark et al. 2020, arXiv 2003.10555) has 0.8 for its base model. Where a model has few groups,
    a lower factor sets them as far apart. Warm-up 10 %, then a cosine; biases and norms are not decayed.
    """

    epochs: int = option(default=8, help="Epochs with every layer trained.", check=ge(1))
    lr: float = option(default=1e-3, help="Peak learning rate of the head.", check=gt(0))
    decay: float = option(default=0.75, help="Rate of a layer group over that of the group above it.", check=_FACTOR)
    patience: int | None = option(default=None, help="Stop after this many epochs without gain.", check=ge(1))
    restore_best: bool = option(default=True, help="End on the weights of the best epoch.")

    @hookimpl
    def finetune_strategy(self) -> Iterable[StrategyStep]:
        """One phase over all layers."""
        return [
            Phase(
                "all",
                train="all",
                epochs=self.epochs,
                lr=self.lr,
                layer_decay=self.decay,
                schedule=use("cosine", warmup=0.1),
                patience=self.patience,
                restore_best=self.restore_best,
            )
        ]


@component(api=1)
class LPFT:
    """Solve the head on frozen features, then train every layer from there at a small rate.

    LP-FT (Kumar et al. 2022, arXiv 2202.10054): under a random head the features move far before the head fits them;
    under a solved one they hardly move. First (W, b) = argmin of mean loss + l2 / 2 * |W|^2 on features of the frozen
    backbone in eval mode, to convergence; then all layers, warm-up 10 % and a cosine. The paper searches the rate; the
    default is a tenth of what `full` has. The head must be one linear layer.
    """

    l2: float = option(default=1e-3, help="Ridge on the solved head's weights, relative to the mean loss.", check=gt(0))
    epochs: int = option(default=8, help="Epochs with every layer trained.", check=ge(1))
    lr: float = option(default=1e-4, help="Peak learning rate of those epochs.", check=gt(0))
    patience: int | None = option(default=None, help="Stop after this many epochs without gain.", check=ge(1))
    restore_best: bool = option(default=True, help="End on the weights of the best epoch.")

    @hookimpl
    def finetune_strategy(self) -> Iterable[StrategyStep]:
        """The head solved, then one phase over all layers."""
        return [
            HeadFit("head", l2=self.l2),
            Phase(
                "all",
                train="all",
                epochs=self.epochs,
                lr=self.lr,
                schedule=use("cosine", warmup=0.1),
                patience=self.patience,
                restore_best=self.restore_best,
            ),
        ]


@component(api=1)
class WiSEFT:
    """Train every layer, then keep the best mixture of the weights before and after, chosen on validation.

    WiSE-FT (Wortsman et al. 2022, arXiv 2109.01903): (1 - a) * before + a * after for each tensor, statistics of norms
    included. Candidates for a are 0, 0.1, ..., 1; the paper draws them as a curve, and advises 0.5 where nothing can be
    measured. What was before must answer already, so a head with fresh rows is solved first and the mixture starts from
    there. Validation that looks like training favours 1: give it samples like those that the model will meet.
    """

    epochs: int = option(default=8, help="Epochs with every layer trained.", check=ge(1))
    lr: float = option(default=1e-3, help="Peak learning rate.", check=gt(0))
    weights: tuple[float, ...] = option(
        default=tuple(tenth / 10 for tenth in range(11)), help="Candidate shares of the tuned weights.", check=_SHARES
    )
    solve_head: bool | None = option(default=None, help="Solve the head first; none: where it has fresh rows.")
    l2: float = option(default=1e-3, help="Ridge on the solved head's weights, relative to the mean loss.", check=gt(0))
    restore_best: bool = option(default=True, help="Mix the best epoch's weights rather than the last one's.")

    @hookimpl
    def finetune_strategy(self, task: TaskInfo) -> Iterable[StrategyStep]:
        """The head solved where that is due, one phase over all layers, the mixture."""
        solve = has_random_head_rows(task) if self.solve_head is None else self.solve_head
        schedule = use("cosine", warmup=0.1)
        return [
            *([HeadFit("head", l2=self.l2)] if solve else []),
            Phase("all", epochs=self.epochs, lr=self.lr, schedule=schedule, restore_best=self.restore_best),
            WeightAverage("mixture", snapshots=("head" if solve else "start", "all"), weights=self.weights),
        ]


@component(api=1)
class NormOnly:
    """Train the scales and shifts of norms, and the head; every other weight stays as it was pretrained.

    Frankle et al. 2021 (arXiv 2003.00152) train nothing but the affine parameters of BatchNorm; the head comes with
    them, because its rows may be fresh. A BatchNorm whose scale and shift both train normalises with the batch and
    adapts its running statistics, as in the paper; one without them keeps still. Few parameters take a higher rate than
    all layers would. A model without norms, or whose norms have no parameters, is refused.
    """

    epochs: int = option(default=8, help="Epochs.", check=ge(1))
    lr: float = option(default=1e-2, help="Peak learning rate.", check=gt(0))
    patience: int | None = option(default=None, help="Stop after this many epochs without gain.", check=ge(1))
    restore_best: bool = option(default=True, help="End on the weights of the best epoch.")

    @hookimpl
    def finetune_strategy(self) -> Iterable[StrategyStep]:
        """One phase over norms and head."""
        return [
            Phase(
                "norms",
                train=("norms", "head"),
                epochs=self.epochs,
                lr=self.lr,
                schedule=use("cosine", warmup=0.1),
                patience=self.patience,
                restore_best=self.restore_best,
            )
        ]


@component(api=1)
class BiasOnly:
    """Train every bias, and the head; every other weight stays as it was pretrained.

    BitFit (Ben Zaken et al. 2022, arXiv 2106.10199), with biases of convolutions and norms alike. A norm's scale is
    frozen, so its running statistics stay still and it normalises with them. The authors search rates about ten times
    those of all layers, hence the default. A model without biases below its head is refused.
    """

    epochs: int = option(default=8, help="Epochs.", check=ge(1))
    lr: float = option(default=1e-2, help="Peak learning rate.", check=gt(0))
    patience: int | None = option(default=None, help="Stop after this many epochs without gain.", check=ge(1))
    restore_best: bool = option(default=True, help="End on the weights of the best epoch.")

    @hookimpl
    def finetune_strategy(self, task: TaskInfo) -> Iterable[StrategyStep]:
        """One phase over biases and head.

        Raises:
            SelectorError: No tensor below the head is a bias.
        """
        if not any(name.rpartition(".")[2] == "bias" for group in task.backbone for name in group.parameter_names):
            raise _no_biases_error(task)
        return [
            Phase(
                "biases",
                train=("biases", "head"),
                epochs=self.epochs,
                lr=self.lr,
                schedule=use("cosine", warmup=0.1),
                patience=self.patience,
                restore_best=self.restore_best,
            )
        ]


def has_random_head_rows(task: TaskInfo) -> bool:
    """True where the head has a row that did not come with the model: that of a class new to it, or any at all."""
    return not task.old_classes or set(task.old_classes) != set(task.classes)


def _no_biases_error(task: TaskInfo) -> SelectorError:
    return SelectorError(
        "the model has no bias below its head",
        where=f"layer groups: {', '.join(group.name for group in task.backbone) or 'none but the head'}",
        why="with nothing but the head to train this would be head-only under another name",
        fix="use --strategy head-only, or norm-only where the model has norms",
    )
