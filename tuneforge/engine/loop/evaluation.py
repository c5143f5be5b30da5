"""Forward passes over a split that train nothing: evaluation, the worst mistakes, features for a head."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from tuneforge.engine.context.run import Run
from tuneforge.engine.data.dataset import Batch, Split
from tuneforge.engine.data.loader import iter_sequential
from tuneforge.engine.loop.metric_set import HardestSamples
from tuneforge.engine.model.device import is_out_of_memory, root_cause
from tuneforge.engine.model.fsdp import out_of_memory_error
from tuneforge.errors import DataError

T = TypeVar("T")


def evaluate(
    run: Run,
    split: Split,
    name: str,
    *,
    hardest: HardestSamples | None = None,
    on_metrics: Callable[[dict[str, Any]], None] = lambda metrics: None,
) -> dict[str, Any]:
    """Every figure of a split, one pass.

    Args:
        run: With data and model.
        split: What is evaluated.
        name: Of the split; hooks find it in `run.eval_split`.
        hardest: Collects the worst mistakes on the way, if given.
        on_metrics: Is given the figures while the evaluated weights (perhaps averaged ones) are still in the model.
    """
    run.eval_split = name
    run.hooks.call.evaluation_started(run=run)
    metrics = _retry_on_oom(run, lambda: _evaluate_once(run, split, hardest), f"'{name}' is evaluated")
    on_metrics(metrics)
    run.hooks.call.evaluation_ended(run=run)
    run.eval_split = None
    return metrics


def _retry_on_oom(run: Run, one_pass: Callable[[], T], doing: str) -> T:
    """What a pass over a split gives; it begins again with smaller batches where memory does not suffice."""
    state = run.engine_state
    while True:
        given: list[T] = []
        try:
            given.append(one_pass())
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or state.eval_batch_size == 1:
                raise
            if run.sharded:
                raise out_of_memory_error(root_cause(error), where=doing, flag="--eval-batch-size") from None
        if not run.process_group.all_reduce_any(not given)[0]:
            return given[0]
        state.eval_batch_size = -(-state.eval_batch_size // 2)
        run.device.empty_cache()
        run.log(f"  out of memory while {doing}: from here on {state.eval_batch_size} samples a pass")


def _evaluate_once(run: Run, split: Split, hardest: HardestSamples | None) -> dict[str, Any]:
    metrics = run.hooks.call.evaluate(run=run)
    run.model.module.eval()
    run.reseed()
    if hardest is not None:
        hardest.reset()
    with torch.no_grad():  # not inference_mode: what a model caches in forward must be usable in training
        for outputs, targets, rows in _iter_outputs(run, split):
            metrics.update(outputs, targets)
            if hardest is not None:
                hardest.update(run.data.targets.per_sample_loss(outputs, targets), rows, outputs)
        figures: dict[str, Any] = metrics.compute()
    return figures


def _iter_outputs(run: Run, split: Split) -> Iterator[tuple[Any, Tensor, Tensor]]:
    """Outputs, targets and rows of each batch of a split; what several ranks compute, each of them is given."""
    totals = map(len, iter_sequential(len(split), run.engine_state.eval_batch_size))
    batches = run.evaluation_batches(split, per_rank=True)
    for total in totals:
        if run.process_group.is_single:
            batch = next(batches)
            yield run.forward(batch.inputs), batch.targets, batch.indices
        else:
            outputs, batch = _forward_on_all_ranks(run, batches)
            outputs, targets, indices = (
                run.process_group.all_gather_batch(each, total) for each in (outputs, batch.targets, batch.indices)
            )
            yield outputs, targets, indices


def _forward_on_all_ranks(run: Run, batches: Iterator[Batch]) -> tuple[Tensor, Batch]:
    """This rank's outputs of the next batch; memory that runs out on one rank is told to all: they all begin again."""
    outputs, batch, error = None, None, None
    try:
        batch = next(batches)
        outputs = run.forward(batch.inputs)
    except (RuntimeError, MemoryError) as caught:
        if not is_out_of_memory(caught) or run.sharded:
            raise
        error = caught
    if run.process_group.all_reduce_any(error is not None)[0]:
        raise torch.OutOfMemoryError("on another rank") from error
    assert isinstance(outputs, Tensor)
    assert batch is not None
    return outputs, batch


def compute_head_features(run: Run, split: Split) -> tuple[Tensor, Tensor]:
    """What the head is given for each sample of a split, (n, f) on the CPU, and the targets (n, ...)."""
    run.model.module.eval()
    features = _retry_on_oom(run, lambda: _capture_head_inputs(run, split), "features for the head are computed")
    if len(features) != len(split):
        raise DataError(
            f"the head took {len(features)} inputs for {len(split)} samples",
            why="it is not called once a sample, so it cannot be solved on its features",
            fix="use a strategy without HeadFit",
        )
    return features, split.targets


def _capture_head_inputs(run: Run, split: Split) -> Tensor:
    caught: list[Tensor] = []

    def catch(module: nn.Module, args: tuple[Any, ...]) -> None:
        caught.extend(each.detach().flatten(1).float().cpu() for each in args[:1])

    handle = run.model.head_module().register_forward_pre_hook(catch)
    try:
        with torch.no_grad():
            for batch in run.evaluation_batches(split):
                run.forward(batch.inputs)
    finally:
        handle.remove()
    return torch.cat(caught) if caught else torch.empty(0, 0)
