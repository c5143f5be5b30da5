"""The lines that a run logs; the engine and the command line share them."""

from __future__ import annotations

import shlex
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from tuneforge.engine.context.run import Run
from tuneforge.engine.data.dataset import Data
from tuneforge.engine.loop.metric_set import scalar_metrics
from tuneforge.engine.model.model import Model
from tuneforge.engine.session.components import is_object
from tuneforge.engine.storage.checkpoint import Checkpoints
from tuneforge.errors import UsageError
from tuneforge.plugin.image_preprocessing import ImagePreprocessing
from tuneforge.plugin.names import format_count, to_kebab_case
from tuneforge.plugin.results import AnyStrategyStepResult, Diagnostics, StrategyStepResult
from tuneforge.plugin.steps import Diagnosis, HeadFit, Phase, StrategyStep, WeightAverage

_MAX_CLASSES = 30  # rows of the table by class


def log_lines(run: Run, lines: Iterable[str]) -> None:
    """Log several lines."""
    for line in lines:
        run.log(line)


def format_run(run_dir: Path, world_size: int, *, shard: bool) -> Iterable[str]:
    """Yield the run directory and the number of processes."""
    yield f"run: {run_dir}"
    if world_size > 1:
        yield f"distributed: {world_size} processes; each trains on its share of every batch"
    elif shard:
        yield "note: --shard has no effect on one process; start several with torchrun"


def describe_other_images(expected: ImagePreprocessing | None, data: Data) -> Iterator[str]:
    """Yield a sentence if the images have another size than the weights expect, and the data does not say so itself."""
    if expected is None or any(expected.name in note for note in data.notes):
        return
    example = data.example()
    if isinstance(example, Tensor) and example.ndim == 4 and tuple(example.shape[-2:]) != expected.size:
        (height, width), (own_height, own_width) = expected.size, example.shape[-2:]
        mean, std = (", ".join(f"{value:g}" for value in values) for values in (expected.mean, expected.std))
        yield (
            f"the weights {expected.name} expect images of {width}x{height} pixels, mean {mean}, std {std}, and the "
            f"data does not follow them: its images have {own_width}x{own_height} pixels"
        )


def format_data(name: str, data: Data) -> Iterable[str]:
    """Yield the sizes of the splits, the classes, and the notes of the data source.

    Args:
        name: The name of the data source, as the configuration records it.
        data: The prepared data.
    """
    source = "" if is_object(name) else f"{name}, "
    labels = data.targets.labels
    classes = f", {format_count(len(labels), 'class', 'classes')}" if labels else ""
    sizes = f"{len(data.train):,} training, {len(data.val):,} validation, {len(data.test):,} test samples"
    yield f"data: {source}{sizes}{classes}"
    if labels:
        yield f"classes: {join_names(labels)}"
    if data.extra_test_splits:
        extra = (f"{name}, {format_count(len(split), 'sample')}" for name, split in data.extra_test_splits.items())
        yield f"extra test splits: {'; '.join(extra)}"
    yield from (f"note: {note}" for note in data.notes)
    yield from _describe_similar(labels)


def format_augmentations(run: Run) -> Iterable[str]:
    """Yield the augmentations that the data chose; those of the user are known to the user."""
    specs = run.engine_state.augment_specs
    if specs and not run.config.augment:
        names = ", ".join(
            " ".join([spec.name, *(f"{name}={value}" for name, value in spec.options.items())]) for spec in specs
        )
        yield f"augmentation: {names} (the default of this data; --augment none trains without)"


def format_batches(num_draws: int, batch_size: int) -> Iterable[str]:
    """Yield a note if one batch holds the whole training split."""
    if num_draws <= batch_size and batch_size > 1:
        yield (
            f"note: an epoch is one step, because a batch of {batch_size} holds all {num_draws} training samples; "
            "lower --batch-size for more steps"
        )


def _describe_similar(labels: Iterable[str]) -> Iterable[str]:
    """Yield a note for classes whose names differ only in case, white space or Unicode form."""
    groups: dict[str, list[str]] = {}
    for label in labels:
        groups.setdefault(" ".join(unicodedata.normalize("NFKC", label).casefold().split()), []).append(label)
    similar = [" and ".join(f"'{name}'" for name in names) for names in groups.values() if len(names) > 1]
    if similar:
        yield f"warning: classes that differ only in case or spelling are kept apart: {join_names(similar)}"


