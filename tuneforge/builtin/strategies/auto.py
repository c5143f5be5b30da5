"""`auto`: find out which block of layers the shift of the data concerns, and tune that one.

It imports no torch, so that `tuneforge run --strategy auto --help` shows its options at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from tuneforge import (
    Diagnosis,
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
from tuneforge.builtin.strategies.adaptive import format_comparison, is_better, make_head_step
from tuneforge.builtin.strategies.fixed import has_random_head_rows
from tuneforge.plugin import Diagnostics, StrategySteps


@component(api=1)
class Auto:
    """Diagnose what has shifted, tune each block that it may concern from the same start, and keep the best of them.

    Surgical fine-tuning (Lee et al. 2023, arXiv 2210.11466) tunes one block: the first for a shift of the inputs, the
    head for one of the answers. Which one is diagnosed on the labelled target samples, then checked by validation:

    - Confusion: where naming each answer anew would make it right, by more than two standard errors, the head leads.
    - Drift: the lowest block whose features on validation lie off those on training, three times as far as chance
      would have it, comes next.
    - Gradients: the other blocks follow by relative gradient norm |g| / |w|, mean over `batches` batches.

    The first `candidates` of these are tuned, each from the same weights, and compared as `adaptive` compares. The best
    is mixed with the start in the share that validation's loss prefers (WiSE-FT, Wortsman et al. 2022, 2109.01903).
    Last, all layers train from there at a tenth of the rate, which is kept where it gains: was the block enough? Fresh
    rows of the head are brought to the data first.
    """

    candidates: int = option(default=4, help="Blocks that are tried.", check=ge(1))
    epochs: int = option(default=20, help="Epochs of each.", check=ge(1))
    lr: float = option(default=1e-2, help="Peak learning rate of each.", check=gt(0))
    then_all: bool = option(default=True, help="Train all layers from there, and keep that where it gains.")
    batches: int = option(default=5, help="Training batches that a measurement looks at.", check=ge(1))

    @hookimpl
    def finetune_strategy(self, task: TaskInfo) -> StrategySteps:
        """The measurements, a phase for each candidate, and the way back to the best."""
        if has_random_head_rows(task):
            start = yield make_head_step(task, epochs=self.epochs, lr=self.lr)
        else:
            start = yield WeightAverage(
                "before", snapshots=("start",), why="what goes wrong untuned tells what has shifted"
            )
        gradients = yield Diagnosis("gradients", batches=self.batches, why="which block do the samples pull at?")
        drift = yield Diagnosis(
            "drift", measure="features", batches=self.batches, why="do validation and training differ?"
        )
        ranked = [start]
        for block, why in rank_blocks(task, start, gradients, drift, self.batches)[: self.candidates]:
            if len(ranked) > 1:
                again = "every block is tried from the same weights"
                yield WeightAverage(f"before-{block}", snapshots=(start.step_name,), why=again)
            index = [group.name for group in task.groups].index(block)
            report = yield self._make_phase(f"{block}-only", train=f"groups[{index}]", lr=self.lr, why=why)
            place = next((place for place, each in enumerate(ranked) if is_better(report, each, task)), len(ranked))
            ranked.insert(place, report)
        found = yield select_best(task, start, ranked)
        if self.then_all:
            why = "is the block all that has shifted?"
            report = yield self._make_phase("all", train="all", lr=self.lr / 10, why=why)
            if not is_better(report, found, task):
                why = f"it is: {format_comparison(report, found, task)}"
                yield WeightAverage("end", snapshots=(found.step_name,), why=why)

    def _make_phase(self, name: str, *, train: str, lr: float, why: str) -> Phase:
        schedule = use("cosine", warmup=0.1)
        return Phase(name, train=train, epochs=self.epochs, lr=lr, schedule=schedule, restore_best=True, why=why)


def rank_blocks(
    task: TaskInfo, before: StrategyStepResult, gradients: Diagnostics, feature_drift: Diagnostics, batches: int
) -> Sequence[tuple[str, str]]:
    """Blocks in the order in which they deserve a trial, each with the reason."""
    found: dict[str, str] = {}
    right, renamed, error = accuracy_after_relabeling(before)
    if renamed - right > 2 * error:
        found[task.head.name] = f"naming answers anew would bring accuracy from {right:.2f} to {renamed:.2f}"
    seen = [min(batches * task.batch_size, count) for count in (task.num_train, task.num_val)]
    chance = math.sqrt(2 / math.pi * (1 / seen[0] + 1 / seen[1]))
    for block, value in feature_drift.values.items():
        if block in gradients.values and value > 3 * chance:
            found.setdefault(block, f"the lowest whose features drift: {value:.2f} deviations, {chance:.2f} by chance")
            break
    for block, value in sorted(gradients.values.items(), key=lambda pair: -pair[1]):
        found.setdefault(block, f"its relative gradient norm is {value:.3g}")
    return list(found.items())


def accuracy_after_relabeling(report: StrategyStepResult) -> tuple[float, float, float]:
    """Accuracy as it is, after the best renaming of each answer, and the latter's standard error; 0 without classes."""
    confusion = report.val.get("confusion", ())
    count = sum(map(sum, confusion))
    if not count:
        return 0.0, 0.0, 0.0
    right = sum(row[place] for place, row in enumerate(confusion)) / count
    renamed = sum(map(max, zip(*confusion, strict=True))) / count
    return right, renamed, math.sqrt(renamed * (1 - renamed) / count)


def select_best(task: TaskInfo, start: StrategyStepResult, ranked: Sequence[StrategyStepResult]) -> WeightAverage:
    """The way to the best of some reports, which come best first, mixed with the start in the share that pays."""
    best, second = ranked[:2]
    why = f"'{best.step_name}' is best on validation, {format_comparison(best, second, task)} of '{second.step_name}'"
    if best is start:
        return WeightAverage("chosen", snapshots=(start.step_name,), why=f"no block gains anything: {why}")
    shares = (0.0, 0.25, 0.5, 0.75, 1.0)
    monitor = {"monitor": "loss", "monitor_mode": "min"} if "loss" in best.val else {}
    return WeightAverage("chosen", snapshots=(start.step_name, best.step_name), weights=shares, why=why, **monitor)
