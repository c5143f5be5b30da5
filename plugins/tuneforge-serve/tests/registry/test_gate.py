"""The gate promotes a better model and no other one, and gives the reason in one sentence.

The full set of equally good pairs: `TUNEFORGE_PAIRS=200 python -m pytest plugins/tuneforge-serve/tests/registry`.
"""

import os
import time

import attrs
import numpy as np
import pytest
import torch
from bundles import answering, one_hot, rows_as_inputs
from scipy import stats
from tuneforge_serve import GateRules, run_gate
from tuneforge_serve.registry.gate import PairedSplit
from tuneforge_serve.registry.significance import accuracy_loss_bound, min_samples, superiority_test

import tuneforge as tf
from tuneforge.builtin.targets import ClassTargets, MultilabelTargets, RegressionTargets
from tuneforge.exporting import ReferenceData
from tuneforge.exporting.reference_outputs import hash_samples

PAIRS = int(os.environ.get("TUNEFORGE_PAIRS", "40"))
LABELS = np.arange(300) % 3
OLD = rows_as_inputs(LABELS)


def wrong_at(*rows, of=LABELS):
    """Return a model that is correct except on these rows."""
    labels = of.copy()
    labels[list(rows)] = (labels[list(rows)] + 1) % 3
    return answering(one_hot(labels))


def trained_on(model, seen):
    """Record in a model the digests of its training samples."""
    empty = torch.zeros(1, 1)
    found, counts = seen.unique(return_counts=True)
    model.reference_data = ReferenceData(empty, empty, empty, empty, found, counts[counts > 1].sum() / counts.sum())
    return model


def test_better_model_is_promoted_and_the_reason_has_the_metrics():
    decision = run_gate(wrong_at(*range(60)), wrong_at(*range(30)), OLD)
    assert decision.promoted
    assert decision.reason.startswith("it is significantly better on the old test set (0.9000 versus 0.8000, p = ")
    assert all(check.passed for check in decision.checks)
    assert decision.test_sets["old"] == {
        "fingerprint": OLD.fingerprint(),
        "num_samples": 300,
        "num_skipped": 0,
        "num_uses": 0,
    }
    assert decision.format_table().splitlines()[-1] == f"promoted: {decision.reason}"


def test_no_significant_difference_keeps_the_champion_unless_equal_is_accepted():
    pair = wrong_at(*range(30)), wrong_at(*range(5, 33))
    kept = run_gate(*pair, OLD)
    assert not kept.promoted
    assert kept.reason.startswith("there is no significant difference on the old test set (0.9067 versus 0.9000")
    assert run_gate(*pair, OLD, rules=GateRules(accept_equal=True)).promoted


def test_worse_model_is_refused_even_if_equal_is_accepted():
    decision = run_gate(
        wrong_at(), wrong_at(*range(12)), OLD, rules=GateRules(accept_equal=True, non_inferiority_margin=0.5)
    )
    assert not decision.promoted
    assert decision.reason.startswith("it is significantly worse on the old test set (0.9600 versus 1.0000")


def test_first_version_only_needs_the_minimum_recall():
    first = run_gate(None, wrong_at(*range(60)), OLD)
    assert first.promoted
    assert first.reason == "it is the first version, and every class reaches the minimum recall"
    ones = np.flatnonzero(LABELS == 1)[:60]
    decision = run_gate(None, wrong_at(*ones), OLD)
    assert not decision.promoted
    assert decision.reason == "its recall of class 'b' is 0.4000, below the minimum of 0.5"


def test_class_below_the_minimum_recall_is_refused_however_good_the_others():
    ones = np.flatnonzero(LABELS == 1)
    others = np.flatnonzero(LABELS != 1)
    decision = run_gate(wrong_at(*others[:100]), wrong_at(*ones[:55]), OLD)
    assert not decision.promoted
    assert "recall of class 'b' is 0.4500" in decision.reason
    assert run_gate(wrong_at(*others[:100]), wrong_at(*ones[:55]), OLD, rules=GateRules(min_recall=0.4)).promoted


