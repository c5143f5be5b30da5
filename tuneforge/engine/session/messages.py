"""What a run says about itself, as sentences and lines of numbers; the engine and the command line share them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from tuneforge.engine.data.dataset import Data
from tuneforge.engine.loop.metric_set import single_numbers
from tuneforge.engine.model.model import Model
from tuneforge.plugin.results import Answer, Readings, Report
from tuneforge.plugin.steps import Blend, Fit, Phase, Probe, Step


def of_data(data: Data) -> Iterable[str]:
    """What the data is: sizes, kinds, and its own notes."""
    sizes = ", ".join(f"{len(split):,} {name}" for name, split in data.splits().items())
    yield f"data: {sizes}"
    labels = data.targets.labels
    if labels:
        yield f"classes ({len(labels)}): {shortened(labels)}"
    yield from (f"note: {note}" for note in data.notes)


def of_model(model: Model) -> Iterable[str]:
    """What the model is: size, layer groups, and what adapters changed."""
    infos = model.group_infos()
    total = sum(info.num_parameters for info in infos)
    groups = ", ".join(f"{info.name} {info.num_parameters:,}" for info in infos)
    name = type(model.module).__name__
    yield f"model: {name}, {total:,} parameters in {len(infos)} layer groups ({shortened_text(groups)})"
    yield from (f"adapted: {change}" for change in model.changes)


def of_step(step: Step) -> str:
    """One line that says what a step will do."""
    if isinstance(step, Phase):
        return f"phase '{step.name}': {', '.join(_phase_words(step))}"
    if isinstance(step, Fit):
        return f"fit '{step.name}': solve the head on frozen features, l2 {step.l2:g}"
    if isinstance(step, Probe):
        return f"probe '{step.name}': measure {step.measure} on {step.batches} batches, train nothing"
    assert isinstance(step, Blend)
    if len(step.snapshots) == 1:
        return f"blend '{step.name}': go back to '{step.snapshots[0]}'"
    return f"blend '{step.name}': mix {' and '.join(step.snapshots)}, best of {len(step.weights)} on validation"


def of_epoch(entry: Mapping[str, Any], headline: Iterable[str]) -> str:
    """One epoch's numbers on a line."""
    val = entry["val"]
    figures = "  ".join(f"{name} {val[name]:.4f}" for name in headline if name in val)
    best = "  best" if entry["best"] else ""
    return (
        f"  epoch {entry['epoch']:>3}  {entry['seconds']:6.1f} s  lr {entry['lr']:.1e}  "
        f"loss {entry['train']['loss']:.4f}  val: {figures}{best}"
    )


def of_answer(answer: Answer) -> Iterable[str]:
    """How a step ended and why."""
    if isinstance(answer, Readings):
        values = ", ".join(f"{key} {value:.4g}" for key, value in answer.values.items())
        yield f"  measured: {shortened_text(values)}"
        return
    assert isinstance(answer, Report)
    yield f"  ended: {answer.reason}"
    if answer.frozen and answer.trained:
        yield f"  proved: {answer.frozen:,} frozen parameters unchanged to the bit, {answer.trained:,} trained"
    if answer.left_out:
        steps = shortened(map(str, answer.left_out))
        yield f"  warning: steps that were left out, because a loss or a gradient was no number: {steps}"
    if answer.unmoved:
        yield f"  warning: never received a gradient worth a move: {shortened(answer.unmoved)}"


def of_result(splits: Mapping[str, Mapping[str, Any]], headline: Iterable[str]) -> Iterable[str]:
    """The figures of every split on a line each, then the test split by class with the worst class named."""
    names = list(headline)
    width = max(len(name) for name in splits)
    for split, figures in splits.items():
        numbers = single_numbers(figures)
        shown = [name for name in names if name in numbers] or list(numbers)[:4]
        yield f"{split:<{width}}  " + "  ".join(f"{name} {numbers[name]:.4f}" for name in shown)
    yield from _by_class(splits.get("test", {}))


def shortened(names: Iterable[str], most: int = 12) -> str:
    """Names joined by commas; of many only the first and how many more."""
    listed = list(names)
    more = f", and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more


def shortened_text(text: str, most: int = 240) -> str:
    """Text cut at `most` characters."""
    return text if len(text) <= most else text[: most - 4] + " ..."


def _phase_words(phase: Phase) -> Iterable[str]:
    yield f"train {' and '.join(phase.train)}"
    yield f"{phase.epochs} epoch(s)" if phase.epochs else f"{phase.steps} step(s)"
    yield f"lr {phase.lr:g}"
    if phase.layer_decay != 1:
        yield f"layer decay {phase.layer_decay:.3g}"
    if phase.lr_scales:
        yield f"{len(phase.lr_scales)} rate factor(s)"
    if phase.schedule:
        yield f"schedule {phase.schedule.name}"
    if phase.class_weights is not None:
        yield "classes weighed"
    if phase.sampling is not None:
        yield "classes drawn as asked"
    if phase.mix:
        yield "mix " + ", ".join(f"{share:.0%} {name}" for name, share in phase.mix.items())
    if phase.patience is not None:
        yield f"patience {phase.patience}"
    if phase.restore_best:
        yield "restore best"


def _by_class(figures: Mapping[str, Any]) -> Iterable[str]:
    per_class = figures.get("per_class")
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
    if "worst_class" in figures:
        yield f"weakest class: {figures['worst_class']} (recall {figures['recall_min']:.4f})"
