"""The gate promotes what is better and nothing else, and says why in one sentence.

The full set of equally good pairs: `TUNEFORGE_PAIRS=200 python -m pytest tests/ship/test_gate.py`.
"""

import os
import time

import attrs
import numpy as np
import pytest
import torch
from bundles import answering, one_hot, rows_as_inputs
from scipy import stats
from tuneforge_serve.registry.gate import GateRules, PairedSplit, run_gate
from tuneforge_serve.registry.significance import accuracy_loss_bound, superiority_test

import tuneforge as tf
from tuneforge.builtin.targets import ClassTargets, MultilabelTargets, RegressionTargets
from tuneforge.exporting.reference_outputs import ReferenceData, hash_samples

PAIRS = int(os.environ.get("TUNEFORGE_PAIRS", "40"))
TRUTHS = np.arange(300) % 3
OLD = rows_as_inputs(TRUTHS)


def wrong_at(*rows, of=TRUTHS):
    """Answers that are right but for these rows."""
    labels = of.copy()
    labels[list(rows)] = (labels[list(rows)] + 1) % 3
    return answering(one_hot(labels))


def trained_on(model, seen):
    """The model with the digests of what it trained on."""
    empty = torch.zeros(1, 1)
    found, counts = seen.unique(return_counts=True)
    model.reference_data = ReferenceData(empty, empty, empty, empty, found, counts[counts > 1].sum() / counts.sum())
    return model


def test_a_better_model_is_promoted_and_the_reason_has_the_figures():
    verdict = run_gate(wrong_at(*range(60)), wrong_at(*range(30)), OLD)
    assert verdict.promoted
    assert verdict.reason.startswith("it is significantly better on the old test set (0.9000 against 0.8000, p = ")
    assert all(row.passed for row in verdict.checks)
    assert verdict.test_sets["old"] == {
        "fingerprint": OLD.fingerprint(),
        "num_samples": 300,
        "num_skipped": 0,
        "num_uses": 0,
    }
    assert verdict.format_table().splitlines()[-1] == f"promoted: {verdict.reason}"


def test_no_significant_difference_keeps_the_champion_unless_told():
    pair = wrong_at(*range(30)), wrong_at(*range(5, 33))
    kept = run_gate(*pair, OLD)
    assert not kept.promoted
    assert kept.reason.startswith("there is no significant difference on the old test set (0.9067 against 0.9000")
    assert run_gate(*pair, OLD, rules=GateRules(accept_equal=True)).promoted


def test_a_worse_one_is_refused_even_where_equal_would_do():
    verdict = run_gate(
        wrong_at(), wrong_at(*range(12)), OLD, rules=GateRules(accept_equal=True, non_inferiority_margin=0.5)
    )
    assert not verdict.promoted
    assert verdict.reason.startswith("it is significantly worse on the old test set (0.9600 against 1.0000")


def test_the_first_of_a_name_must_keep_the_floors_only():
    first = run_gate(None, wrong_at(*range(60)), OLD)
    assert (first.promoted, first.reason) == (True, "it is the first of its name, and every floor holds")
    ones = np.flatnonzero(TRUTHS == 1)[:60]
    verdict = run_gate(None, wrong_at(*ones), OLD)
    assert not verdict.promoted
    assert verdict.reason == "its recall of class 'b' is 0.4000, under the floor of 0.5"


def test_a_class_under_its_floor_is_refused_however_good_the_rest():
    ones = np.flatnonzero(TRUTHS == 1)
    others = np.flatnonzero(TRUTHS != 1)
    verdict = run_gate(wrong_at(*others[:100]), wrong_at(*ones[:55]), OLD)
    assert not verdict.promoted
    assert "recall of class 'b' is 0.4500" in verdict.reason
    assert run_gate(wrong_at(*others[:100]), wrong_at(*ones[:55]), OLD, rules=GateRules(min_recall=0.4)).promoted


def test_the_new_world_decides_and_the_old_one_must_not_be_lost():
    truths = np.concatenate([TRUTHS, TRUTHS])
    old, new = rows_as_inputs(truths).subset(torch.arange(300)), rows_as_inputs(truths).subset(torch.arange(300, 600))
    lost = range(300, 420)
    verdict = run_gate(wrong_at(*lost, of=truths), wrong_at(0, 1, of=truths), old, new)
    assert verdict.promoted
    assert verdict.reason.startswith("it is significantly better on the new test set (1.0000 against 0.6000")
    forgetful = run_gate(wrong_at(*lost, of=truths), wrong_at(*range(12), of=truths), old, new)
    assert not forgetful.promoted
    assert forgetful.reason == (
        "on the old test set it loses 4.00 points; only more than 5.98 can be ruled out, and 2 are allowed"
    )
    same = run_gate(wrong_at(*lost, of=truths), wrong_at(*lost, of=truths), old, new)
    assert same.reason.startswith("there is no significant difference on the new test set")


