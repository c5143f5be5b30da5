"""What an export format is: it writes a tuned model into a folder, and opens what it wrote without the run."""

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
"""From the stored form of a batch, on the CPU, to the model's outputs, float32 (b, k), on the CPU. Thread-safe."""


class ExportFormat(ABC):
    """A form that a tuned model leaves its run in. A part of group `tuneforge.export`."""

    backend: str
    """What computes the answers: `torch`, `onnxruntime`, ..."""

    float32 = True
    """True where it computes in float32, whatever precision the run had."""

    @abstractmethod
    def write(self, predictor: Predictor, directory: Path) -> None:
        """Write the model into `directory`, which exists and is not the final one.

        Raises:
            MissingDependencyError: A package that writing needs is not installed.
            PluginError: This model cannot be written in this form; the message says why.
        """

    @abstractmethod
    def load(self, directory: Path, *, device_name: str) -> Forward:
        """Open what `write` left.

        Raises:
            MissingDependencyError: A package that computing needs is not installed.
            FolderError: The files do not fit.
        """


@runtime_checkable
class SupportsPredictions(Protocol):
    """Targets that say what outputs mean in numbers: probabilities, or numbers in their own unit."""

    def to_predictions(self, outputs: Tensor) -> Tensor:
        """Outputs (b, k) as answers (b, k); a graph can compute it."""


def compute_predictions(targets: Targets, outputs: Tensor) -> Tensor:
    """Probabilities or numbers (b, k) of outputs (b, k); the outputs themselves where the targets say nothing more."""
    return targets.to_predictions(outputs) if isinstance(targets, SupportsPredictions) else outputs


def make_forward(predictor: Predictor) -> Forward:
    """What a loaded run computes; one batch at a time, because a module may keep things while it computes."""
    run, inputs, lock = predictor.run, predictor.inputs, threading.Lock()

    def forward(stored: TensorTree) -> Tensor:
        with lock, torch.inference_mode():
            output: Tensor = run.forward(run.to_device(inputs.preprocess(map_inputs(stored, run.device.move))))
            return output.float().cpu()

    return forward