def format_model(name: str, model: Model) -> Iterable[str]:
    """Yield the size of the model, its layer groups, and what adapters changed.

    Args:
        name: The name of the model builder, as the configuration records it.
        model: The adapted model.
    """
    infos = model.group_infos()
    total = sum(info.num_parameters for info in infos)
    shown_name = type(model.module).__name__ if is_object(name) else name
    num_groups = format_count(len(infos), "layer group")
    yield f"model: {shown_name}, {total:,} parameters, {num_groups}, head '{model.head}'"
    groups = ", ".join(f"{info.name} {info.num_parameters:,}" for info in infos)
    yield f"parameters by layer group: {truncate_text(groups)}"
    for tied, other in model.head_ties().items():
        yield f"tied: '{tied}' of the head is shared with '{other}', so both train or none"
    yield from (f"adapted: {change}" for change in model.changes)


def format_step(step: StrategyStep, position: str = "") -> str:
    """Return one line that says what a strategy step does.

    Args:
        step: The strategy step.
        position: Its number among the planned steps, such as `1/2`; "" if unknown.
    """
    suffix = f" ({position})" if position else ""
    return f"{step_kind(step)} '{step.name}'{suffix}: {describe_step(step)}"


def step_kind(step: StrategyStep) -> str:
    """Return the kind of a strategy step: `phase`, `head fit`, `diagnosis` or `weight average`."""
    return to_kebab_case(type(step).__name__).replace("-", " ")


def describe_step(step: StrategyStep) -> str:
    """Return what a strategy step does, without its kind and name."""
    if isinstance(step, Phase):
        return ", ".join(_phase_details(step))
    if isinstance(step, HeadFit):
        l2 = "chosen for the data" if step.l2 is None else f"{step.l2:g}"
        return f"solving the head on frozen features, l2 {l2}"
    if isinstance(step, Diagnosis):
        return f"measuring {step.measure} on {format_count(step.batches, 'batch', 'batches')}, without training"
    assert isinstance(step, WeightAverage)
    names = " and ".join(step.snapshots)
    if len(step.snapshots) == 2:
        return f"interpolating the weights of {names}, best of {len(step.weights)} on validation"
    return f"averaging the weights of {names}" if len(step.snapshots) > 2 else f"restoring the weights of '{names}'"


def format_epoch(entry: Mapping[str, Any], num_epochs: int, primary_metrics: Iterable[str]) -> str:
    """Return one line with the metrics of an epoch.

    Args:
        entry: The epoch's entry in the history of the run.
        num_epochs: Epochs of the run, as far as they are planned.
        primary_metrics: The validation metrics to show.
    """
    val = entry["val"]
    metrics = "".join(f"  val {name} {val[name]:.4f}" for name in primary_metrics if name in val)
    best = f"  *best {entry['monitor']}" if entry["best"] else ""
    return (
        f"  epoch {entry['epoch']}/{num_epochs}  {entry['seconds']:.1f} s  lr {entry['lr']:.1e}  "
        f"train loss {entry['train']['loss']:.4f}{metrics}{best}"
    )


def format_step_result(result: AnyStrategyStepResult) -> Iterable[str]:
    """Yield why a strategy step ended, and what the freeze check and the loss checks found."""
    if isinstance(result, Diagnostics):
        values = ", ".join(f"{key} {value:.4g}" for key, value in result.values.items())
        yield f"  measured: {truncate_text(values)}"
        return
    assert isinstance(result, StrategyStepResult)
    yield f"  ended: {result.reason}"
    if result.num_frozen and result.num_trainable:
        yield (
            f"  freeze check: {result.num_frozen:,} frozen parameters bit-identical, {result.num_trainable:,} trained"
        )
    if result.skipped_steps:
        steps = join_names(map(str, result.skipped_steps))
        yield f"  warning: skipped optimizer steps, because a loss or a gradient was NaN or Inf: {steps}"
    if result.never_updated:
        names = join_names(result.never_updated)
        yield f"  warning: parameters that received no gradient, or one too small to change them: {names}"


