"""Forward passes over a split without training: metrics, the hardest samples, and features for a head."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from tuneforge.engine.context.run import Run
from tuneforge.engine.data.dataset import Batch, Split
from tuneforge.engine.data.loader import iter_sequential
from tuneforge.engine.loop.metric_set import HardestSamples
from tuneforge.engine.loop.oom import CatchOutOfMemory, halve
from tuneforge.engine.model.device import is_out_of_memory
from tuneforge.errors import DataError, HaltError

T = TypeVar("T")


def evaluate(
    run: Run,
    split: Split,
    name: str,
    *,
    hardest: HardestSamples | None = None,
    on_metrics: Callable[[dict[str, Any]], None] = lambda metrics: None,
) -> dict[str, Any]:
    """Return all metrics of a split, computed in one pass; none if it is empty.

    Args:
        run: A run with data and model.
        split: The split to evaluate.
        name: The name of the split; hooks read it from `run.eval_split`.
        hardest: Collects the samples with the largest loss, if given.
        on_metrics: Called with the metrics while the evaluated weights (perhaps averaged ones) are still in the model.
    """
    if not len(split):
        on_metrics({})
        return {}
    run.eval_split = name
    run.hooks.call.evaluation_started(run=run)
    metrics = _repeat_on_oom(run, lambda: _evaluate_once(run, split, hardest), f"evaluating '{name}'")
    on_metrics(metrics)
    run.hooks.call.evaluation_ended(run=run, metrics=metrics)
    run.eval_split = None
    return metrics


def _repeat_on_oom(run: Run, one_pass: Callable[[], T], doing: str) -> T:
    """Return what a pass over a split computes; while memory runs out, repeat it with half the batch size."""
    state = run.engine_state
    while True:
        results: list[T] = []
        can_halve = state.eval_batch_size > 1
        with CatchOutOfMemory(run, where=doing, flag="--eval-batch-size", can_halve=can_halve):
            results.append(one_pass())
        if not run.process_group.all_reduce_any(not results)[0]:
            return results[0]
        state.eval_batch_size = halve(run, state.eval_batch_size)
        run.log(f"  out of memory while {doing}: evaluation batch size reduced to {state.eval_batch_size}")


def _evaluate_once(run: Run, split: Split, hardest: HardestSamples | None) -> dict[str, Any]:
    metrics = run.hooks.call.evaluate(run=run)
    run.model.module.eval()
    run.reseed()
    if hardest is not None:
        hardest.reset()
    with torch.no_grad():  # not inference_mode: what a model caches in forward must be usable in training
        finite: list[tuple[Tensor, Tensor]] = []
        for outputs, targets, indices in _iter_outputs(run, split):
            finite.append((_are_finite(outputs, len(indices)), indices))
            metrics.update(outputs, targets)
            if hardest is not None:
                hardest.update(run.data.targets.per_sample_loss(outputs, targets), indices, outputs)
        _check_outputs(run, split, finite)
        computed: dict[str, Any] = metrics.compute()
    return computed


def _are_finite(outputs: Any, size: int) -> Tensor:
    """Return a mask (b,): False where an output is NaN or +Inf, or all of a row is -Inf; single -Inf mask classes."""
    if not (isinstance(outputs, Tensor) and outputs.is_floating_point() and outputs.shape[:1] == (size,)):
        return torch.ones(size, dtype=torch.bool)
    rows = outputs.flatten(1) if outputs.ndim > 1 else outputs[:, None]
    return (rows < math.inf).all(1) & (rows > -math.inf).any(1)


def _check_outputs(run: Run, split: Split, finite: list[tuple[Tensor, Tensor]]) -> None:
    """Halt if outputs for the validation split are not finite, because it decides; log it for other splits.

    Args:
        run: The run, during an evaluation.
        split: The split that was evaluated.
        finite: Of each batch, a mask (b,) and the indices (b,) of its samples.

    Raises:
        HaltError: The output for a validation sample is NaN or Inf.
    """
    bad = [index for mask, indices in finite for index in indices[~mask.cpu()].tolist()]
    if not bad:
        return
    what = f"the model's output is NaN or Inf for {len(bad)} of {len(split)} samples of '{run.eval_split}'"
    samples = ", ".join(map(split.id_of, bad[:5])) + (f" and {len(bad) - 5} more" if len(bad) > 5 else "")
    if run.eval_split == "val":
        raise HaltError(
            what,
            where=f"optimizer step {run.step}, samples {samples}",
            why="early stopping, best weights and the strategy's decisions depend on them",
            fix="look for NaN and extreme values in these inputs, and for what the model does in eval mode only",
        )
    run.log(f"warning: {what}: {samples}; they count as misclassified")


def _iter_outputs(run: Run, split: Split) -> Iterator[tuple[Any, Tensor, Tensor]]:
    """Yield outputs, targets and indices of each batch of a split; every rank gets those of all ranks."""
    totals = map(len, iter_sequential(len(split), run.engine_state.eval_batch_size))
    batches = run.evaluation_batches(split, per_rank=True)
    for total in totals:
        if run.process_group.world_size == 1:
            batch = next(batches)
            yield run.forward(batch.inputs), batch.targets, batch.indices
        else:
            outputs, batch = _forward_on_all_ranks(run, batches)
            outputs, targets, indices = (
                run.process_group.all_gather_batch(each, total) for each in (outputs, batch.targets, batch.indices)
            )
            yield outputs, targets, indices


def _forward_on_all_ranks(run: Run, batches: Iterator[Batch]) -> tuple[Tensor, Batch]:
    """Return this rank's outputs of the next batch.

    Raises:
        OutOfMemoryError: Memory ran out on any rank, so that all ranks repeat the pass together.
    """
    outputs, batch, error = None, None, None
    try:
        batch = next(batches)
        outputs = run.forward(batch.inputs)
    except (RuntimeError, MemoryError) as caught:
        if not is_out_of_memory(caught) or run.sharded:
            raise
        error = caught
    if run.process_group.all_reduce_any(error is not None)[0]:
        raise torch.OutOfMemoryError("memory ran out on another rank") from error
    assert isinstance(outputs, Tensor)
    assert batch is not None
    return outputs, batch


def compute_head_features(run: Run, split: Split) -> tuple[Tensor, Tensor]:
    """Return the inputs of the head for each sample of a split, (n, f) on the CPU, and the targets (n, ...)."""
    run.model.module.eval()
    features = _repeat_on_oom(run, lambda: _capture_head_inputs(run, split), "computing features for the head")
    if len(features) != len(split):
        raise DataError(
            f"the head was called with {len(features)} inputs for {len(split)} samples",
            why="it is not called once per sample, so it cannot be solved on its inputs",
            fix="use a strategy without HeadFit",
        )
    if not bool(features.isfinite().all()):
        count = int((~features.isfinite().all(1)).sum())
        raise HaltError(
            f"the input of the head is NaN or Inf for {count} of {len(split)} samples",
            why="the head is solved on it",
            fix="look for NaN and extreme values in the data and in the frozen weights",
        )
    return features, split.targets


def _capture_head_inputs(run: Run, split: Split) -> Tensor:
    captured: list[Tensor] = []

    def capture(module: nn.Module, args: tuple[Any, ...]) -> None:
        captured.extend(each.detach().flatten(1).float().cpu() for each in args[:1])

    handle = run.model.head_module().register_forward_pre_hook(capture)
    try:
        with torch.no_grad():
            for batch in run.evaluation_batches(split):
                run.forward(batch.inputs)
    finally:
        handle.remove()
    return torch.cat(captured) if captured else torch.empty(0, 0)
