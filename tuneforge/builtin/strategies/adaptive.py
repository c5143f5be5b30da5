"""`adaptive`: a strategy that chooses each round from the validation metrics of the round before.

It imports no torch, so that `tuneforge run --strategy adaptive --help` shows its options at once.
"""

from __future__ import annotations

import math
from typing import ClassVar

from tuneforge import (
    HeadFit,
    Phase,
    StrategyStepResult,
    TaskInfo,
    WeightAverage,
    component,
    ge,
    gt,
    hookimpl,
    option,
    use,
)
from tuneforge.builtin.strategies.fixed import choose_batchnorm_stats, default_lr, least_epochs
from tuneforge.plugin import StrategyStep, StrategySteps

MIN_LOSS_DECREASE = 0.02
"""Relative decrease of the validation loss that counts as an improvement where the metric is inconclusive."""


@component(api=1)
class Adaptive:
    """Fine-tune in rounds and choose each from the validation metrics of the one before: a good first choice.

    The head comes first: solved on frozen features where it is one linear layer and there are classes (Kumar et al.
    2022, 2202.10054), else trained. Then come rounds of `epochs` epochs with a cosine schedule: the upper half of the
    layer groups, then all of them. After each round:

    - If it improved, its weights are kept, and the next round unfreezes more layer groups or continues.
    - If it did not, the best weights are restored, and once all groups are unfrozen the learning rate is divided by 3.
    - If a class's recall is two standard errors below the mean recall, its samples get the loss weight
      mean / recall, at most 3, in the next round.
    - At the end the weights are averaged with those of the head's round in equal parts, if that is no worse on
      validation (WiSE-FT, Wortsman et al. 2022, 2109.01903), and refitted on training and validation samples
      (`--refit`).
    - If the target is met, or two rounds in a row with all groups unfrozen did not improve, the run ends on the best
      weights.

    An improvement is one of the monitored metric by more than its standard error on validation, sqrt(e (1 - e) / n) for
    an error e over n samples; within that, the loss must have decreased by 2 %. Each step logs its reason.
    """

    refits: ClassVar[bool] = True

    target: float | None = option(default=None, help="Value of the monitored metric that ends the run; default: none.")
    epochs: int | None = option(
        default=None, help="Epochs per round; by default 6, or as many as 150 optimizer steps take.", check=ge(1)
    )
    rounds: int = option(default=3, help="Maximum number of rounds, that of the head included.", check=ge(1))
    lr: float | None = option(
        default=None,
        help="Peak learning rate of the first round; later ones may lower it. Default: 1e-3, with attention layers "
        "2e-4.",
        check=gt(0),
    )

    @hookimpl
    def finetune_strategy(self, task: TaskInfo) -> StrategySteps:
        """Yield the head step, then rounds until the target is met or nothing improves."""
        why = "improvements count from the metrics of the starting weights"
        best = yield WeightAverage("start-metrics", snapshots=("start",), why=why)
        widths = sorted({1, math.ceil(len(task.groups) / 2), len(task.groups)})
        lr, missed, number = self.lr or default_lr(task), 0, 0
        epochs, base = self.epochs or least_epochs(task, 6, steps=150), best
        while not (end := self._explain_stop(task, best, missed, number)):
            unfrozen = widths[min(number, len(widths) - 1)]
            head = make_head_step(task, epochs=epochs, lr=lr)
            report = yield self._make_round(task, number, unfrozen, lr, best, epochs) if number else head
            if is_better(report, best, task):
                best, missed = report, 0
            else:
                why = f"'{report.step_name}' did not improve: {format_comparison(report, best, task)}"
                yield WeightAverage(f"restore-{number}", snapshots=(best.step_name,), why=why)
                lr, missed = (lr / 3, missed + 1) if unfrozen == len(task.groups) else (lr, 0)
            base = best if number == 0 else base
            number += 1
        if best is base or not task.num_val:
            yield WeightAverage("final", snapshots=(best.step_name,), why=end)
        else:
            yield WeightAverage(
                "final", snapshots=(base.step_name, best.step_name), weights=(0.5, 0.75, 1.0, 0.25, 0.0), why=end
            )

    def _make_round(
        self, task: TaskInfo, number: int, unfrozen: int, lr: float, best: StrategyStepResult, epochs: int
    ) -> Phase:
        weak = weigh_weak_classes(best)
        all_unfrozen = unfrozen == len(task.groups)
        weighed = f"; larger loss weight for low recall: {', '.join(weak)}" if weak else ""
        return Phase(
            f"round-{number}",
            train="all" if all_unfrozen else f"groups[-{unfrozen}:]",
            epochs=epochs,
            lr=lr,
            layer_decay=10 ** (-1 / max(1, len(task.groups) - 1)),
            schedule=use("cosine", warmup=0.1),
            restore_best=True,
            batchnorm_stats=choose_batchnorm_stats(task),
            class_weights=weak or None,
            why=f"{task.monitor} is {best.val[task.monitor]:.4f}; train "
            f"{'all' if all_unfrozen else f'the upper {unfrozen}'} layer groups at lr {lr:.2g}{weighed}",
        )

    def _explain_stop(self, task: TaskInfo, best: StrategyStepResult, missed: int, number: int) -> str:
        """Return why the strategy ends, or an empty text where another round follows."""
        found = best.val[task.monitor]
        if self.target is not None and (found >= self.target if task.monitor_mode == "max" else found <= self.target):
            return f"the target is met: {task.monitor} is {found:.4f}"
        if missed == 2:
            return f"two rounds in a row did not improve on '{best.step_name}'"
        return f"the maximum of {number} rounds is reached" if number == self.rounds else ""


