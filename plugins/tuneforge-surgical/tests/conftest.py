"""A fixture that runs the engine on a small network and data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import CLASSES, PhaseRecorder, RecordedRun, copy_state, make_blobs, make_model, make_network
from torch import nn

import tuneforge as tf

torch.set_num_threads(1)


@pytest.fixture
def tune(tmp_path: Path) -> Callable[..., RecordedRun]:
    """Run the engine: `tune(Surgical(epochs=2))`, `tune(strategy, known=("0", "1"))`, `tune(strategy, net=net)`."""
    number = iter(range(1000))

    def run(
        strategy: Any, *, net: nn.Module | None = None, known: tuple[str, ...] = CLASSES, **given: Any
    ) -> RecordedRun:
        recorder = PhaseRecorder()
        result = tf.Engine(
            strategy=strategy,
            model=make_model(make_network() if net is None else net, known),
            out=tmp_path / f"run{next(number)}",
            **{"data": make_blobs(150, seed=1), "batch_size": 16, "page": False, "callbacks": [recorder], **given},
        ).run()
        return RecordedRun(recorder.starts, recorder.learning_rates, copy_state(result.model.module), result)

    return run