def test_classes_are_matched_by_name_and_may_grow():
    truths = np.array([0, 1, 2] * 100)
    labels = np.array([{0: 2, 1: 0, 2: 3}[each] for each in truths])
    grown = answering(one_hot(labels, 4), names=("b", "new", "a", "c"))
    verdict = run_gate(wrong_at(*range(60)), grown, OLD)
    assert verdict.promoted
    assert "(1.0000 against 0.8000" in verdict.reason
    labels[:30] = 1
    named_new = run_gate(wrong_at(*range(60)), answering(one_hot(labels, 4), names=("b", "new", "a", "c")), OLD)
    assert "(0.9000 against 0.8000" in named_new.reason


def test_a_class_that_the_champion_never_knew_counts_as_wrong_for_it():
    new = rows_as_inputs(np.full(100, 3))
    champion = answering(one_hot(np.zeros(300, dtype=int)))
    challenger = answering(one_hot(np.full(300, 3), 4), names=("a", "b", "c", "d"))
    old = rows_as_inputs(np.full(300, 0))
    verdict = run_gate(
        champion,
        challenger,
        old.subset(torch.arange(100, 300)),
        new,
        rules=GateRules(non_inferiority_margin=1.1, min_recall=0.0),
    )
    assert verdict.promoted
    assert "on the new test set (1.0000 against 0.0000" in verdict.reason


def test_a_missing_class_name_is_refused():
    verdict = run_gate(wrong_at(), answering(one_hot(TRUTHS), names=("a", "b", "x")), OLD)
    assert not verdict.promoted
    assert verdict.reason == "the challenger does not know 'c', which the champion does"


def test_a_test_set_that_the_challenger_trained_on_is_refused():
    verdict = run_gate(wrong_at(*range(60)), trained_on(wrong_at(), hash_samples(OLD)), OLD)
    assert not verdict.promoted
    assert verdict.reason.startswith("the challenger trained on 100.0 % of the old test set")


def test_rows_that_repeat_by_chance_are_no_sign_of_training_on_the_test_set():
    """A table of few different rows: every test row occurs among the training rows, and nothing was cheated."""
    values = torch.arange(300, dtype=torch.float32)[:, None] // 30
    test, train = tf.Split(values, torch.from_numpy(TRUTHS)), tf.Split(values, torch.from_numpy(TRUTHS))
    verdict = run_gate(None, trained_on(wrong_at(), hash_samples(train)), test, rules=GateRules(min_recall=0.0))
    assert verdict.promoted
    assert verdict.test_sets["old"]["num_samples"] == 300


@pytest.mark.parametrize("of", ["champion", "challenger"])
def test_a_few_samples_that_one_of_them_trained_on_are_left_out(of):
    champion, challenger = wrong_at(*range(60)), wrong_at(*range(15, 30))
    trained_on(champion if of == "champion" else challenger, hash_samples(OLD.subset(torch.arange(15))))
    verdict = run_gate(champion, challenger, OLD)
    assert verdict.promoted
    assert "(0.9474 against 0.8421" in verdict.reason
    assert (verdict.test_sets["old"]["num_samples"], verdict.test_sets["old"]["num_skipped"]) == (285, 15)
    assert "15 left out because a model trained on them" in verdict.format_table()


def test_a_form_that_failed_its_parity_is_refused():
    crooked = answering(one_hot(TRUTHS), formats={"onnx": {"parity": {"passed": False}}})
    verdict = run_gate(wrong_at(*range(60)), crooked, OLD)
    assert (verdict.promoted, verdict.reason) == (False, "the onnx export does not answer as the tuned model")


def test_inputs_that_are_read_otherwise_are_refused():
    other = wrong_at()
    other.inputs = attrs.evolve(other.inputs, means=(1.0,), scales=(2.0,))
    verdict = run_gate(wrong_at(*range(60)), other, OLD)
    assert not verdict.promoted
    assert "reads inputs or answers otherwise" in verdict.reason


def test_a_test_set_in_two_forms_is_judged_by_what_each_model_stores():
    other = wrong_at(*range(30))
    other.inputs = attrs.evolve(other.inputs, means=(1.0,), scales=(2.0,))
    forward = other._forward
    other._forward = lambda stored: forward(stored * 2 + 1)
    shifted = tf.Split((OLD.source.inputs - 1) / 2, OLD.targets)
    verdict = run_gate(
        wrong_at(*range(60)),
        trained_on(other, hash_samples(shifted.subset(torch.arange(9)))),
        PairedSplit(OLD, shifted),
    )
    assert verdict.promoted
    assert (verdict.test_sets["old"]["num_samples"], verdict.test_sets["old"]["num_skipped"]) == (291, 9)
    assert "(0.9278 against 0.8247" in verdict.reason


