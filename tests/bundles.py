"""Finished runs of a small world for the tests of shipping: three blobs, a network that its name builds."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import torch
from PIL import Image
from tiny import blobs, tiny_data

import tuneforge as tf
from tuneforge.builtin.datasets.tables.arrays import TensorInputs
from tuneforge.builtin.targets import ClassTargets
from tuneforge.exporting.bundle import InferenceModel
from tuneforge.plugin import StrategyStep


def data(**changed: Any) -> tf.Data:
    """The small world; 300 samples in its test split."""
    return attrs.evolve(tiny_data(), **{"test": blobs(300, seed=3), **changed})


def finished(path: Path, *, epochs: int = 1, lr: float = 1e-2, given: tf.Data | None = None, **more: Any) -> Path:
    """A finished run whose model is built by name, so that its folder is all that is needed."""
    phase = tf.Phase("all", epochs=epochs, lr=lr)
    settings = {"model": tf.use("mlp", hidden=(8,)), "batch_size": 16, "page": False, **more}
    tf.Engine(data=given or data(), strategy=[phase], out=path, **settings).run()
    return path


def digits(path: Path, *steps: StrategyStep, **options: Any) -> tf.Result:
    """A finished run of the digit CNN on a few real digits."""
    data = tf.use("digits", **{"other_share": 0.0, **options})
    return tf.Engine(data=data, model="digit-cnn", strategy=list(steps), out=path, page=False).run()


def png(array: Any) -> bytes:
    """Pixels of 8 bits as a PNG."""
    file = io.BytesIO()
    Image.fromarray(np.asarray(array, dtype=np.uint8)).save(file, format="PNG")
    return file.getvalue()


def answering(
    outputs: torch.Tensor, *, names: tuple[str, ...] = ("a", "b", "c"), targets: Any = None, **record: Any
) -> InferenceModel:
    """A model whose answers are known: the stored input (n, 1) of a sample is its row in `outputs` (n, k)."""

    def forward(stored: Any) -> torch.Tensor:
        return outputs[stored[:, 0].long()]

    return InferenceModel(
        Path("known"), "known", "", "torch", TensorInputs(), targets or ClassTargets(names=names), record, forward
    )


def rows_as_inputs(truths: Any) -> tf.Split:
    """A split for `answering`: each sample's input is its row."""
    answers = torch.as_tensor(np.asarray(truths))
    return tf.Split(torch.arange(len(answers), dtype=torch.float32)[:, None], answers)


def one_hot(labels: Any, num_classes: int = 3) -> torch.Tensor:
    """Outputs (n, k) that name these labels."""
    return 5.0 * torch.nn.functional.one_hot(torch.as_tensor(np.asarray(labels)), num_classes).float()
