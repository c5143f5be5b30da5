"""Watching a model at work: accuracy on what got labelled, and drift of confidence and inputs from a reference.

Drift is a two-sample Kolmogorov-Smirnov test of each number against what the bundle remembers, with Bonferroni's
correction, which did best among simple tests in Rabanser et al. 2019 (arXiv 1810.11953). A bundle remembers several
worlds: the test split, and what production sent before each turn. Drift is said where requests are like none of them.

Shapes: n recent requests, m samples of the reference, d numbers that sum an input up, k classes.
"""

from __future__ import annotations

import math
from typing import Any

import attrs
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tuneforge.engine.data.dataset import Inputable
from tuneforge.exporting.reference_outputs import Evidence, summary
from tuneforge.ship.circle.records import Records

Doubles = NDArray[np.float64]

LEVEL = 1e-3
"""A corrected p below this is called drift; it is small because a server is watched all the time."""

LAST = 500
"""Requests and labels that are looked at."""

FEWEST = 30
"""Requests below which nothing is said of drift."""


@attrs.frozen
class Interval:
    """A share with its interval of 95 %.

    Args:
        right: How many of them.
        total: Of how many.
        low: Lower end.
        high: Upper end.
    """

    right: int
    total: int
    low: float
    high: float

    @property
    def share(self) -> float:
        """The share itself; NaN of nothing."""
        return self.right / self.total if self.total else math.nan


@attrs.frozen
class Drift:
    """A two-sample test against the reference.

    Args:
        statistic: The largest distance of two distribution functions, 0 to 1.
        p: Corrected for the number of tests, at most 1.
        place: Which number differs most.
        size: Recent requests, n.
    """

    statistic: float
    p: float
    place: int
    size: int

    @property
    def found(self) -> bool:
        """True where the recent requests differ from the reference."""
        return self.p < LEVEL


@attrs.frozen
class Watched:
    """How a model does at work.

    Args:
        version: The model.
        accuracy: On what got labelled. Where people label the least certain answers, it is lower than over all.
        confidence: Drift of the largest probability; None without a reference or with few requests.
        inputs: Drift of the inputs' summaries, likewise.
        mean_confidence: Of recent requests; None where there are none.
    """

    version: str
    accuracy: Interval
    confidence: Drift | None
    inputs: Drift | None
    mean_confidence: float | None

    @property
    def drifted(self) -> bool:
        """True where confidence or inputs differ from the reference."""
        return any(each is not None and each.found for each in (self.confidence, self.inputs))

    def plain(self) -> dict[str, Any]:
        """All of it as JSON takes it."""
        accuracy = None if not self.accuracy.total else self.accuracy.share
        return {
            **attrs.asdict(self),
            "accuracy": {**attrs.asdict(self.accuracy), "share": accuracy},
            "drifted": self.drifted,
        }


def watched(records: Records, evidence: Evidence | None, *, version: str, last: int = LAST) -> Watched:
    """How a version does at work, by its newest requests.

    Args:
        records: What production asked and people said.
        evidence: The reference that the version's bundle carries; without it nothing is said of drift.
        version: As answers name it.
        last: Requests, and labels, that are looked at.
    """
    judged = records.judged(last=last, version=version)
    recent = records.recent(last, version=version)
    confidences = np.array([each for each, _ in recent if each is not None], dtype=np.float64)
    features = [np.frombuffer(each, dtype=np.float32) for _, each in recent if each is not None]
    by_confidence = by_input = None
    if evidence is not None and len(confidences):
        by_confidence = nearest(evidence.answers.max(1).values[:, None], evidence.worlds, confidences[:, None])
    if evidence is not None and features and len(features[0]) == evidence.summaries.shape[1]:
        by_input = nearest(evidence.summaries, evidence.worlds, np.stack(features).astype(np.float64))
    return Watched(
        version=version,
        accuracy=wilson(sum(named == label for named, label in judged), len(judged)),
        confidence=by_confidence,
        inputs=by_input,
        mean_confidence=float(confidences.mean()) if len(confidences) else None,
    )


def features_of(stored: Inputable) -> list[bytes]:
    """What drift is measured on, for each stored input of a batch: its summary as float32 bytes."""
    summaries: Tensor = summary(stored)
    return [row.astype(np.float32).tobytes() for row in summaries.numpy()]


def nearest(reference: Tensor, worlds: Tensor, recent: Doubles) -> Drift | None:
    """The test against the world that recent rows (n, d) are most like; None where each is too small, or they are few.

    Args:
        reference: Rows of all worlds (m, d).
        worlds: The world of each (m,).
        recent: Recent rows (n, d).
    """
    known = (reference[worlds == each].double().numpy() for each in torch.unique(worlds))
    found = [each for each in (drift(rows, recent) for rows in known) if each is not None]
    return max(found, key=lambda each: (each.p, -each.statistic), default=None)


def drift(reference: Doubles, recent: Doubles) -> Drift | None:
    """Test whether recent rows (n, d) come from where the reference (m, d) does; None for fewer than `FEWEST`.

    Each column has a Kolmogorov-Smirnov test with the asymptotic p; ties make it careful. The smallest p counts,
    times d.
    """
    from scipy import stats

    if min(len(reference), len(recent)) < FEWEST:
        return None
    statistics = np.array([_distance(*columns) for columns in zip(reference.T, recent.T, strict=True)])
    size = round(len(reference) * len(recent) / (len(reference) + len(recent)))
    place = int(statistics.argmax())
    p = min(1.0, float(stats.kstwo.sf(statistics[place], size)) * len(statistics))
    return Drift(float(statistics[place]), p, place, len(recent))


def wilson(right: int, total: int) -> Interval:
    """The interval of 95 % of a share (Wilson 1927), which holds for few and for extreme ones."""
    if not total:
        return Interval(0, 0, 0.0, 1.0)
    z = 1.959963984540054
    share, spread = right / total, z * z / total
    middle = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / total + spread / (4 * total)) / (1 + spread)
    return Interval(right, total, max(0.0, middle - half), min(1.0, middle + half))


def _distance(first: Doubles, second: Doubles) -> float:
    """The largest distance of the distribution functions of two samples."""
    first, second = np.sort(first), np.sort(second)
    places = np.concatenate([first, second])
    below = (np.searchsorted(each, places, side="right") / len(each) for each in (first, second))
    return float(np.abs(next(below) - next(below)).max())
