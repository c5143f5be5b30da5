"""Monitoring agrees with scipy, reports no drift without a change, and reports drift after one."""

import numpy as np
import pytest
import torch
from scipy import stats
from tuneforge_serve.feedback.monitoring import compute_features, monitor_version, run_drift_test, wilson_interval
from tuneforge_serve.feedback.request_log import LoggedRequest

from tuneforge.exporting import ReferenceData, summarize_inputs


def images(count, *, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 120, (count, 1, 8, 8), generator=generator, dtype=torch.uint8)


def reference_of(stored, confidences):
    predictions = torch.stack([confidences, 1 - confidences], 1).float()
    return ReferenceData(
        stored[:2],
        predictions[:2],
        summarize_inputs(stored),
        predictions,
        torch.zeros(1, dtype=torch.int64),
        torch.zeros(()),
    )


@pytest.mark.parametrize(("num_correct", "total"), [(0, 10), (10, 10), (7, 10), (499, 500)])
def test_wilson_interval_follows_its_formula(num_correct, total):
    found, z, share = wilson_interval(num_correct, total), stats.norm.ppf(0.975), num_correct / total
    center = (share + z**2 / (2 * total)) / (1 + z**2 / total)
    half = z * np.sqrt(share * (1 - share) / total + z**2 / (4 * total**2)) / (1 + z**2 / total)
    assert (found.low, found.high) == pytest.approx((center - half, center + half), abs=1e-12)
    assert found.proportion == share


def test_proportion_without_labels_is_nan():
    assert np.isnan(wilson_interval(0, 0).proportion)
    assert (wilson_interval(0, 0).low, wilson_interval(0, 0).high) == (0, 1)


def test_drift_test_equals_the_kolmogorov_smirnov_test_of_scipy():
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(300, 1)), rng.normal(0.3, size=(200, 1))
    found, known = run_drift_test(first, second), stats.ks_2samp(first[:, 0], second[:, 0], method="asymp")
    assert found.statistic == pytest.approx(known.statistic, abs=1e-12)
    assert found.p_value == pytest.approx(known.pvalue, rel=1e-9)


def test_false_alarms_stay_below_the_significance_level():
    rng = np.random.default_rng(1)
    reference = rng.normal(size=(400, 18))
    found = [run_drift_test(rng.normal(size=(400, 18)), rng.normal(size=(200, 18))) for _ in range(300)]
    assert sum(each.p_value < 0.05 for each in found) <= 0.08 * 300
    assert sum(each.is_drift for each in found) <= 2
    moved = rng.normal(size=(200, 18))
    moved[:, 7] += 1
    assert run_drift_test(reference, moved).is_drift
    assert run_drift_test(reference, moved).feature_index == 7


def test_few_requests_are_not_tested():
    assert run_drift_test(np.zeros((400, 2)), np.zeros((29, 2))) is None


def log_requests(request_log, stored, confidences, *, start=0, version="1"):
    request_log.append([
        LoggedRequest(f"{version}-{start + row}", version, b"%d" % (start + row), "text/plain",
                 {"class": "a", "probability": float(confidence)}, features=features)
        for row, (confidence, features) in enumerate(zip(confidences, compute_features(stored), strict=True))
    ])  # fmt: skip


def test_inverted_images_are_drift_and_unchanged_ones_are_not(request_log):
    confidences = torch.linspace(0.6, 1, 300)
    reference = reference_of(images(300, seed=0), confidences)
    log_requests(request_log, images(300, seed=1), confidences)
    unchanged = monitor_version(request_log, reference, version="1")
    assert not unchanged.has_drift
    assert unchanged.input_drift.num_requests == 300
    assert unchanged.mean_confidence == pytest.approx(0.8, abs=1e-3)
    log_requests(request_log, 255 - images(100, seed=2), torch.linspace(0.6, 1, 100), version="2")
    inverted = monitor_version(request_log, reference, version="2")
    assert inverted.input_drift.is_drift
    assert not inverted.confidence_drift.is_drift
    log_requests(request_log, images(100, seed=3), torch.linspace(0.3, 0.6, 100), version="3")
    unsure = monitor_version(request_log, reference, version="3")
    assert unsure.confidence_drift.is_drift
    assert not unsure.input_drift.is_drift


def test_accuracy_counts_labeled_requests_of_the_version(request_log):
    log_requests(request_log, images(10, seed=0), [0.9] * 10)
    log_requests(request_log, images(10, seed=0), [0.9] * 10, start=10, version="2")
    for row in range(4):
        request_log.label(f"1-{row}", "a" if row else "b")
    seen = monitor_version(request_log, None, version="1")
    assert (seen.accuracy.num_correct, seen.accuracy.total) == (3, 4)
    assert (seen.input_drift, seen.confidence_drift, seen.has_drift) == (None, None, False)
    assert monitor_version(request_log, None, version="2").accuracy.total == 0
    assert monitor_version(request_log, None, version="2").to_dict()["accuracy"]["proportion"] is None