def make_head_step(task: TaskInfo, *, epochs: int, lr: float) -> StrategyStep:
    """Return a head fit where the head can be solved, else a phase."""
    why = "a fitted head distorts the pretrained features less"
    if task.can_fit_head:
        return HeadFit("head", why=why)
    return Phase(
        "head", train="head", epochs=epochs, lr=lr, schedule=use("cosine", warmup=0.1), restore_best=True, why=why
    )


def is_better(after: StrategyStepResult, before: StrategyStepResult, task: TaskInfo) -> bool:
    """Return True where a result is better by more than the standard error, or within it by its loss."""
    if is_within_error(after, before, task) and "loss" in after.val:
        return bool(after.val["loss"] < (1 - MIN_LOSS_DECREASE) * before.val["loss"])
    improvement = after.val[task.monitor] - before.val[task.monitor]
    return bool(improvement > 0 if task.monitor_mode == "max" else improvement < 0)


def is_within_error(after: StrategyStepResult, before: StrategyStepResult, task: TaskInfo) -> bool:
    """Return True where the monitored metrics differ by at most the standard error on validation."""
    old, new = before.val[task.monitor], after.val[task.monitor]
    error = min(1.0, max(0.0, 1 - old)) if task.monitor_mode == "max" else 0.0
    return bool(abs(new - old) <= math.sqrt(error * (1 - error) / task.num_val))


def format_comparison(after: StrategyStepResult, before: StrategyStepResult, task: TaskInfo) -> str:
    """Return the metrics that `is_better` compares, as text."""
    names = dict.fromkeys(name for name in (task.monitor, "loss") if name in after.val)
    return ", ".join(f"{name} {after.val[name]:.4f} after {before.val[name]:.4f}" for name in names)


def weigh_weak_classes(report: StrategyStepResult) -> dict[str, float]:
    """Return loss weights for the classes whose recall is two standard errors below the mean recall."""
    if not {"confusion", "largest_confusions"} & report.val.keys():  # regression or multi-label
        return {}
    recalls = {name: row["recall"] for name, row in report.val["per_class"].items() if row["support"]}
    mean = sum(recalls.values()) / max(1, len(recalls))
    errors = {name: math.sqrt(mean * (1 - mean) / report.val["per_class"][name]["support"]) for name in recalls}
    return {
        name: min(3.0, mean / max(recall, 1e-9)) for name, recall in recalls.items() if recall < mean - 2 * errors[name]
    }
