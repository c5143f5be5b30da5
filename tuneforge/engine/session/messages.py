"""What a run says about itself, as sentences and lines of numbers; the engine and the command line share them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tuneforge.engine.data.dataset import Data
from tuneforge.engine.loop.metric_set import scalar_metrics
from tuneforge.engine.model.model import Model
from tuneforge.engine.storage.checkpoint import Checkpoints
from tuneforge.plugin.results import AnyStrategyStepResult, Diagnostics, StrategyStepResult
from tuneforge.plugin.steps import Diagnosis, HeadFit, Phase, StrategyStep, WeightAverage


def format_run(run_dir: Path, world_size: int, *, shard: bool) -> Iterable[str]:
    """Where the run writes, and how many processes it has."""
    yield f"run: {run_dir}"
    if world_size > 1:
        yield f"ranks: {world_size} processes, each with its share of every batch"
    elif shard:
        yield "note: one process holds the whole model; --shard splits it among those that torchrun starts"


def format_data(data: Data) -> Iterable[str]:
    """What the data is: sizes, kinds, and its own notes."""
    sizes = ", ".join(f"{len(split):,} {name}" for name, split in data.splits().items())
    yield f"data: {sizes}"
    labels = data.targets.labels
    if labels:
        yield f"classes ({len(labels)}): {join_names(labels)}"
    yield from (f"note: {note}" for note in data.notes)


def format_model(model: Model) -> Iterable[str]:
    """What the model is: size, layer groups, and what adapters changed."""
    infos = model.group_infos()
    total = sum(info.num_parameters for info in infos)
    groups = ", ".join(f"{info.name} {info.num_parameters:,}" for info in infos)
    name = type(model.module).__name__
    yield f"model: {name}, {total:,} parameters in {len(infos)} layer groups ({truncate_text(groups)})"
    yield from (f"adapted: {change}" for change in model.changes)


def format_step(step: StrategyStep) -> str:
    """One line that says what a step will do."""
    if isinstance(step, Phase):
        return f"phase '{step.name}': {', '.join(_phase_details(step))}"
    if isinstance(step, HeadFit):
        return f"head-fit '{step.name}': solve the head on frozen features, l2 {step.l2:g}"
    if isinstance(step, Diagnosis):
        return f"diagnosis '{step.name}': measure {step.measure} on {step.batches} batches, train nothing"
    assert isinstance(step, WeightAverage)
    if len(step.snapshots) == 1:
        return f"weight-average '{step.name}': go back to '{step.snapshots[0]}'"
    return (
        f"weight-average '{step.name}': mix {' and '.join(step.snapshots)}, best of {len(step.weights)} on validation"
    )


def format_epoch(entry: Mapping[str, Any], primary_metrics: Iterable[str]) -> str:
    """One epoch's numbers on a line."""
    val = entry["val"]
    figures = "  ".join(f"{name} {val[name]:.4f}" for name in primary_metrics if name in val)
    best = "  best" if entry["best"] else ""
    return (
        f"  epoch {entry['epoch']:>3}  {entry['seconds']:6.1f} s  lr {entry['lr']:.1e}  "
        f"loss {entry['train']['loss']:.4f}  val: {figures}{best}"
    )


def format_step_result(result: AnyStrategyStepResult) -> Iterable[str]:
    """How a step ended and why."""
    if isinstance(result, Diagnostics):
        values = ", ".join(f"{key} {value:.4g}" for key, value in result.values.items())
        yield f"  measured: {truncate_text(values)}"
        return
    assert isinstance(result, StrategyStepResult)
    yield f"  ended: {result.reason}"
    if result.num_frozen and result.num_trainable:
        unchanged = f"{result.num_frozen:,} frozen parameters unchanged to the bit"
        yield f"  proved: {unchanged}, {result.num_trainable:,} trained"
    if result.skipped_steps:
        steps = join_names(map(str, result.skipped_steps))
        yield f"  warning: steps that were left out, because a loss or a gradient was no number: {steps}"
    if result.never_updated:
        yield f"  warning: never received a gradient worth a move: {join_names(result.never_updated)}"


def format_checkpoints(checkpoints: Checkpoints) -> Iterable[str]:
    """How many checkpoints were saved, and what one cost."""
    if checkpoints.num_saved:
        cost_ms = 1000 * checkpoints.spent_s / checkpoints.num_saved
        yield f"checkpoints: {checkpoints.num_saved}, {cost_ms:.0f} ms each"


def format_metrics(splits: Mapping[str, Mapping[str, Any]], primary_metrics: Iterable[str]) -> Iterable[str]:
    """The figures of every split on a line each, then the test split by class with the worst class named."""
    names = list(primary_metrics)
    width = max(len(name) for name in splits)
    for split, figures in splits.items():
        numbers = scalar_metrics(figures)
        shown = [name for name in names if name in numbers] or list(numbers)[:4]
        yield f"{split:<{width}}  " + "  ".join(f"{name} {numbers[name]:.4f}" for name in shown)
    yield from _format_per_class(splits.get("test", {}))


def join_names(names: Iterable[str], max_names: int = 12) -> str:
    """Names joined by commas; of many only the first and how many more."""
    listed = list(names)
    more = f", and {len(listed) - max_names} more" if len(listed) > max_names else ""
    return ", ".join(listed[:max_names]) + more


def truncate_text(text: str, max_chars: int = 240) -> str:
    """Text cut at `max_chars` characters."""
    return text if len(text) <= max_chars else text[: max_chars - 4] + " ..."


def _phase_details(phase: Phase) -> Iterable[str]:
    yield f"train {' and '.join(phase.train)}"
    yield f"{phase.epochs} epoch(s)" if phase.epochs else f"{phase.steps} step(s)"
    yield f"lr {phase.lr:g}"
    if phase.layer_decay != 1:
        yield f"layer decay {phase.layer_decay:.3g}"
    if phase.lr_scales:
        yield f"{len(phase.lr_scales)} lr factor(s)"
    if phase.schedule:
        yield f"schedule {phase.schedule.name}"
    if phase.class_weights is not None:
        yield "classes weighed"
    if phase.sampling is not None:
        yield "classes drawn as asked"
    if phase.mixture_weights:
        yield "mix " + ", ".join(f"{share:.0%} {name}" for name, share in phase.mixture_weights.items())
    if phase.patience is not None:
        yield f"patience {phase.patience}"
    if phase.restore_best:
        yield "restore best"


def _format_per_class(metrics: Mapping[str, Any]) -> Iterable[str]:
    per_class = metrics.get("per_class")
    if not per_class:
        return
    width = max(5, *(len(name) for name in per_class))
    yield f"{'class':<{width}}  precision  recall  f1-score  support"
    shown = dict(list(per_class.items())[:30])
    for name, row in shown.items():
        rates = f"{row['precision']:>9.4f}  {row['recall']:>6.4f}  {row['f1-score']:>8.4f}"
        yield f"{name:<{width}}  {rates}  {row['support']:>7}"
    if len(per_class) > len(shown):
        yield f"... and {len(per_class) - len(shown)} more in report.json"
    if "hardest_class" in metrics:
        yield f"weakest class: {metrics['hardest_class']} (recall {metrics['recall_min']:.4f})"
