"""Monitoring of a served model: accuracy on labeled requests, and drift of confidence and inputs.

Drift is detected by a two-sample Kolmogorov-Smirnov test of each feature against the reference in the bundle, with
Bonferroni's correction, which did best among simple tests in Rabanser et al. 2019 (arXiv 1810.11953). A bundle has
several references: the test split, and requests from before each retraining round. Recent requests have drifted if they
differ from all of them.

Shapes: n recent requests, m samples of the reference, d features of an input, k classes.
"""

from __future__ import annotations

import math
from typing import Any

import attrs
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tuneforge import TensorTree
from tuneforge.exporting import ReferenceData, summarize_inputs
from tuneforge_serve.feedback.request_log import RequestLog

Doubles = NDArray[np.float64]

DRIFT_ALPHA = 1e-3
"""Corrected p values below this count as drift; it is small because monitoring tests again and again."""

NUM_RECENT = 500
"""The number of recent requests, and of labeled requests, that are used."""

MIN_REQUESTS = 30
"""With fewer requests, drift is not tested."""


@attrs.frozen
class ProportionInterval:
    """A proportion with its 95 % interval.

    Args:
        num_correct: The numerator.
        total: The denominator.
        low: Lower end of the interval.
        high: Upper end of the interval.
    """

    num_correct: int
    total: int
    low: float
    high: float

    @property
    def proportion(self) -> float:
        """The proportion; NaN if `total` is 0."""
        return self.num_correct / self.total if self.total else math.nan


@attrs.frozen
class DriftTest:
    """A two-sample test against a reference.

    Args:
        statistic: The largest distance of the two distribution functions, 0 to 1.
        p_value: The p value, corrected for the number of features, at most 1.
        feature_index: The feature with the largest distance.
        num_requests: The number of recent requests, n.
    """

    statistic: float
    p_value: float
    feature_index: int
    num_requests: int

    @property
    def is_drift(self) -> bool:
        """True if the recent requests differ from the reference."""
        return self.p_value < DRIFT_ALPHA


@attrs.frozen
class MonitoringReport:
    """The monitoring of one version of a model.

    Args:
        version: The version.
        accuracy: The accuracy on labeled requests. It underestimates the accuracy on all requests if people label the
            least certain predictions first.
        confidence_drift: Drift of the largest probability; None without a reference or with too few requests.
        input_drift: Drift of the input features; None without a reference or with too few requests.
        mean_confidence: The mean of the largest probability over recent requests; None without requests.
    """

    version: str
    accuracy: ProportionInterval
    confidence_drift: DriftTest | None
    input_drift: DriftTest | None
    mean_confidence: float | None

    @property
    def has_drift(self) -> bool:
        """True if the confidence or the inputs have drifted."""
        return any(each is not None and each.is_drift for each in (self.confidence_drift, self.input_drift))

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON data."""
        proportion = None if not self.accuracy.total else self.accuracy.proportion
        return {
            **attrs.asdict(self),
            "accuracy": {**attrs.asdict(self.accuracy), "proportion": proportion},
            "has_drift": self.has_drift,
        }


def monitor_version(
    request_log: RequestLog, reference: ReferenceData | None, *, version: str, num_recent: int = NUM_RECENT
) -> MonitoringReport:
    """Compute the monitoring report of a version from its most recent requests.

    Args:
        request_log: The request log.
        reference: The reference data of the version's bundle; None skips the drift tests.
        version: The version.
        num_recent: The number of recent requests, and of labeled requests, to use.
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
        accuracy=wilson_interval(sum(predicted == label for predicted, label in labeled), len(labeled)),
        confidence_drift=confidence_drift,
        input_drift=input_drift,
        mean_confidence=float(confidences.mean()) if len(confidences) else None,
    )


def compute_features(stored: TensorTree) -> list[bytes]:
    """Return the features that drift is tested on, for each stored input of a batch, as float32 bytes."""
    summaries: Tensor = summarize_inputs(stored)
    return [row.astype(np.float32).tobytes() for row in summaries.numpy()]


def find_closest_drift(reference: Tensor, reference_ids: Tensor, recent: Doubles) -> DriftTest | None:
    """Test recent rows against the reference that they differ from least; return None if there are too few rows.

    Args:
        reference: Rows of all references (m, d).
        reference_ids: The reference that each row belongs to (m,).
        recent: Recent rows (n, d).
    """
    references = (reference[reference_ids == each].double().numpy() for each in torch.unique(reference_ids))
    tests = [each for each in (run_drift_test(rows, recent) for rows in references) if each is not None]
    return max(tests, key=lambda each: (each.p_value, -each.statistic), default=None)


def run_drift_test(reference: Doubles, recent: Doubles) -> DriftTest | None:
    """Test whether recent rows (n, d) have the distribution of the reference (m, d).

    Each feature has a Kolmogorov-Smirnov test with the asymptotic p value, which ties make conservative. The smallest p
    value counts, multiplied by d.

    Returns:
        The test; None for fewer than `MIN_REQUESTS` rows.
    """
    from scipy import stats

    if min(len(reference), len(recent)) < MIN_REQUESTS:
        return None
    tests = [stats.ks_2samp(*columns, method="asymp") for columns in zip(reference.T, recent.T, strict=True)]
    feature_index = int(np.argmax([each.statistic for each in tests]))
    worst = tests[feature_index]
    p_value = min(1.0, float(worst.pvalue) * len(tests))
    return DriftTest(float(worst.statistic), p_value, feature_index, len(recent))


def wilson_interval(num_correct: int, total: int) -> ProportionInterval:
    """Return the 95 % interval of a proportion (Wilson 1927), which keeps its coverage for small and extreme counts."""
    from scipy import stats

    if not total:
        return ProportionInterval(0, 0, 0.0, 1.0)
    interval = stats.binomtest(num_correct, total).proportion_ci(method="wilson")
    return ProportionInterval(num_correct, total, float(interval.low), float(interval.high))
