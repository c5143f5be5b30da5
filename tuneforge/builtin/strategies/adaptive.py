"""`adaptive`: the strategy that reads the report of each round and decides from it what comes next.

It imports no torch, so that `tuneforge run --strategy adaptive --help` shows its options at once.
"""

from __future__ import annotations

import math

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
from tuneforge.plugin import StrategyStep, StrategySteps

MIN_LOSS_DECREASE = 0.02
"""Share by which validation's loss must fall to count as a gain, where the monitored figure cannot tell."""


@component(api=1)
class Adaptive:
    """Tune in rounds, read the report of each, and decide from it what comes next: the one for a start.

    The head first: solved on frozen features where it is one linear layer and there are classes (Kumar et al. 2022,
    2202.10054), else trained. Then rounds of `epochs` along a cosine: the upper half of the layer groups, then all.
    After each, from its validation report:

    - It gained: its weights are kept, and the next round thaws more, or goes on as before.
    - It did not: the best weights come back, and the rate falls to a third, once everything has been thawed.
    - A class's recall lies two standard errors below the mean of all: in the next round its samples weigh more, by
      mean / recall and at most 3.
    - The target is met, or two rounds in a row have gained nothing with all thawed: it ends, on the best weights.

    A gain is one of the monitored figure by more than validation's standard error, sqrt(e (1 - e) / n) of an error e
    over n samples; where the figures lie nearer, the loss must have fallen by 2 %. Each step says why it is taken.
    """

    target: float | None = option(default=None, help="Value of the monitored figure that ends the run; none: no end.")
    epochs: int = option(default=10, help="Epochs of a round.", check=ge(1))
    rounds: int = option(default=9, help="Most rounds, the head's included.", check=ge(1))
    lr: float = option(default=3e-3, help="Peak learning rate of the first round; reports lower it.", check=gt(0))

    @hookimpl
    def finetune_strategy(self, task: TaskInfo) -> StrategySteps:
        """The head, then rounds until the target is met or nothing is gained."""
        why = "gains count from what the model answers untuned"
        best = yield WeightAverage("before", snapshots=("start",), why=why)
        widths = sorted({1, math.ceil(len(task.groups) / 2), len(task.groups)})
        lr, missed, number = self.lr, 0, 0
        while not (end := self._explain_stop(task, best, missed, number)):
            thawed = widths[min(number, len(widths) - 1)]
            head = make_head_step(task, epochs=self.epochs, lr=lr)
            report = yield self._make_round(task, number, thawed, lr, best) if number else head
            if is_better(report, best, task):
                best, missed = report, 0
            else:
                why = f"'{report.step_name}' gained nothing: {format_comparison(report, best, task)}"
                yield WeightAverage(f"back-{number}", snapshots=(best.step_name,), why=why)
                lr, missed = (lr / 3, missed + 1) if thawed == len(task.groups) else (lr, 0)
            number += 1
        yield WeightAverage("end", snapshots=(best.step_name,), why=end)

    def _make_round(self, task: TaskInfo, number: int, thawed: int, lr: float, best: StrategyStepResult) -> Phase:
        weak = weigh_weak_classes(best)
        all_thawed = thawed == len(task.groups)
        weighed = f"; low recall, so they weigh more: {', '.join(weak)}" if weak else ""
        return Phase(
            f"round-{number}",
            train="all" if all_thawed else f"groups[-{thawed}:]",
            epochs=self.epochs,
            lr=lr,
            schedule=use("cosine", warmup=0.1),
            restore_best=True,
            class_weights=weak or None,
            why=f"{task.monitor} is {best.val[task.monitor]:.4f}, and more may be gained with "
            f"{'all' if all_thawed else f'the upper {thawed}'} layer groups at rate {lr:.2g}{weighed}",
        )

    def _explain_stop(self, task: TaskInfo, best: StrategyStepResult, missed: int, number: int) -> str:
        """Why no further round is taken; empty where one is."""
        found = best.val[task.monitor]
        if self.target is not None and (found >= self.target if task.monitor_mode == "max" else found <= self.target):
            return f"the target is met: {task.monitor} is {found:.4f}"
        if missed == 2:
            return f"two rounds in a row gained nothing, so '{best.step_name}' is as good as it gets"
        return f"all {number} rounds are spent" if number == self.rounds else ""


def make_head_step(task: TaskInfo, *, epochs: int, lr: float) -> StrategyStep:
    """What brings the head to the data: a solution where it is one linear layer with a bias, else a phase."""
    why = "a head that fits spares the features below it"
    kinds = sorted(name.rpartition(".")[2] for name in task.head.parameter_names)
    if task.classes and kinds == ["bias", "weight"]:
        return HeadFit("head", why=why)
    return Phase(
        "head", train="head", epochs=epochs, lr=lr, schedule=use("cosine", warmup=0.1), restore_best=True, why=why
    )


def is_better(after: StrategyStepResult, before: StrategyStepResult, task: TaskInfo) -> bool:
    """True where a report is better by more than validation's standard error, or by its loss where it lies nearer."""
    if is_within_error(after, before, task) and "loss" in after.val:
        return bool(after.val["loss"] < (1 - MIN_LOSS_DECREASE) * before.val["loss"])
    gain = after.val[task.monitor] - before.val[task.monitor]
    return bool(gain > 0 if task.monitor_mode == "max" else gain < 0)


def is_within_error(after: StrategyStepResult, before: StrategyStepResult, task: TaskInfo) -> bool:
    """True where the monitored figures lie within validation's standard error of one another, or are equal."""
    old, new = before.val[task.monitor], after.val[task.monitor]
    error = min(1.0, max(0.0, 1 - old)) if task.monitor_mode == "max" else 0.0
    return bool(abs(new - old) <= math.sqrt(error * (1 - error) / task.num_val))


def format_comparison(after: StrategyStepResult, before: StrategyStepResult, task: TaskInfo) -> str:
    """The figures that `is_better` compares, as text."""
    names = dict.fromkeys(name for name in (task.monitor, "loss") if name in after.val)
    return ", ".join(f"{name} {after.val[name]:.4f} after {before.val[name]:.4f}" for name in names)


def weigh_weak_classes(report: StrategyStepResult) -> dict[str, float]:
    """Factors on the loss by class, for those whose recall lies two standard errors below the mean of all."""
    if "confusion" not in report.val:  # no classes, or several a sample
        return {}
    recalls = {name: row["recall"] for name, row in report.val["per_class"].items() if row["support"]}
    mean = sum(recalls.values()) / max(1, len(recalls))
    errors = {name: math.sqrt(mean * (1 - mean) / report.val["per_class"][name]["support"]) for name in recalls}
    return {
        name: min(3.0, mean / max(recall, 1e-9)) for name, recall in recalls.items() if recall < mean - 2 * errors[name]
    }
