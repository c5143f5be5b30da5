"""What an export format is: it writes a tuned model into a folder, and opens what it wrote without the run."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from tuneforge.engine.data.dataset import Inputable, Targets, map_inputs
from tuneforge.engine.session.predictor import Tuned

Forward = Callable[[Inputable], Tensor]
"""From the stored form of a batch, on the CPU, to the model's outputs, float32 (b, k), on the CPU. Thread-safe."""


class ExportFormat(ABC):
    """A form that a tuned model leaves its run in. A part of group `tuneforge.export`."""

    backend: str
    """What computes the answers: `torch`, `onnxruntime`, ..."""

    float32 = True
    """True where it computes in float32, whatever precision the run had."""

    @abstractmethod
    def write(self, tuned: Tuned, folder: Path) -> None:
        """Write the model into `folder`, which exists and is not the final one.

        Raises:
            MissingDependencyError: A package that writing needs is not installed.
            PluginError: This model cannot be written in this form; the message says why.
        """

    @abstractmethod
    def opened(self, folder: Path, *, device_name: str) -> Forward:
        """Open what `write` left.

        Raises:
            MissingDependencyError: A package that computing needs is not installed.
            FolderError: The files do not fit.
        """


@runtime_checkable
class Answering(Protocol):
    """Targets that say what outputs mean in numbers: probabilities, or numbers in their own unit."""

    def answers(self, outputs: Tensor) -> Tensor:
        """Outputs (b, k) as answers (b, k); a graph can compute it."""


def answers_of(targets: Targets, outputs: Tensor) -> Tensor:
    """Probabilities or numbers (b, k) of outputs (b, k); the outputs themselves where the targets say nothing more."""
    return targets.answers(outputs) if isinstance(targets, Answering) else outputs


def forward_of(tuned: Tuned) -> Forward:
    """What a loaded run computes; one batch at a time, because a module may keep things while it computes."""
    run, inputs, lock = tuned.run, tuned.inputs, threading.Lock()

    def forward(stored: Inputable) -> Tensor:
        with lock, torch.inference_mode():
            output: Tensor = run.forward(run.place(inputs.ready(map_inputs(stored, run.device.move))))
            return output.float().cpu()

    return forward
