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

from tuneforge.engine.data.dataset import TensorTree
from tuneforge.exporting.reference_outputs import ReferenceData, summarize
from tuneforge_serve.feedback.request_log import RequestLog

Doubles = NDArray[np.float64]

DRIFT_ALPHA = 1e-3
"""A corrected p below this is called drift; it is small because a server is watched all the time."""

NUM_RECENT = 500
"""Requests and labels that are looked at."""

MIN_REQUESTS = 30
"""Requests below which nothing is said of drift."""


@attrs.frozen
class ProportionInterval:
    """A share with its interval of 95 %.

    Args:
        num_correct: How many of them.
        total: Of how many.
        low: Lower end.
        high: Upper end.
    """

    num_correct: int
    total: int
    low: float
    high: float

    @property
    def proportion(self) -> float:
        """The share itself; NaN of nothing."""
        return self.num_correct / self.total if self.total else math.nan


@attrs.frozen
class DriftTest:
    """A two-sample test against the reference.

    Args:
        statistic: The largest distance of two distribution functions, 0 to 1.
        p_value: Corrected for the number of tests, at most 1.
        feature_index: Which number differs most.
        num_requests: Recent requests, n.
    """

    statistic: float
    p_value: float
    feature_index: int
    num_requests: int

    @property
    def is_drift(self) -> bool:
        """True where the recent requests differ from the reference."""
        return self.p_value < DRIFT_ALPHA


@attrs.frozen
class MonitoringReport:
    """How a model does at work.

    Args:
        version: The model.
        accuracy: On what got labelled. Where people label the least certain answers, it is lower than over all.
        confidence_drift: Drift of the largest probability; None without a reference or with few requests.
        input_drift: Drift of the inputs' summaries, likewise.
        mean_confidence: Of recent requests; None where there are none.
    """

    version: str
    accuracy: ProportionInterval
    confidence_drift: DriftTest | None
    input_drift: DriftTest | None
    mean_confidence: float | None

    @property
    def has_drift(self) -> bool:
        """True where confidence or inputs differ from the reference."""
        return any(each is not None and each.is_drift for each in (self.confidence_drift, self.input_drift))

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON takes it."""
        proportion = None if not self.accuracy.total else self.accuracy.proportion
        return {
            **attrs.asdict(self),
            "accuracy": {**attrs.asdict(self.accuracy), "proportion": proportion},
            "has_drift": self.has_drift,
        }


def monitor_version(
    request_log: RequestLog, reference: ReferenceData | None, *, version: str, num_recent: int = NUM_RECENT
) -> MonitoringReport:
    """How a version does at work, by its newest requests.

    Args:
        request_log: What production asked and people said.
        reference: The reference that the version's bundle carries; without it nothing is said of drift.
        version: As answers name it.
        num_recent: Requests, and labels, that are looked at.
    """
    labeled = request_log.labeled_predictions(limit=num_recent, version=version)
    recent = request_log.recent_features(num_recent, version=version)
    confidences = np.array([each for each, _ in recent if each is not None], dtype=np.float64)
    features = [np.frombuffer(each, dtype=np.float32) for _, each in recent if each is not None]
    confidence_drift = input_drift = None
    if reference is not None and len(confidences):
        confidence_drift = find_closest_drift(
            reference.predictions.max(1).values[:, None], reference.reference_ids, confidences[:, None]
        )
    if reference is not None and features and len(features[0]) == reference.summaries.shape[1]:
        input_drift = find_closest_drift(
            reference.summaries, reference.reference_ids, np.stack(features).astype(np.float64)
        )
    return MonitoringReport(
        version=version,
        accuracy=wilson_interval(sum(named == label for named, label in labeled), len(labeled)),
        confidence_drift=confidence_drift,
        input_drift=input_drift,
        mean_confidence=float(confidences.mean()) if len(confidences) else None,
    )


def compute_features(stored: TensorTree) -> list[bytes]:
    """What drift is measured on, for each stored input of a batch: its summary as float32 bytes."""
    summaries: Tensor = summarize(stored)
    return [row.astype(np.float32).tobytes() for row in summaries.numpy()]


def find_closest_drift(reference: Tensor, reference_ids: Tensor, recent: Doubles) -> DriftTest | None:
    """The test against the world that recent rows (n, d) are most like; None where each is too small, or they are few.

    Args:
        reference: Rows of all worlds (m, d).
        reference_ids: The world of each (m,).
        recent: Recent rows (n, d).
    """
    references = (reference[reference_ids == each].double().numpy() for each in torch.unique(reference_ids))
    tests = [each for each in (run_drift_test(rows, recent) for rows in references) if each is not None]
    return max(tests, key=lambda each: (each.p_value, -each.statistic), default=None)


def run_drift_test(reference: Doubles, recent: Doubles) -> DriftTest | None:
    """Test whether recent rows (n, d) come from where the reference (m, d) does; None for fewer than `MIN_REQUESTS`.

    Each column has a Kolmogorov-Smirnov test with the asymptotic p; ties make it careful. The smallest p counts,
    times d.
    """
    from scipy import stats

    if min(len(reference), len(recent)) < MIN_REQUESTS:
        return None
    statistics = np.array([_ks_distance(*columns) for columns in zip(reference.T, recent.T, strict=True)])
    size = round(len(reference) * len(recent) / (len(reference) + len(recent)))
    feature_index = int(statistics.argmax())
    p_value = min(1.0, float(stats.kstwo.sf(statistics[feature_index], size)) * len(statistics))
    return DriftTest(float(statistics[feature_index]), p_value, feature_index, len(recent))


def wilson_interval(num_correct: int, total: int) -> ProportionInterval:
    """The interval of 95 % of a share (Wilson 1927), which holds for few and for extreme ones."""
    if not total:
        return ProportionInterval(0, 0, 0.0, 1.0)
    z = 1.959963984540054
    proportion, spread = num_correct / total, z * z / total
    middle = (proportion + spread / 2) / (1 + spread)
    half = z * math.sqrt(proportion * (1 - proportion) / total + spread / (4 * total)) / (1 + spread)
    return ProportionInterval(num_correct, total, max(0.0, middle - half), min(1.0, middle + half))


def _ks_distance(first: Doubles, second: Doubles) -> float:
    """The largest distance of the distribution functions of two samples."""
    first, second = np.sort(first), np.sort(second)
    places = np.concatenate([first, second])
    below = (np.searchsorted(each, places, side="right") / len(each) for each in (first, second))
    return float(np.abs(next(below) - next(below)).max())
