"""Strategies whose steps are known before the run starts.

They import no torch, so that `tuneforge run --strategy NAME --help` shows their options at once.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any, ClassVar

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

_MANY_SAMPLES = 5000
_MAX_SOLVER_WORK = 10**8  # training samples times parameters of the head: a minute on one core


def _patience() -> Any:
    return option(
        default=None, help="Stop a phase after this many epochs without improvement; default: never.", check=ge(1)
    )


def _l2() -> Any:
    return option(
        default=None,
        help="L2 penalty of the solved head, relative to the mean loss; default: chosen for the data.",
        check=gt(0),
    )


def _cosine_phase(
    options: Any, name: str, train: str | tuple[str, ...], *, warmup: float = 0.1, layer_decay: float = 1.0
) -> Phase:
    """Return a phase with a linear warm-up and a cosine, and the options that most strategies share."""
    return Phase(
        name,
        train=train,
        epochs=options.epochs,
        lr=options.lr,
        layer_decay=layer_decay,
        schedule=use("cosine", warmup=warmup),
        patience=options.patience,
        restore_best=options.restore_best,
    )


@component(api=1)
class Full:
    """Train every layer from the first step.

    The baseline for the other strategies. The learning rate rises linearly over the fraction `warmup` of the steps,
    then follows a cosine to 0; biases and norm parameters have no weight decay.
    """

    epochs: int = option(default=8, help="Epochs with every layer trained.", check=ge(1))
    lr: float = option(default=1e-3, help="Peak learning rate.", check=gt(0))
    warmup: float = option(default=0.1, help="Fraction of the steps for the linear warm-up.", check=between(0, 1))
    patience: int | None = _patience()
    restore_best: bool = option(default=True, help="End on the weights of the best epoch.")

    @hookimpl
    def finetune_strategy(self) -> Iterable[StrategyStep]:
        """Return one phase over all layers."""
        return [_cosine_phase(self, "all", "all", warmup=self.warmup)]


@component(api=1)
class HeadOnly:
    """Train the head on a frozen backbone, by gradient descent (a linear probe: Alain and Bengio 2016, 1610.01644).

    Warm-up over 10 % of the steps, then a cosine. `HeadFit`, the first step of `lp-ft`, solves the same problem to
    convergence, without a learning rate.
    """

    epochs: int = option(default=5, help="Epochs with the head trained.", check=ge(1))
    lr: float = option(default=2e-3, help="Peak learning rate.", check=gt(0))
    patience: int | None = _patience()
    restore_best: bool = option(default=True, help="End on the weights of the best epoch.")

    @hookimpl
    def finetune_strategy(self) -> Iterable[StrategyStep]:
        """Return one phase over the head."""
        return [_cosine_phase(self, "head", "head")]


@component(api=1)
class FreezeThenUnfreeze:
    """Fit the head on a frozen backbone, then train every layer, and average the weights of both.

    The default. Its phases are those of fastai's `fine_tune` (Howard and Gugger 2020, 2002.04688), made for few labels:

    1. The head alone. Where it is one linear layer it is solved to convergence, as in LP-FT (Kumar et al. 2022,
       2202.10054), and a head that came with these classes stays if it is better on validation; other heads are
       trained under one-cycle, pct_start 0.99.
    2. All layers under one-cycle, pct_start 0.3, from `lr` at the head geometrically to `lr / lr_mult` at the first
       group; 8 epochs, and more of few samples, until there are 200 optimizer steps. With fewer than 5,000 samples
       BatchNorm keeps its running statistics, because those of small batches are noise.
    3. The average of the weights of both with the best metric on validation (WiSE-FT, Wortsman et al. 2022,
       2109.01903), in quarters. Among equal ones half and half comes first, and the head alone last: as a candidate it
       keeps the result from falling below it on validation.

    A refit on training and validation samples follows (`--refit`).
    """

    refits: ClassVar[bool] = True

    head_epochs: int | None = option(
        default=None,
        help="Epochs with the backbone frozen; by default the head is solved where it can be, else as many as "
        "200 optimizer steps take.",
        check=ge(1),
    )
    epochs: int | None = option(
        default=None,
        help="Epochs with every layer trained; by default 8, or as many as 200 optimizer steps take.",
        check=ge(1),
    )
    lr: float | None = option(
        default=None, help="Peak learning rate of the head; default: 1e-3, with attention layers 2e-4.", check=gt(0)
    )
    lr_mult: float = option(
        default=10.0, help="Learning rate of the head divided by that of the first layer group.", check=ge(1)
    )
    average: bool = option(default=True, help="Average the weights of both phases; otherwise end on those of the last.")
    patience: int | None = _patience()
    restore_best: bool = option(default=False, help="End each phase on the weights of its best epoch.")

    @hookimpl
    def finetune_strategy(self, task: TaskInfo) -> Iterable[StrategyStep]:
        """Return the head fit or a phase over the head, one phase over all layers, and their average."""
        lr = self.lr or default_lr(task)
        steps = self._make_head_steps(task, lr)
        steps += [
            Phase(
                "all",
                epochs=self.epochs or least_epochs(task, 8),
                lr=lr,
                layer_decay=self.lr_mult ** (-1 / max(1, len(task.groups) - 1)),
                schedule=use("one-cycle", pct_start=0.3, div=5.0),
                weight_decay=0.01,
                patience=self.patience,
                restore_best=self.restore_best,
                batchnorm_stats=choose_batchnorm_stats(task),
            ),
        ]
        if self.average and task.num_val:
            weights = (0.5, 0.75, 1.0, 0.25, 0.0)
            steps.append(WeightAverage("average", snapshots=(steps[-2].name, "all"), weights=weights))
        return steps

    def _make_head_steps(self, task: TaskInfo, lr: float) -> list[StrategyStep]:
        if self.head_epochs is None and is_head_solved(task):
            # A module with as many outputs as classes may have a trained head or a randomly initialized one.
            compare = task.num_val and not has_random_head_rows(task)
            choice = WeightAverage("head-or-start", snapshots=("start", "head"), weights=(1.0, 0.0))
            return [HeadFit("head"), *([choice] if compare else [])]
        head = Phase(
            "head",
            train="head",
            epochs=self.head_epochs or least_epochs(task, 1),
            lr=lr,
            schedule=use("one-cycle", pct_start=0.99),
            weight_decay=0.01,
            patience=self.patience,
            restore_best=self.restore_best,
        )
        return [head]


@component(api=1)
class GradualUnfreeze:
    """Unfreeze one more layer group per phase, from the head towards the input, then train all of them.

    ULMFiT (Howard and Ruder 2018, arXiv 1801.06146): the learning rate of a group is that of the group above
    divided by 2.6, and follows a slanted triangular schedule in each phase.
    """

    group_epochs: int = option(default=1, help="Epochs before the next layer group is unfrozen.", check=ge(1))
    epochs: int = option(default=4, help="Epochs with every layer trained, at the end.", check=ge(1))
    lr: float = option(default=2e-3, help="Peak learning rate of the head.", check=gt(0))
    factor: float = option(
        default=2.6, help="Ratio of the learning rates of a layer group and the one below.", check=ge(1)
    )
    restore_best: bool = option(default=True, help="End each phase on the weights of its best epoch.")

    @hookimpl
    def finetune_strategy(self, task: TaskInfo) -> Iterable[StrategyStep]:
        """Return one phase for each number of unfrozen layer groups."""
        most = len(task.groups)
        return [
            Phase(
                "all" if unfrozen == most else f"top-{unfrozen}",
                train=f"groups[-{unfrozen}:]",
                epochs=self.epochs if unfrozen == most else self.group_epochs,
                lr=self.lr,
                layer_decay=1 / self.factor,
                schedule=use("slanted-triangular"),
                restore_best=self.restore_best,
            )
            for unfrozen in range(1, most + 1)
        ]


@component(api=1)
class LayerDecay:
    """Train every layer with layer-wise learning rate decay.

    The learning rate of a layer group is `lr * decay ** depth`, where the head has depth 0. The default of 0.75 is that
    of MAE's code (He et al. 2021, arXiv 2111.06377) and of timm, after BEiT, for each block of a transformer; ELECTRA
    (Clark et al. 2020, arXiv 2003.10555) uses 0.8 for its base model. A model with few layer groups needs a lower
    factor for the same range. Warm-up over 10 % of the steps, then a cosine; biases and norms have no weight decay.
    """

    epochs: int = option(default=8, help="Epochs with every layer trained.", check=ge(1))
    lr: float = option(default=1e-3, help="Peak learning rate of the head.", check=gt(0))
    decay: float = option(
        default=0.75, help="Ratio of the learning rates of a layer group and the one above.", check=_FACTOR
    )
    patience: int | None = _patience()
    restore_best: bool = option(default=True, help="End on the weights of the best epoch.")

    @hookimpl
    def finetune_strategy(self) -> Iterable[StrategyStep]:
        """Return one phase over all layers."""
        return [_cosine_phase(self, "all", "all", layer_decay=self.decay)]


@component(api=1)
class LPFT:
    """Solve the head on frozen features, then train every layer from there at a small learning rate.

    LP-FT (Kumar et al. 2022, arXiv 2202.10054): with a randomly initialized head, the pretrained features are distorted
    before the head fits them; with a solved head they hardly change. The first step computes (W, b) = argmin of
    mean loss + l2 / 2 * |W|^2 on features of the frozen backbone in eval mode, to convergence; the second trains all
    layers with a warm-up over 10 % of the steps and a cosine. The paper searches the learning rate; the default is a
    tenth of that of `full`. The head must be one linear layer.
    """

    l2: float | None = _l2()
    epochs: int = option(default=8, help="Epochs with every layer trained.", check=ge(1))
    lr: float = option(default=1e-4, help="Peak learning rate of the phase over all layers.", check=gt(0))
    patience: int | None = _patience()
    restore_best: bool = option(default=True, help="End on the weights of the best epoch.")

    @hookimpl
    def finetune_strategy(self) -> Iterable[StrategyStep]:
        """Return the head fit, then one phase over all layers."""
        return [
            HeadFit("head", l2=self.l2),
            _cosine_phase(self, "all", "all"),
        ]


@component(api=1)
class WiSEFT:
    """Train every layer, then keep the best interpolation of the weights before and after, chosen on validation.

    WiSE-FT (Wortsman et al. 2022, arXiv 2109.01903): (1 - a) * before + a * after for each tensor, running statistics
    of norms included. Candidates for a are 0, 0.1, ..., 1; the paper plots them as a curve, and recommends 0.5 where
    nothing can be measured. The weights before must have a working head, so a head with randomly initialized rows is
    solved first and the interpolation starts from there. A validation split from the training distribution favors
    a = 1: give it samples from the distribution that the model will see.
    """

    epochs: int = option(default=8, help="Epochs with every layer trained.", check=ge(1))
    lr: float = option(default=1e-3, help="Peak learning rate.", check=gt(0))
    weights: tuple[float, ...] = option(
        default=tuple(tenth / 10 for tenth in range(11)),
        help="Candidate weights of the fine-tuned model.",
        check=_SHARES,
    )
    solve_head: bool | None = option(
        default=None, help="Solve the head first; default: if it has randomly initialized rows."
    )
    l2: float | None = _l2()
    restore_best: bool = option(default=True, help="Average with the weights of the best epoch rather than the last.")

    @hookimpl
    def finetune_strategy(self, task: TaskInfo) -> Iterable[StrategyStep]:
        """Return the head fit where it is needed, one phase over all layers, and the weight average."""
        solve = has_random_head_rows(task) if self.solve_head is None else self.solve_head
        schedule = use("cosine", warmup=0.1)
        return [
            *([HeadFit("head", l2=self.l2)] if solve else []),
            Phase("all", epochs=self.epochs, lr=self.lr, schedule=schedule, restore_best=self.restore_best),
            WeightAverage("average", snapshots=("head" if solve else "start", "all"), weights=self.weights),
        ]


@component(api=1)
class NormOnly:
    """Train the affine parameters of norm layers, and the head; every other weight keeps its pretrained value.

    Frankle et al. 2021 (arXiv 2003.00152) train only the affine parameters of BatchNorm; here the head trains too,
    because its rows may be randomly initialized. A BatchNorm whose scale and shift both train normalizes with the batch
    and updates its running statistics, as in the paper; without affine parameters its statistics are frozen. Few
    parameters take a higher learning rate than all layers would. A model without norm parameters is an error.
    """

    epochs: int = option(default=8, help="Epochs.", check=ge(1))
    lr: float = option(default=1e-2, help="Peak learning rate.", check=gt(0))
    patience: int | None = _patience()
    restore_best: bool = option(default=True, help="End on the weights of the best epoch.")

    @hookimpl
    def finetune_strategy(self) -> Iterable[StrategyStep]:
        """Return one phase over norms and head."""
        return [_cosine_phase(self, "norms", ("norms", "head"))]


@component(api=1)
class BiasOnly:
    """Train every bias, and the head; every other weight keeps its pretrained value.

    BitFit (Ben Zaken et al. 2022, arXiv 2106.10199), with the biases of convolutions and norms included. The scale of a
    norm is frozen, so its running statistics are frozen and it normalizes with them. The authors search learning rates
    about ten times those of full fine-tuning, hence the default. A model without biases below its head is an error.
    """

    epochs: int = option(default=8, help="Epochs.", check=ge(1))
    lr: float = option(default=1e-2, help="Peak learning rate.", check=gt(0))
    patience: int | None = _patience()
    restore_best: bool = option(default=True, help="End on the weights of the best epoch.")

    @hookimpl
    def finetune_strategy(self, task: TaskInfo) -> Iterable[StrategyStep]:
        """Return one phase over biases and head.

        Raises:
            SelectorError: No tensor below the head is a bias.
        """
        if not any(name.rpartition(".")[2] == "bias" for group in task.backbone for name in group.parameter_names):
            raise _no_biases_error(task)
        return [_cosine_phase(self, "biases", ("biases", "head"))]


def is_head_solved(task: TaskInfo) -> bool:
    """Return True where the head can be solved, and so few samples and features do not take long."""
    return task.can_fit_head and task.num_train * task.head.num_parameters <= _MAX_SOLVER_WORK


def least_epochs(task: TaskInfo, epochs: int, *, steps: int = 200) -> int:
    """Return `epochs`, or for few samples the number that gives so many optimizer steps."""
    return max(epochs, math.ceil(steps / task.steps_per_epoch()))


def choose_batchnorm_stats(task: TaskInfo) -> str:
    """Return `"all-frozen"` for a pretrained model and few samples: statistics of small batches are noise."""
    return "all-frozen" if task.pretrained and task.num_train < _MANY_SAMPLES else "frozen"


def default_lr(task: TaskInfo) -> float:
    """Return 1e-3, or 2e-4 where the names of parameters are those of attention layers, which take lower ones."""
    names = (name for group in task.groups for name in group.parameter_names)
    return 2e-4 if any(re.search(r"attn|attention|in_proj_weight|q_proj", name) for name in names) else 1e-3


def has_random_head_rows(task: TaskInfo) -> bool:
    """Return True where the head has a row that is not pretrained."""
    return not task.old_classes or set(task.old_classes) != set(task.classes)


def _no_biases_error(task: TaskInfo) -> SelectorError:
    return SelectorError(
        "the model has no bias below its head",
        where=f"layer groups: {', '.join(group.name for group in task.backbone) or 'none but the head'}",
        why="only the head would train, as with head-only",
        fix="use --strategy head-only, or norm-only where the model has norms",
    )