def format_checkpoints(checkpoints: Checkpoints) -> Iterable[str]:
    """Yield the number of checkpoints and the mean time to save one."""
    if checkpoints.num_saved:
        cost_ms = 1000 * checkpoints.spent_s / checkpoints.num_saved
        yield f"checkpoints: {checkpoints.num_saved} saved, {cost_ms:.0f} ms each"


def finished_error(run_dir: Path) -> UsageError:
    """Return the error for a finished run that is resumed; it names the way to train for more epochs."""
    path = shlex.quote(str(run_dir))
    return UsageError(
        f"the run in '{run_dir}' is done",
        why="its schedules, its best weights and its report belong to the epochs that it was given",
        fix=f"see it: tuneforge report {path}; for more epochs start another run from its weights (a warm start), with "
        f"tuneforge run --callback warm-start --warm-start.run {path}, or Engine(model=load({str(run_dir)!r}).model)",
    )


def format_metrics(splits: Mapping[str, Mapping[str, Any]], primary_metrics: Iterable[str]) -> Iterable[str]:
    """Yield a line of metrics for each split, then a table of the test split by class."""
    names = list(primary_metrics)
    width = max(len(name) for name in splits)
    for split, metrics in splits.items():
        if not metrics:
            yield f"{split:<{width}}  empty, so it has no metrics"
            continue
        numbers = scalar_metrics(metrics)
        shown = [name for name in names if name in numbers] or list(numbers)[:4]
        yield f"{split:<{width}}  " + "  ".join(f"{name} {numbers[name]:.4f}" for name in shown)
    yield from _format_per_class(splits.get("test", {}))


def format_lr(lr: float) -> str:
    """Return a learning rate as `2e-3`."""
    mantissa, exponent = f"{lr:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}" if lr else "0"


def join_names(names: Iterable[str], max_names: int = 12) -> str:
    """Return names joined by commas; beyond `max_names`, the number of those left."""
    listed = list(names)
    more = f", and {len(listed) - max_names} more" if len(listed) > max_names else ""
    return ", ".join(listed[:max_names]) + more


def truncate_text(text: str, max_chars: int = 240) -> str:
    """Return the text cut to `max_chars` characters."""
    return text if len(text) <= max_chars else text[: max_chars - 4] + " ..."


def _phase_details(phase: Phase) -> Iterable[str]:
    yield f"training {' and '.join(phase.train).replace('all', 'all parameters')}"
    yield format_count(phase.epochs, "epoch") if phase.epochs else format_count(phase.steps or 0, "optimizer step")
    yield f"lr {format_lr(phase.lr)}"
    if phase.layer_decay != 1:
        yield f"layer decay {phase.layer_decay:.3g}"
    if phase.lr_scales:
        yield f"lr scales of {format_count(len(phase.lr_scales), 'selector')}"
    if phase.schedule:
        yield phase.schedule.name
    if phase.class_weights is not None:
        yield "class weights"
    if phase.sampling is not None:
        yield "class sampling"
    if phase.mixture_weights:
        yield "mixture of " + ", ".join(f"{share:.0%} {name}" for name, share in phase.mixture_weights.items())
    if phase.patience is not None:
        yield f"patience {phase.patience}"
    if phase.restore_best:
        yield "restoring the best weights"


def _format_per_class(metrics: Mapping[str, Any]) -> Iterable[str]:
    per_class = metrics.get("per_class")
    if not per_class:
        return
    width = max(5, *(len(name) for name in per_class))
    yield f"{'class':<{width}}  precision  recall  f1-score  support"
    shown = dict(list(per_class.items())[:_MAX_CLASSES])
    for name, row in shown.items():
        scores = f"{row['precision']:>9.4f}  {row['recall']:>6.4f}  {row['f1-score']:>8.4f}"
        yield f"{name:<{width}}  {scores}  {row['support']:>7}"
    if len(per_class) > len(shown):
        yield f"{len(per_class) - len(shown)} more in report.json"
    if "hardest_class" in metrics:
        yield f"hardest class: {metrics['hardest_class']} (recall {metrics['recall_min']:.4f})"
