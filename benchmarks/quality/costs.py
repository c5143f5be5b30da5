"""CPU seconds that runs will take, estimated before they start."""

import statistics
import time
from collections.abc import Iterable, Mapping

import networks
import store
import torch
from peer_methods import EPOCHS
from records import Key, Record
from splits import Cell
from tasks import CELLS, TASKS
from torch.nn import functional as F

UNKNOWN_EPOCHS = 30
"""Passes over the labels of a method of which nothing is known."""

OWN_SAMPLES = 6400
"""Samples that tuneforge's default run trains on at least: 200 steps of 16, and as many in the refit on all labels."""

FIXED_S = 1.0
"""Seconds of a run besides training: building the network, testing."""


def estimate(keys: Iterable[Key], done: Mapping[Key, Record]) -> float:
    """Return seconds: the median of a cell's other splits; else the time of a step times the labels and epochs."""
    by_cell: dict[tuple[str, str], list[float]] = {}
    for record in done.values():
        by_cell.setdefault((record.cell, record.method), []).append(record.seconds)
    cells = {str(cell): cell for cell in CELLS}
    step_s: dict[str, float] = {}
    total = 0.0
    for cell, _, method in keys:
        if (cell, method) in by_cell:
            total += statistics.median(by_cell[cell, method])
            continue
        if "logistic" in method:
            total += FIXED_S
            continue
        task = cells[cell].task
        if task not in step_s:
            step_s[task] = _seconds_of_a_sample(task)
        samples = num_labels(cells[cell]) * EPOCHS.get(method, UNKNOWN_EPOCHS)
        total += FIXED_S + step_s[task] * (max(samples, OWN_SAMPLES) if method.startswith("tuneforge") else samples)
    return total


def num_labels(cell: Cell) -> int:
    """Return the labels of a cell, over all classes."""
    return sum(cell.counts(len(store.load(cell.task).classes)))


def _seconds_of_a_sample(name: str) -> float:
    """Measure forward and backward of two batches of 8."""
    tensors = store.load(name)
    network = networks.build(TASKS[name].network, len(tensors.classes), seed=0)
    inputs, labels = tensors.inputs[:8], torch.from_numpy(tensors.labels[:8])
    began = 0.0
    for repetition in range(3):  # the first warms up
        if repetition == 1:
            began = time.process_time()
        F.cross_entropy(network(inputs), labels).backward()
    return (time.process_time() - began) / 16
