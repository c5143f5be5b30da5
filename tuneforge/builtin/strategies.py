"""The first strategies. They import no torch: their options are shown by `tuneforge run --strategy NAME --help`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from tuneforge import Brief, Phase, Step, between, component, ge, gt, hookimpl, option, use


@component(api=1)
class Full:
    """Train every layer from the first step, warmed up and cosine-annealed."""

    epochs: int = option(default=8, help="Epochs with every layer trained.", check=ge(1))
    lr: float = option(default=1e-3, help="Peak learning rate.", check=gt(0))
    warmup: float = option(default=0.1, help="Share of the steps in which the rate rises.", check=between(0, 1))
    patience: int | None = option(
        default=None, help="Stop after this many epochs without gain; none: never.", check=ge(1)
    )
    restore_best: bool = option(default=True, help="End on the weights of the best epoch.")

    @hookimpl
    def finetune_strategy(self) -> Iterable[Step]:
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
    """Train the head on a frozen backbone (linear probing by gradient descent)."""

    epochs: int = option(default=5, help="Epochs with the head trained.", check=ge(1))
    lr: float = option(default=2e-3, help="Peak learning rate.", check=gt(0))
    patience: int | None = option(
        default=None, help="Stop after this many epochs without gain; none: never.", check=ge(1)
    )
    restore_best: bool = option(default=True, help="End on the weights of the best epoch.")

    @hookimpl
    def finetune_strategy(self) -> Iterable[Step]:
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

    The recipe is fastai's `fine_tune` (Howard and Gugger 2020): a head phase at `lr` under one-cycle with
    pct_start 0.99; then all layers under one-cycle with pct_start 0.3 and div 5, at `lr / 2` for the head down to
    `lr / 2 / lr_mult` for the first layer group, geometric in between; weight decay 0.01.
    """

    head_epochs: int = option(default=1, help="Epochs with the backbone frozen.", check=ge(1))
    epochs: int = option(default=8, help="Epochs with every layer trained.", check=ge(1))
    lr: float = option(default=2e-3, help="Peak learning rate of the head while the backbone is frozen.", check=gt(0))
    lr_mult: float = option(default=100.0, help="Rate of the head over that of the first layer group.", check=ge(1))
    patience: int | None = option(default=None, help="Stop a phase after this many epochs without gain.", check=ge(1))
    restore_best: bool = option(default=True, help="End each phase on the weights of its best epoch.")

    @hookimpl
    def finetune_strategy(self, brief: Brief) -> Iterable[Step]:
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
                train="all",
                epochs=self.epochs,
                lr=self.lr / 2,
                layer_decay=self.lr_mult ** (-1 / max(1, len(brief.groups) - 1)),
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
    def finetune_strategy(self, brief: Brief) -> Iterator[Step]:
        """One phase for each number of thawed groups."""
        for thawed in range(1, len(brief.groups) + 1):
            last = thawed == len(brief.groups)
            yield Phase(
                "all" if last else f"top-{thawed}",
                train=f"groups[-{thawed}:]",
                epochs=self.epochs if last else self.group_epochs,
                lr=self.lr,
                layer_decay=1 / self.factor,
                schedule=use("slanted-triangular"),
                restore_best=self.restore_best,
            )
