"""Watching: intervals and tests agree with scipy's, stay quiet where nothing changed, and speak where something did."""

import numpy as np
import pytest
import torch
from scipy import stats
from tuneforge_serve.feedback.monitoring import compute_features, monitor_version, run_drift_test, wilson_interval
from tuneforge_serve.feedback.request_log import LoggedRequest

from tuneforge.exporting.reference_outputs import ReferenceData, summarize


def pictures(count, *, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 120, (count, 1, 8, 8), generator=generator, dtype=torch.uint8)


def evidence_of(stored, confidences):
    answers = torch.stack([confidences, 1 - confidences], 1).float()
    return ReferenceData(
        stored[:2], answers[:2], summarize(stored), answers, torch.zeros(1, dtype=torch.int64), torch.zeros(())
    )


@pytest.mark.parametrize(("right", "total"), [(0, 10), (10, 10), (7, 10), (499, 500)])
def test_interval_is_that_of_scipy(right, total):
    found, known = wilson_interval(right, total), stats.binomtest(right, total).proportion_ci(method="wilson")
    assert (found.low, found.high) == pytest.approx((known.low, known.high), abs=1e-12)
    assert found.proportion == right / total


def test_nothing_labelled_is_no_share():
    assert np.isnan(wilson_interval(0, 0).proportion)
    assert (wilson_interval(0, 0).low, wilson_interval(0, 0).high) == (0, 1)


def test_statistic_and_p_are_those_of_scipy():
    generator = np.random.default_rng(0)
    first, second = generator.normal(size=(300, 1)), generator.normal(0.3, size=(200, 1))
    found, known = run_drift_test(first, second), stats.ks_2samp(first[:, 0], second[:, 0], method="asymp")
    assert found.statistic == pytest.approx(known.statistic, abs=1e-12)
    assert found.p_value == pytest.approx(known.pvalue, rel=1e-9)


def test_no_more_false_alarms_than_the_level_says():
    generator = np.random.default_rng(1)
    reference = generator.normal(size=(400, 18))
    found = [run_drift_test(generator.normal(size=(400, 18)), generator.normal(size=(200, 18))) for _ in range(300)]
    assert sum(each.p_value < 0.05 for each in found) <= 0.08 * 300
    assert sum(each.is_drift for each in found) <= 2
    moved = generator.normal(size=(200, 18))
    moved[:, 7] += 1
    assert run_drift_test(reference, moved).is_drift
    assert run_drift_test(reference, moved).feature_index == 7


def test_few_requests_say_nothing():
    assert run_drift_test(np.zeros((400, 2)), np.zeros((29, 2))) is None


def ask(records, stored, confidences, *, start=0, version="1"):
    records.append([
        LoggedRequest(f"{version}-{start + row}", version, b"%d" % (start + row), "text/plain",
                 {"class": "a", "probability": float(confidence)}, features=features)
        for row, (confidence, features) in enumerate(zip(confidences, compute_features(stored), strict=True))
    ])  # fmt: skip


def test_the_same_world_is_quiet_and_inverted_pictures_are_not(records):
    confidences = torch.linspace(0.6, 1, 300)
    evidence = evidence_of(pictures(300, seed=0), confidences)
    ask(records, pictures(300, seed=1), confidences)
    quiet = monitor_version(records, evidence, version="1")
    assert not quiet.has_drift
    assert quiet.input_drift.num_requests == 300
    assert quiet.mean_confidence == pytest.approx(0.8, abs=1e-3)
    ask(records, 255 - pictures(100, seed=2), torch.linspace(0.6, 1, 100), version="2")
    loud = monitor_version(records, evidence, version="2")
    assert loud.input_drift.is_drift
    assert not loud.confidence_drift.is_drift
    ask(records, pictures(100, seed=3), torch.linspace(0.3, 0.6, 100), version="3")
    unsure = monitor_version(records, evidence, version="3")
    assert unsure.confidence_drift.is_drift
    assert not unsure.input_drift.is_drift


def test_accuracy_is_of_the_version_and_what_got_labelled(records):
    ask(records, pictures(10, seed=0), [0.9] * 10)
    ask(records, pictures(10, seed=0), [0.9] * 10, start=10, version="2")
    for row in range(4):
        records.label(f"1-{row}", "a" if row else "b")
    seen = monitor_version(records, None, version="1")
    assert (seen.accuracy.num_correct, seen.accuracy.total) == (3, 4)
    assert (seen.input_drift, seen.confidence_drift, seen.has_drift) == (None, None, False)
    assert monitor_version(records, None, version="2").accuracy.total == 0
    assert monitor_version(records, None, version="2").to_dict()["accuracy"]["proportion"] is None
