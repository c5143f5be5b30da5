"""Tensors and features of the tasks, made once and kept in a folder outside the repository."""

import os
from pathlib import Path

import attrs
import networks
import numpy as np
import torch
from numpy.typing import NDArray
from splits import Cell, LabeledRows, split_rows
from tasks import TASKS, Task
from torch import Tensor

from tuneforge.exporting import load_tensors, save_tensors


@attrs.frozen(eq=False)
class TaskTensors:
    """A task, ready to train on.

    Args:
        task: Its description.
        inputs: What the network takes (n, ...).
        labels: Class of each (n,), int64.
        classes: Names of the classes.
        features: Of the frozen pretrained backbone (n, num_features).
        groups: Group of each, or None.
    """

    task: Task
    inputs: Tensor
    labels: NDArray[np.int64]
    classes: tuple[str, ...]
    features: Tensor
    groups: tuple[str, ...] | None

    def rows(self, cell: Cell, split: int) -> LabeledRows:
        """Return the rows of a split."""
        per_class = self.task.test_per_class
        return split_rows(cell, split, self.labels, test_per_class=per_class, groups=self.groups)


def cache_folder() -> Path:
    """Return `$TUNEFORGE_QUALITY_CACHE`, or a folder in the user's cache."""
    return Path(os.environ.get("TUNEFORGE_QUALITY_CACHE", "~/.cache/tuneforge-quality")).expanduser()


def prepare(task: Task, root: Path) -> Path:
    """Read a task's samples from below `root`, compute its features, and write both, unless they are there."""
    path = cache_folder() / f"{task.name}.safetensors"
    if path.is_file():
        return path
    examples = task.examples(root)
    inputs = networks.inputs(task.network, examples.values, task.size)
    found = networks.features(networks.build(task.network, len(examples.classes), seed=0), inputs)
    tensors = {"labels": torch.from_numpy(examples.labels), "features": found}
    tensors["inputs"] = inputs if task.network == "minilm" else torch.from_numpy(np.ascontiguousarray(examples.values))
    metadata = {"classes": "\n".join(examples.classes)}
    if examples.groups is not None:
        metadata["groups"] = "\n".join(examples.groups)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_tensors(tensors, path, metadata=metadata)
    return path


def load(name: str) -> TaskTensors:
    """Read what `prepare` wrote.

    Raises:
        FileNotFoundError: `python benchmarks/quality --prepare` was not run.
    """
    task = TASKS[name]
    path = cache_folder() / f"{name}.safetensors"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: run `python benchmarks/quality --prepare` first")
    tensors, metadata = load_tensors(path)
    stored = tensors["inputs"]
    inputs = stored if task.network == "minilm" else networks.inputs(task.network, stored.numpy(), task.size)
    groups = tuple(metadata["groups"].split("\n")) if "groups" in metadata else None
    classes = tuple(metadata["classes"].split("\n"))
    return TaskTensors(task, inputs, tensors["labels"].numpy(), classes, tensors["features"], groups)
