"""Interface of export formats: writing a fine-tuned model to a directory, and loading it without the run."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from tuneforge.engine.data.dataset import Targets, TensorTree, map_inputs
from tuneforge.engine.session.predictor import Predictor

Forward = Callable[[TensorTree], Tensor]
"""Maps a batch of stored tensors on the CPU to outputs, float32 (batch, outputs), on the CPU. Thread-safe."""


class ExportFormat(ABC):
    """An export format; a component of the group `tuneforge.export`."""

    backend: str
    """The library that computes predictions: `torch`, `onnxruntime`, ..."""

    float32 = True
    """True if it computes in float32 regardless of the precision of the run."""

    @abstractmethod
    def write(self, predictor: Predictor, directory: Path) -> None:
        """Write the model to `directory`, a temporary one that exists.

        Raises:
            MissingDependencyError: A package that writing needs is not installed.
            PluginError: This model cannot be written in this form; the message says why.
        """

    @abstractmethod
    def load(self, directory: Path, *, device_name: str) -> Forward:
        """Load what `write` wrote.

        Raises:
            MissingDependencyError: A package that computing needs is not installed.
            FolderError: The files do not fit.
        """


@runtime_checkable
class SupportsPredictions(Protocol):
    """Targets that convert outputs to probabilities, or to values in their unit."""

    def to_predictions(self, outputs: Tensor) -> Tensor:
        """Convert outputs (batch, outputs) to predictions of the same shape; a graph can contain it."""


def compute_predictions(targets: Targets, outputs: Tensor) -> Tensor:
    """Convert outputs (batch, outputs) to probabilities or values; return them unchanged if the targets cannot."""
    return targets.to_predictions(outputs) if isinstance(targets, SupportsPredictions) else outputs


def make_forward(predictor: Predictor) -> Forward:
    """Return the forward pass of a loaded run; one batch at a time, because a module may store state in its forward."""
    run, inputs, lock = predictor.run, predictor.inputs, threading.Lock()

    def forward(stored: TensorTree) -> Tensor:
        with lock, torch.inference_mode():
            output: Tensor = run.forward(run.to_device(inputs.preprocess(map_inputs(stored, run.device.move))))
            return output.float().cpu()

    return forward
