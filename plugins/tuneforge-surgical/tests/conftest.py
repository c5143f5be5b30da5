"""One fixture: the real engine on the small world."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from world import CLASSES, Tuned, Witness, clouds, model, network, state_of

import tuneforge as tf

torch.set_num_threads(1)


@pytest.fixture
def tune(tmp_path: Path) -> Callable[..., Tuned]:
    """Run the engine: `tune(Surgical(epochs=2))`, `tune(strategy, known=("0", "1"))`, `tune(strategy, net=net)`."""
    number = iter(range(1000))

    def run(strategy: Any, *, net: nn.Module | None = None, known: tuple[str, ...] = CLASSES, **given: Any) -> Tuned:
        witness = Witness()
        result = tf.Engine(
            strategy=strategy,
            model=model(network() if net is None else net, known),
            out=tmp_path / f"run{next(number)}",
            **{"data": clouds(150, seed=1), "batch_size": 16, "page": False, "extensions": [witness], **given},
        ).run()
        return Tuned(witness.starts, witness.rates, state_of(result.model.module), result)

    return run
