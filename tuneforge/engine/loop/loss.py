"""The loss of a batch, as `train_step` and its wrappers compute it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tuneforge.engine.context.run import Run
from tuneforge.engine.data.dataset import Batch
from tuneforge.engine.model.fsdp import check_loss
from tuneforge.errors import PluginError


def compute_loss(run: Run, batch: Batch) -> tuple[Tensor, Any]:
    """Return the scalar loss and the outputs that `train_step` and its wrappers compute for a batch.

    Raises:
        PluginError: They return something else.
    """
    result = run.hooks.call.train_step(run=run, batch=batch)
    if (
        isinstance(result, (tuple, list))
        and len(result) == 2
        and isinstance(result[0], Tensor)
        and result[0].numel() == 1
    ):
        return check_loss(result[0] if result[0].ndim == 0 else result[0].reshape(())), result[1]
    raise PluginError(
        f"{run.hooks.get_provider('train_step').label} returned {type(result).__name__} from train_step",
        why="it must return a scalar loss and the outputs: return loss, outputs",
        fix="look at the loss and at the components that wrap train_step",
    )
