"""Parity check: an exported model predicts as the fine-tuned one on the test split, at several batch sizes.

Shapes: n samples, b in a batch, k outputs.
"""

from __future__ import annotations

from typing import Any

import attrs
import torch
from torch import Tensor

from tuneforge.engine.data.dataset import InMemorySource, Split, Targets, TensorTree, named_tensors
from tuneforge.engine.data.loader import fetch_batches, iter_sequential
from tuneforge.errors import HaltError
from tuneforge.exporting.formats import Forward, compute_predictions

BATCH_SIZES = (1, 2, 7, 16)
TOLERANCE = 1e-4
"""Largest allowed difference of a probability; relative for values above 1."""

_BLOCK = 16 * 7  # samples fetched at once, which every batch size divides


class ParityError(HaltError):
    """The predictions of an exported model differ from those of the fine-tuned one."""


@attrs.frozen
class ParityResult:
    """The result of a parity check.

    Args:
        num_samples: The number of test samples, each compared at every batch size.
        batch_sizes: The batch sizes.
        max_deviation: The largest difference of two predictions.
        num_different: Predictions of another class, without near-ties.
        num_near_ties: Predictions of another class where no probability differs by more than `TOLERANCE`.
    """

    num_samples: int
    batch_sizes: tuple[int, ...]
    max_deviation: float
    num_different: int
    num_near_ties: int

    @property
    def passed(self) -> bool:
        """True if the model may be exported."""
        return self.max_deviation <= TOLERANCE and not self.num_different


def require_parity(name: str, reference: Forward, exported: Forward, targets: Targets, test: Split) -> ParityResult:
    """Compare an exported model with the fine-tuned one.

    Args:
        name: The name of the format, for messages.
        reference: The forward pass of the fine-tuned model.
        exported: The forward pass of the exported model.
        targets: Interprets outputs.
        test: The test split.

    Raises:
        ParityError: A class differs, or an answer is further off than `TOLERANCE`.
    """
    expected: list[Tensor] = []
    by_size: dict[int, list[Tensor]] = {size: [] for size in BATCH_SIZES}
    for _, stored in fetch_batches(test, iter_sequential(len(test), _BLOCK), workers=0):
        expected.append(reference(stored))
        for size, outputs in by_size.items():
            outputs.append(_run_in_batches(name, exported, stored, size))
    result = compare_outputs(
        torch.cat(expected), {size: torch.cat(outputs) for size, outputs in by_size.items()}, targets
    )
    if not result.passed:
        raise ParityError(
            f"the {name} export does not answer as the tuned model",
            where=f"the test split, {result.num_samples} samples, batches of {', '.join(map(str, BATCH_SIZES))}",
            why=f"an answer is off by {result.max_deviation:.3g} ({TOLERANCE:g} is allowed); "
            f"{result.num_different} other classes",
            fix="nothing was written; export it as safetensors, or report the network",
        )
    return result


def compare_outputs(expected: Tensor, outputs_by_size: dict[int, Tensor], targets: Targets) -> ParityResult:
    """Return the outputs (samples, outputs) of the fine-tuned model, and those of the exported one by batch size."""
    max_deviation, num_different, num_near_ties = 0.0, 0, 0
    predictions = compute_predictions(targets, expected)
    for outputs in outputs_by_size.values():
        others = compute_predictions(targets, outputs)
        max_deviation = max(max_deviation, measure_deviation(others, predictions))
        if others.shape != predictions.shape:
            continue
        disagreements = (others.argmax(1) != predictions.argmax(1)) | ((others >= 0.5) != (predictions >= 0.5)).any(1)
        for row in disagreements.nonzero().flatten().tolist():
            if _drop_numbers(targets.describe(outputs[row])) != _drop_numbers(targets.describe(expected[row])):
                tie = float((others[row] - predictions[row]).abs().max()) <= TOLERANCE
                num_near_ties, num_different = num_near_ties + tie, num_different + (not tie)
    return ParityResult(len(expected), tuple(outputs_by_size), max_deviation, num_different, num_near_ties)


def measure_deviation(actual: Tensor, expected: Tensor) -> float:
    """Return the largest difference of two sets of predictions, relative above 1; Inf if one is not finite."""
    if actual.shape != expected.shape:
        return float("inf")
    far = (actual.double() - expected.double()).abs() / expected.double().abs().clamp_min(1.0)
    return float(far.nan_to_num(nan=float("inf"), posinf=float("inf")).max())


def _run_in_batches(name: str, exported: Forward, stored: TensorTree, batch_size: int) -> Tensor:
    """Return the outputs of the exported model for a block of stored inputs, computed in batches."""
    count = len(next(iter(named_tensors(stored).values())))
    try:
        return torch.cat([exported(InMemorySource(stored).fetch(rows)) for rows in iter_sequential(count, batch_size)])
    except Exception as error:
        raise ParityError(
            f"the {name} export cannot answer a batch of {batch_size}",
            why=f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}",
            fix="nothing was written; export it as safetensors, or report the network",
        ) from error


def _drop_numbers(value: Any) -> Any:
    """Return a described prediction without its numbers."""
    if isinstance(value, dict):
        return {key: _drop_numbers(item) for key, item in value.items() if not isinstance(item, float)}
    return value