@pytest.mark.parametrize("margin", [0.005, 0.02, 0.1])
def test_samples_that_an_equal_model_needs_are_the_fewest_that_suffice(margin):
    needed = min_samples(margin)
    bounds = [accuracy_loss_bound(*[torch.ones(count, dtype=torch.bool)] * 2)[1] for count in (needed - 1, needed)]
    assert bounds[1] <= margin < bounds[0]


def test_refusal_of_an_equal_model_on_few_samples_says_how_many_are_needed():
    few = rows_as_inputs(LABELS).subset(torch.arange(60))
    decision = run_gate(wrong_at(), wrong_at(), few, rules=GateRules(accept_equal=True))
    assert not decision.promoted
    assert f"needs at least {min_samples(0.02)} samples; --non-inferiority-margin sets the margin" in decision.reason


def test_new_test_set_decides_and_old_test_set_needs_non_inferiority():
    truths = np.concatenate([LABELS, LABELS])
    old, new = rows_as_inputs(truths).subset(torch.arange(300)), rows_as_inputs(truths).subset(torch.arange(300, 600))
    lost = range(300, 420)
    decision = run_gate(wrong_at(*lost, of=truths), wrong_at(0, 1, of=truths), old, new)
    assert decision.promoted
    assert decision.reason.startswith("it is significantly better on the new test set (1.0000 versus 0.6000")
    forgetful = run_gate(wrong_at(*lost, of=truths), wrong_at(*range(12), of=truths), old, new)
    assert not forgetful.promoted
    assert forgetful.reason == (
        "it may be inferior on the old test set: it loses +4.00 points, upper bound +5.98, and the margin is 2"
    )
    same = run_gate(wrong_at(*lost, of=truths), wrong_at(*lost, of=truths), old, new)
    assert same.reason.startswith("there is no significant difference on the new test set")


def test_classes_are_matched_by_name_and_may_be_added():
    truths = np.array([0, 1, 2] * 100)
    labels = np.array([{0: 2, 1: 0, 2: 3}[each] for each in truths])
    grown = answering(one_hot(labels, 4), names=("b", "new", "a", "c"))
    decision = run_gate(wrong_at(*range(60)), grown, OLD)
    assert decision.promoted
    assert "(1.0000 versus 0.8000" in decision.reason
    labels[:30] = 1
    named_new = run_gate(wrong_at(*range(60)), answering(one_hot(labels, 4), names=("b", "new", "a", "c")), OLD)
    assert "(0.9000 versus 0.8000" in named_new.reason


def test_class_unknown_to_the_champion_counts_as_wrong_for_it():
    new = rows_as_inputs(np.full(100, 3))
    champion = answering(one_hot(np.zeros(300, dtype=int)))
    challenger = answering(one_hot(np.full(300, 3), 4), names=("a", "b", "c", "d"))
    old = rows_as_inputs(np.full(300, 0))
    decision = run_gate(
        champion,
        challenger,
        old.subset(torch.arange(100, 300)),
        new,
        rules=GateRules(non_inferiority_margin=1.1, min_recall=0.0),
    )
    assert decision.promoted
    assert "on the new test set (1.0000 versus 0.0000" in decision.reason


def test_missing_class_name_is_refused():
    decision = run_gate(wrong_at(), answering(one_hot(LABELS), names=("a", "b", "x")), OLD)
    assert not decision.promoted
    assert decision.reason == "the challenger does not know 'c', which the champion does"


def test_test_set_that_the_challenger_trained_on_is_refused():
    decision = run_gate(wrong_at(*range(60)), trained_on(wrong_at(), hash_samples(OLD)), OLD)
    assert not decision.promoted
    assert decision.reason.startswith("the challenger trained on 100.0 % of the old test set")


def test_duplicate_rows_of_a_table_are_not_taken_for_training_on_the_test_set():
    """In a table with few distinct rows, every test row also occurs among the training rows."""
    values = torch.arange(300, dtype=torch.float32)[:, None] // 30
    test, train = tf.Split(values, torch.from_numpy(LABELS)), tf.Split(values, torch.from_numpy(LABELS))
    decision = run_gate(None, trained_on(wrong_at(), hash_samples(train)), test, rules=GateRules(min_recall=0.0))
    assert decision.promoted
    assert decision.test_sets["old"]["num_samples"] == 300


