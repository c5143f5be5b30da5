"""Forward passes over a split that train nothing: evaluation, the worst mistakes, features for a head."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from tuneforge.engine.context.run import Run
from tuneforge.engine.data.dataset import Batch, Split
from tuneforge.engine.data.loader import in_turn
from tuneforge.engine.loop.metric_set import Worst
from tuneforge.engine.model.device import is_out_of_memory, root_of
from tuneforge.engine.model.fsdp import no_room
from tuneforge.errors import DataError

T = TypeVar("T")


def evaluate(
    run: Run,
    split: Split,
    name: str,
    *,
    worst: Worst | None = None,
    then: Callable[[dict[str, Any]], None] = lambda figures: None,
) -> dict[str, Any]:
    """Every figure of a split, one pass.

    Args:
        run: With data and model.
        split: What is evaluated.
        name: Of the split; hooks find it in `run.evaluating`.
        worst: Collects the worst mistakes on the way, if given.
        then: Is given the figures while the evaluated weights (perhaps averaged ones) are still in the model.
    """
    run.evaluating = name
    run.hooks.call.evaluation_started(run=run)
    figures = _with_room(run, lambda: _one_pass(run, split, worst), f"'{name}' is evaluated")
    then(figures)
    run.hooks.call.evaluation_ended(run=run)
    run.evaluating = None
    return figures


def _with_room(run: Run, one_pass: Callable[[], T], doing: str) -> T:
    """What a pass over a split gives; it begins again with smaller batches where memory does not suffice."""
    while True:
        given: list[T] = []
        try:
            given.append(one_pass())
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or run.eval_batch == 1:
                raise
            if run.sharded:
                raise no_room(root_of(error), where=doing, flag="--eval-batch-size") from None
        if not run.ranks.agree(not given)[0]:
            return given[0]
        run.eval_batch = -(-run.eval_batch // 2)
        run.device.release()
        run.note(f"  out of memory while {doing}: from here on {run.eval_batch} samples a pass")


def _one_pass(run: Run, split: Split, worst: Worst | None) -> dict[str, Any]:
    metrics = run.hooks.call.evaluate(run=run)
    run.model.module.eval()
    run.reseed()
    if worst is not None:
        worst.forget()
    with torch.no_grad():  # not inference_mode: what a model caches in forward must be usable in training
        for outputs, targets, rows in _outputs(run, split):
            metrics.update(outputs, targets)
            if worst is not None:
                worst.update(run.data.targets.wrongness(outputs, targets), rows, outputs)
        figures: dict[str, Any] = metrics.compute()
    return figures


def _outputs(run: Run, split: Split) -> Iterator[tuple[Any, Tensor, Tensor]]:
    """Outputs, targets and rows of each batch of a split; what several ranks compute, each of them is given."""
    totals = map(len, in_turn(len(split), run.eval_batch))
    batches = run.evaluation_batches(split, shared=True)
    for total in totals:
        if run.ranks.alone:
            batch = next(batches)
            yield run.forward(batch.inputs), batch.targets, batch.rows
        else:
            outputs, batch = _on_all(run, batches)
            outputs, targets, rows = (run.ranks.whole(each, total) for each in (outputs, batch.targets, batch.rows))
            yield outputs, targets, rows


def _on_all(run: Run, batches: Iterator[Batch]) -> tuple[Tensor, Batch]:
    """This rank's outputs of the next batch; memory that runs out on one rank is told to all: they all begin again."""
    outputs, batch, error = None, None, None
    try:
        batch = next(batches)
        outputs = run.forward(batch.inputs)
    except (RuntimeError, MemoryError) as caught:
        if not is_out_of_memory(caught) or run.sharded:
            raise
        error = caught
    if run.ranks.agree(error is not None)[0]:
        raise torch.OutOfMemoryError("on another rank") from error
    assert isinstance(outputs, Tensor)
    assert batch is not None
    return outputs, batch


def head_features(run: Run, split: Split) -> tuple[Tensor, Tensor]:
    """What the head is given for each sample of a split, (n, f) on the CPU, and the targets (n, ...)."""
    run.model.module.eval()
    features = _with_room(run, lambda: _caught(run, split), "features for the head are computed")
    if len(features) != len(split):
        raise DataError(
            f"the head took {len(features)} inputs for {len(split)} samples",
            why="it is not called once a sample, so it cannot be solved on its features",
            fix="use a strategy without Fit",
        )
    return features, split.targets


def _caught(run: Run, split: Split) -> Tensor:
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
