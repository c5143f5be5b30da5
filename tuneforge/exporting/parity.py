"""The parity gate: an exported model answers as the tuned one, on the real test split, at several batch sizes.

Shapes: n samples, b in a batch, k outputs.
"""

from __future__ import annotations

from typing import Any

import attrs
import torch
from torch import Tensor

from tuneforge.engine.data.dataset import Inputable, Split, Stored, Targets, tensors_of
from tuneforge.engine.data.loader import fetched, in_turn
from tuneforge.errors import HaltError
from tuneforge.exporting.formats import Forward, answers_of

BATCHES = (1, 2, 7, 16)
MOST = 1e-4
"""How far a probability may be off; of a number beyond 1, relative to it."""

_BLOCK = 16 * 7  # samples fetched at once, which every batch size divides


class ParityError(HaltError):
    """An exported model does not answer as the tuned one."""


@attrs.frozen
class Parity:
    """How an exported model compares.

    Args:
        samples: Of the test split, each compared at every batch size.
        batches: The batch sizes.
        largest: The largest difference of two answers.
        different: Answers that are another class, beyond near-ties.
        near_ties: Answers that are another class, and yet no probability is off by more than `MOST`.
    """

    samples: int
    batches: tuple[int, ...]
    largest: float
    different: int
    near_ties: int

    @property
    def passed(self) -> bool:
        """True where it may leave."""
        return self.largest <= MOST and not self.different


def require_parity(name: str, tuned: Forward, exported: Forward, targets: Targets, test: Split) -> Parity:
    """Compare an exported model with the tuned one.

    Args:
        name: Of the format, for the message.
        tuned: What the tuned model computes.
        exported: What the exported model computes.
        targets: How answers are read.
        test: The real test split.

    Raises:
        ParityError: A class differs, or an answer is further off than `MOST`.
    """
    wanted: list[Tensor] = []
    by_size: dict[int, list[Tensor]] = {size: [] for size in BATCHES}
    for _, stored in fetched(test, in_turn(len(test), _BLOCK), workers=0):
        wanted.append(tuned(stored))
        for size, outputs in by_size.items():
            outputs.append(_in_batches(name, exported, stored, size))
    found = compared(torch.cat(wanted), {size: torch.cat(outputs) for size, outputs in by_size.items()}, targets)
    if not found.passed:
        raise ParityError(
            f"the {name} export does not answer as the tuned model",
            where=f"the test split, {found.samples} samples, batches of {', '.join(map(str, BATCHES))}",
            why=f"an answer is off by {found.largest:.3g} ({MOST:g} is allowed); {found.different} other classes",
            fix="nothing was written; export it as safetensors, or report the network",
        )
    return found


def compared(wanted: Tensor, found: dict[int, Tensor], targets: Targets) -> Parity:
    """Outputs (n, k) of the tuned model beside those of the exported one by batch size."""
    largest, different, near_ties = 0.0, 0, 0
    answers = answers_of(targets, wanted)
    for outputs in found.values():
        others = answers_of(targets, outputs)
        largest = max(largest, deviation(others, answers))
        if others.shape != answers.shape:
            continue
        suspects = (others.argmax(1) != answers.argmax(1)) | ((others >= 0.5) != (answers >= 0.5)).any(1)
        for row in suspects.nonzero().flatten().tolist():
            if _words(targets.describe(outputs[row])) != _words(targets.describe(wanted[row])):
                tie = float((others[row] - answers[row]).abs().max()) <= MOST
                near_ties, different = near_ties + tie, different + (not tie)
    return Parity(len(wanted), tuple(found), largest, different, near_ties)


def deviation(found: Tensor, wanted: Tensor) -> float:
    """The largest difference of two sets of answers, relative where they exceed 1; infinite where one is no number."""
    if found.shape != wanted.shape:
        return float("inf")
    far = (found.double() - wanted.double()).abs() / wanted.double().abs().clamp_min(1.0)
    return float(far.nan_to_num(nan=float("inf"), posinf=float("inf")).max())


def _in_batches(name: str, exported: Forward, stored: Inputable, batch_size: int) -> Tensor:
    """What the exported model gives for a block of stored inputs, asked for in batches."""
    count = len(next(iter(tensors_of(stored).values())))
    try:
        return torch.cat([exported(Stored(stored).fetch(rows)) for rows in in_turn(count, batch_size)])
    except Exception as error:
        raise ParityError(
            f"the {name} export cannot answer a batch of {batch_size}",
            why=f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}",
            fix="nothing was written; export it as safetensors, or report the network",
        ) from error


def _words(value: Any) -> Any:
    """A described answer without its numbers."""
    if isinstance(value, dict):
        return {key: _words(item) for key, item in value.items() if not isinstance(item, float)}
    return value