@pytest.mark.parametrize("of", ["champion", "challenger"])
def test_few_samples_that_a_model_trained_on_are_skipped(of):
    champion, challenger = wrong_at(*range(60)), wrong_at(*range(15, 30))
    trained_on(champion if of == "champion" else challenger, hash_samples(OLD.subset(torch.arange(15))))
    decision = run_gate(champion, challenger, OLD)
    assert decision.promoted
    assert "(0.9474 versus 0.8421" in decision.reason
    assert (decision.test_sets["old"]["num_samples"], decision.test_sets["old"]["num_skipped"]) == (285, 15)
    assert "15 skipped because a model trained on them" in decision.format_table()


def test_format_that_failed_parity_is_refused():
    crooked = answering(one_hot(LABELS), formats={"onnx": {"parity": {"passed": False}}})
    decision = run_gate(wrong_at(*range(60)), crooked, OLD)
    assert not decision.promoted
    assert decision.reason == "the predictions of the onnx export differ from those of the fine-tuned model"


def test_other_preprocessing_is_refused():
    other = wrong_at()
    other.inputs = attrs.evolve(other.inputs, means=(1.0,), scales=(2.0,))
    decision = run_gate(wrong_at(*range(60)), other, OLD)
    assert not decision.promoted
    assert "other preprocessing or other targets" in decision.reason


def test_paired_split_gives_each_model_its_stored_form():
    other = wrong_at(*range(30))
    other.inputs = attrs.evolve(other.inputs, means=(1.0,), scales=(2.0,))
    forward = other._forward
    other._forward = lambda stored: forward(stored * 2 + 1)
    shifted = tf.Split((OLD.source.inputs - 1) / 2, OLD.targets)
    decision = run_gate(
        wrong_at(*range(60)),
        trained_on(other, hash_samples(shifted.subset(torch.arange(9)))),
        PairedSplit(OLD, shifted),
    )
    assert decision.promoted
    assert (decision.test_sets["old"]["num_samples"], decision.test_sets["old"]["num_skipped"]) == (291, 9)
    assert "(0.9278 versus 0.8247" in decision.reason


def test_slow_model_is_refused():
    slow = wrong_at()
    fast, answer = slow._forward, lambda stored: (time.sleep(0.004), fast(stored))[1]
    slow._forward = answer
    decision = run_gate(wrong_at(*range(60)), slow, OLD)
    assert not decision.promoted
    assert "times as long, and 2 times is the limit" in decision.reason
    assert run_gate(wrong_at(*range(60)), slow, OLD, rules=GateRules(latency_ratio=1e6)).promoted


def test_decision_reports_earlier_uses_of_the_test_set():
    asked = []
    decision = run_gate(wrong_at(), wrong_at(), OLD, count_uses=lambda fingerprint: asked.append(fingerprint) or 7)
    assert asked == [OLD.fingerprint()]
    assert "used for 7 decision(s) before" in decision.format_table()


def test_regression_is_compared_by_errors():
    rng = np.random.default_rng(0)
    truth = torch.from_numpy(rng.normal(size=300)).float()
    split = tf.Split(torch.arange(300, dtype=torch.float32)[:, None], truth)
    targets = RegressionTargets(names=("price",))

    def off_by(scale, seed):
        noise = torch.from_numpy(np.random.default_rng(seed).normal(size=300) * scale).float()
        return answering((truth + noise)[:, None], targets=targets)

    assert run_gate(off_by(1.0, 1), off_by(0.5, 2), split).promoted
    other_units = RegressionTargets(names=("price",), means=(10.0,), scales=(4.0,))
    same = answering((off_by(0.5, 2).outputs(split.fetch(torch.arange(300))) - 10) / 4, targets=other_units)
    assert run_gate(off_by(1.0, 1), same, split).promoted
    kept = run_gate(off_by(1.0, 1), off_by(1.0, 3), split, rules=GateRules(non_inferiority_margin=1.0))
    assert not kept.promoted
    assert kept.reason.startswith("there is no significant difference on the old test set (error ")
    worse = run_gate(off_by(0.5, 1), off_by(1.0, 2), split)
    assert worse.reason.startswith("it is significantly worse on the old test set (error ")
    assert "loses at most 2 % of the error: +130.9" in worse.format_table()


