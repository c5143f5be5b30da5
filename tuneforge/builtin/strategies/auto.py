"""`auto`: diagnose which layer group a distribution shift concerns, and fine-tune that one.

It imports no torch, so that `tuneforge run --strategy auto --help` shows its options at once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

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
from tuneforge.builtin.strategies.fixed import choose_batchnorm_stats, has_random_head_rows, least_epochs
from tuneforge.plugin import Diagnostics, StrategySteps


@component(api=1)
class Auto:
    """Diagnose the distribution shift, fine-tune each candidate layer group from the same weights, and keep the best.

    Surgical fine-tuning (Lee et al. 2023, arXiv 2210.11466) trains one block: the first for a shift of the inputs, the
    head for a shift of the labels. The block is diagnosed on the labeled target samples, then checked on validation:

    - Confusion: where a permutation of the predicted classes would be more accurate by more than two standard errors,
      the head comes first.
    - Feature drift: the lowest block whose features on validation differ from those on training, by three times what
      is expected by chance, comes next.
    - Gradients: the other blocks follow by relative gradient norm |g| / |w|, the mean over `batches` batches.

    The first `candidates` of these are fine-tuned, each from the same weights, and compared as in `adaptive`. The best
    is averaged with the starting weights in the proportion with the lowest validation loss (WiSE-FT, Wortsman et al.
    2022, 2109.01903). Last, all layers train from there at a tenth of the learning rate, and the result is kept if it
    improves. Randomly initialized rows of the head are fitted first, and the steps are repeated on training and
    validation samples at the end (`--refit`).
    """

    refits: ClassVar[bool] = True

    candidates: int = option(default=2, help="Number of layer groups to try.", check=ge(1))
    epochs: int | None = option(
        default=None,
        help="Epochs for each candidate; by default 4, or as many as 100 optimizer steps take.",
        check=ge(1),
    )
    lr: float = option(default=1e-2, help="Peak learning rate for each candidate.", check=gt(0))
    then_all: bool = option(default=True, help="Train all layers from there, and keep the result if it improves.")
    batches: int = option(default=5, help="Training batches for each diagnosis.", check=ge(1))

    @hookimpl
    def finetune_strategy(self, task: TaskInfo) -> StrategySteps:
        """Yield the diagnoses, a phase for each candidate, and the average with the best."""
        epochs = self.epochs or least_epochs(task, 4, steps=100)
        if has_random_head_rows(task):
            start = yield make_head_step(task, epochs=epochs, lr=self.lr)
        else:
            start = yield WeightAverage(
                "start-metrics",
                snapshots=("start",),
                why="their confusion shows the kind of shift",
            )
        options: dict[str, Any] = {
            "epochs": epochs,
            "schedule": use("cosine", warmup=0.1),
            "restore_best": True,
            "batchnorm_stats": choose_batchnorm_stats(task),
        }
        gradients = yield Diagnosis("gradients", batches=self.batches, why="rank layer groups by gradient norm")
        drift = yield Diagnosis(
            "feature-drift", measure="features", batches=self.batches, why="compare features of training and validation"
        )
        ranked = [start]
        for block, why in rank_blocks(task, start, gradients, drift, self.batches)[: self.candidates]:
            if len(ranked) > 1:
                again = "every candidate starts from the same weights"
                yield WeightAverage(f"restore-before-{block}", snapshots=(start.step_name,), why=again)
            index = [group.name for group in task.groups].index(block)
            phase = Phase(f"{block}-only", train=f"groups[{index}]", lr=self.lr, why=why, **options)
            report = yield phase
            place = next((place for place, each in enumerate(ranked) if is_better(report, each, task)), len(ranked))
            ranked.insert(place, report)
        found = yield select_best(task, start, ranked)
        if self.then_all:
            why = "check whether other layers improve the result"
            report = yield Phase("all", lr=self.lr / 10, why=why, **options)
            if not is_better(report, found, task):
                why = f"they do not: {format_comparison(report, found, task)}"
                yield WeightAverage("final", snapshots=(found.step_name,), why=why)


def rank_blocks(
    task: TaskInfo, before: StrategyStepResult, gradients: Diagnostics, feature_drift: Diagnostics, batches: int
) -> Sequence[tuple[str, str]]:
    """Return the candidate layer groups in the order in which they are tried, each with the reason."""
    found: dict[str, str] = {}
    right, renamed, error = accuracy_after_relabeling(before, task.classes)
    if renamed - right > 2 * error:
        found[task.head.name] = f"relabeling the predictions would raise accuracy from {right:.2f} to {renamed:.2f}"
    seen = [min(batches * task.batch_size, count) for count in (task.num_train, task.num_val)]
    chance = math.sqrt(2 / math.pi * (1 / seen[0] + 1 / seen[1]))
    for block, value in feature_drift.values.items():
        if block in gradients.values and value > 3 * chance:
            found.setdefault(block, f"lowest group with feature drift: {value:.2f} stds, {chance:.2f} by chance")
            break
    for block, value in sorted(gradients.values.items(), key=lambda pair: -pair[1]):
        found.setdefault(block, f"relative gradient norm {value:.3g}")
    return list(found.items())


def accuracy_after_relabeling(report: StrategyStepResult, classes: Sequence[str]) -> tuple[float, float, float]:
    """Return accuracy, accuracy after the best relabeling of predictions, and its standard error; 0 if no classes."""
    cells = _list_cells(report.val, classes)
    count = sum(number for _, _, number in cells)
    if "largest_confusions" in report.val:  # rare confusions are left out there
        count = sum(row["support"] for row in report.val["per_class"].values())
    if not count:
        return 0.0, 0.0, 0.0
    best: dict[int, int] = {}
    for _, prediction, number in cells:
        best[prediction] = max(best.get(prediction, 0), number)
    right = sum(number for label, prediction, number in cells if label == prediction) / count
    renamed = sum(best.values()) / count
    return right, renamed, math.sqrt(renamed * (1 - renamed) / count)


def _list_cells(metrics: Mapping[str, Any], classes: Sequence[str]) -> list[tuple[int, int, int]]:
    """Return label, prediction and samples of each known cell of the confusion matrix."""
    if "largest_confusions" in metrics:
        rows = [metrics["per_class"][name] for name in classes]
        diagonal = [(place, place, round(row["recall"] * row["support"])) for place, row in enumerate(rows)]
        return [*diagonal, *metrics["largest_confusions"]]
    matrix = metrics.get("confusion", ())
    return [(label, place, number) for label, row in enumerate(matrix) for place, number in enumerate(row)]


def select_best(task: TaskInfo, start: StrategyStepResult, ranked: Sequence[StrategyStepResult]) -> WeightAverage:
    """Return the average of the starting weights with the best result; `ranked` lists the best first."""
    best, second = ranked[:2]
    why = f"'{best.step_name}' is best on validation, {format_comparison(best, second, task)} of '{second.step_name}'"
    if best is start:
        return WeightAverage("best-block", snapshots=(start.step_name,), why=f"no layer group improves: {why}")
    shares = (0.0, 0.25, 0.5, 0.75, 1.0)
    monitor = {"monitor": "loss", "monitor_mode": "min"} if "loss" in best.val else {}
    return WeightAverage("best-block", snapshots=(start.step_name, best.step_name), weights=shares, why=why, **monitor)