def test_a_model_that_takes_too_long_is_refused():
    slow = wrong_at()
    fast, answer = slow._forward, lambda stored: (time.sleep(0.004), fast(stored))[1]
    slow._forward = answer
    verdict = run_gate(wrong_at(*range(60)), slow, OLD)
    assert not verdict.promoted
    assert "times as long, and 2 are allowed" in verdict.reason
    assert run_gate(wrong_at(*range(60)), slow, OLD, rules=GateRules(latency_ratio=1e6)).promoted


def test_it_says_how_often_the_test_set_has_decided_before():
    asked = []
    verdict = run_gate(wrong_at(), wrong_at(), OLD, count_uses=lambda fingerprint: asked.append(fingerprint) or 7)
    assert asked == [OLD.fingerprint()]
    assert "used to decide 7 time(s) before" in verdict.format_table()


def test_numbers_are_judged_by_their_errors():
    chance = np.random.default_rng(0)
    truth = torch.from_numpy(chance.normal(size=300)).float()
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


def test_label_sets_are_right_where_every_label_is():
    truth = torch.from_numpy(np.random.default_rng(0).integers(0, 2, (300, 2))).float()
    split = tf.Split(torch.arange(300, dtype=torch.float32)[:, None], truth)
    right = 10 * truth - 5
    champion = right.clone()
    champion[:60, 1] *= -1
    grown = torch.cat([torch.full((300, 1), 5.0), right], 1)
    verdict = run_gate(
        answering(champion, targets=MultilabelTargets(names=("x", "y"))),
        answering(grown, targets=MultilabelTargets(names=("z", "x", "y"))),
        split,
    )
    assert verdict.promoted
    assert "(1.0000 against 0.8000" in verdict.reason


def test_equally_good_models_are_promoted_at_most_once_in_twenty():
    """Twenty models' answers to real digits; each sample's two answers are swapped by a coin, so neither is better."""
    answers, truths = real_answers()
    chance = np.random.default_rng(0)
    targets = ClassTargets(names=tuple("0123456789"))
    split = rows_as_inputs(truths)
    promoted = disagreed = 0
    for _ in range(PAIRS):
        one, other = answers[chance.choice(len(answers), 2, replace=False)]
        swap = chance.random(len(truths)) < 0.5
        pair = np.where(swap, other, one), np.where(swap, one, other)
        champion, challenger = (answering(one_hot(each, 10), targets=targets) for each in pair)
        disagreed += int((pair[0] != pair[1]).sum())
        promoted += run_gate(
            champion, challenger, split, rules=GateRules(min_recall=0.0, non_inferiority_margin=1.0)
        ).promoted
    print(f"{promoted} of {PAIRS} promoted; {disagreed / PAIRS:.1f} of {len(truths)} answers differ")
    assert disagreed / PAIRS > 20
    assert promoted <= 0.05 * PAIRS


def real_answers():
    """Answers (20, n) of models that were fitted to 80 real digits each, and the truths (n,) of the other half."""
    from sklearn.datasets import load_digits
    from sklearn.linear_model import RidgeClassifier

    pictures, labels = load_digits(return_X_y=True)
    half = len(labels) // 2
    fits = []
    for seed in range(20):
        rows = np.random.default_rng(seed).choice(half, 80, replace=False)
        fits.append(RidgeClassifier().fit(pictures[rows], labels[rows]).predict(pictures[half:]))
    return np.array(fits), labels[half:]


def test_the_interval_of_what_is_lost_holds():
    """Where exactly the margin is lost, at most about one in twenty is taken for non-inferior."""
    chance = np.random.default_rng(0)
    count, lost, won, passed, trials = 600, 0.04, 0.02, 0, 1000
    for _ in range(trials):
        draw = torch.from_numpy(chance.random(count))
        before, now = draw >= won, (draw >= lost + won) | (draw < won)
        passed += accuracy_loss_bound(before, now)[1] <= lost - won
    assert passed / trials <= 0.06


@pytest.mark.parametrize(("lost", "won"), [(0, 0), (1, 6), (5, 5), (40, 12)])
def test_mcnemar_is_the_binomial_test_of_the_disagreements(lost, won):
    before = torch.tensor([0.0] * lost + [1.0] * won + [0.0] * 50)
    now = torch.tensor([1.0] * lost + [0.0] * won + [0.0] * 50)
    ahead, p = superiority_test(before, now, is_classification=True)
    tail = stats.binom.cdf(min(lost, won), lost + won, 0.5)
    assert ahead == (won > lost)
    assert p == pytest.approx(min(1.0, 2 * tail))