def test_label_set_is_correct_if_every_label_is():
    truth = torch.from_numpy(np.random.default_rng(0).integers(0, 2, (300, 2))).float()
    split = tf.Split(torch.arange(300, dtype=torch.float32)[:, None], truth)
    right = 10 * truth - 5
    champion = right.clone()
    champion[:60, 1] *= -1
    grown = torch.cat([torch.full((300, 1), 5.0), right], 1)
    decision = run_gate(
        answering(champion, targets=MultilabelTargets(names=("x", "y"))),
        answering(grown, targets=MultilabelTargets(names=("z", "x", "y"))),
        split,
    )
    assert decision.promoted
    assert "(1.0000 versus 0.8000" in decision.reason


def test_equally_good_models_are_promoted_in_at_most_5_percent():
    """Predictions for real digits are swapped at random between the two models, so that neither is better."""
    predictions, labels = real_predictions()
    rng = np.random.default_rng(0)
    targets = ClassTargets(names=tuple("0123456789"))
    split = rows_as_inputs(labels)
    promoted = disagreed = 0
    for _ in range(PAIRS):
        one, other = predictions[rng.choice(len(predictions), 2, replace=False)]
        swap = rng.random(len(labels)) < 0.5
        pair = np.where(swap, other, one), np.where(swap, one, other)
        champion, challenger = (answering(one_hot(each, 10), targets=targets) for each in pair)
        disagreed += int((pair[0] != pair[1]).sum())
        promoted += run_gate(
            champion, challenger, split, rules=GateRules(min_recall=0.0, non_inferiority_margin=1.0)
        ).promoted
    print(f"{promoted} of {PAIRS} promoted; {disagreed / PAIRS:.1f} of {len(labels)} predictions differ")
    assert disagreed / PAIRS > 20
    assert promoted <= 0.05 * PAIRS


def real_predictions():
    """Return predictions (20, n) of models fitted to 80 real digits each, and the labels (n,) of the other half."""
    from sklearn.datasets import load_digits
    from sklearn.linear_model import RidgeClassifier

    images, labels = load_digits(return_X_y=True)
    half = len(labels) // 2
    fits = []
    for seed in range(20):
        rows = np.random.default_rng(seed).choice(half, 80, replace=False)
        fits.append(RidgeClassifier().fit(images[rows], labels[rows]).predict(images[half:]))
    return np.array(fits), labels[half:]


def test_bound_of_the_accuracy_loss_has_its_coverage():
    """If the loss equals the margin, at most about 5 % of the challengers count as non-inferior."""
    rng = np.random.default_rng(0)
    count, lost, won, passed, trials = 600, 0.04, 0.02, 0, 1000
    for _ in range(trials):
        draw = torch.from_numpy(rng.random(count))
        before, now = draw >= won, (draw >= lost + won) | (draw < won)
        passed += accuracy_loss_bound(before, now)[1] <= lost - won
    assert passed / trials <= 0.06


@pytest.mark.parametrize(("lost", "won"), [(0, 0), (1, 6), (5, 5), (40, 12)])
def test_mcnemar_test_is_a_binomial_test_of_the_disagreements(lost, won):
    before = torch.tensor([0.0] * lost + [1.0] * won + [0.0] * 50)
    now = torch.tensor([1.0] * lost + [0.0] * won + [0.0] * 50)
    is_better, p = superiority_test(before, now, is_classification=True)
    tail = stats.binom.cdf(min(lost, won), lost + won, 0.5)
    assert is_better == (won > lost)
    assert p == pytest.approx(min(1.0, 2 * tail))
