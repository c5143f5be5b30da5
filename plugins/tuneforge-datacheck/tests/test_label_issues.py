"""Wrong labels planted in scikit-learn's digits are found, and excluding them recovers the accuracy that they cost.

`TUNEFORGE_SEEDS=10` runs ten seeds and the training runs, which CI leaves out (about ten minutes).
"""

import os

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tuneforge_datacheck.label_issues import find_label_issues

import tuneforge as tf
from tuneforge.sklearn import data_from_arrays

SEEDS = int(os.environ.get("TUNEFORGE_SEEDS", "0"))
INITIALIZATIONS = 8


def plant_wrong_labels(labels, seed, *, fraction=0.1):
    """Replace a fraction of the labels by another class at random; return the labels and the rows that changed."""
    rng = np.random.default_rng(seed)
    rows = rng.choice(len(labels), int(fraction * len(labels)), replace=False)
    noisy = labels.copy()
    noisy[rows] = (noisy[rows] + rng.integers(1, 10, len(rows))) % 10
    return noisy, rows


def mean_test_accuracy(directory, features, labels, test, seed):
    """Train networks with tuneforge on the labels; return their mean accuracy on a clean test set."""
    train, val = train_test_split(np.arange(len(labels)), test_size=0.15, random_state=seed)
    held_out = {"x_val": features[val], "y_val": labels[val], "x_test": test[0], "y_test": test[1]}
    steps = [tf.Phase("all", train="all", epochs=20, lr=5e-3, restore_best=False)]
    accuracies = []
    for number in range(INITIALIZATIONS):
        torch.manual_seed(number)
        network = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 10))
        data = data_from_arrays(features[train], labels[train], **held_out)
        engine = tf.Engine(
            data=data, model=network, strategy=steps, seed=number, out=directory / str(number), page=False
        )
        accuracies.append(engine.run().report["splits"]["test"]["accuracy"])
    return np.mean(accuracies)


def digits_with_wrong_labels(seed):
    """Return features, clean labels, noisy labels, rows of the wrong ones, and a clean test set."""
    features, labels = load_digits(return_X_y=True)
    features = (features / 16).astype(np.float32)
    rows, held_out = train_test_split(np.arange(len(labels)), test_size=0.25, random_state=seed, stratify=labels)
    noisy, wrong = plant_wrong_labels(labels[rows], seed)
    return features[rows], labels[rows], noisy, wrong, (features[held_out], labels[held_out])


@pytest.mark.parametrize("seed", range(max(2, SEEDS)))
def test_planted_wrong_labels_are_found(seed):
    features, _, noisy, wrong, _ = digits_with_wrong_labels(seed)
    found = find_label_issues(features, noisy).rows
    precision, recall = (len(np.intersect1d(found, wrong)) / len(each) for each in (found, wrong))
    print(f"\nseed {seed}: precision {precision:.3f}, recall {recall:.3f}")
    assert precision >= 0.8
    assert recall >= 0.8


def test_suggested_class_of_a_planted_wrong_label_is_the_clean_label():
    features, clean, noisy, wrong, _ = digits_with_wrong_labels(0)
    result = find_label_issues(features, noisy)
    planted = np.isin(result.rows, wrong)
    assert (result.suggested_classes[planted] == clean[result.rows[planted]]).mean() >= 0.95
    assert (np.diff(result.margins) <= 0).all()


def test_labels_of_fewer_than_two_large_classes_are_not_checked():
    features = np.random.default_rng(0).normal(size=(12, 3)).astype(np.float32)
    assert find_label_issues(features, np.array([0] * 10 + [1] * 2)) is None


@pytest.mark.parametrize("seed", range(SEEDS))
def test_excluding_label_issues_recovers_half_of_the_accuracy_that_wrong_labels_cost(tmp_path, seed):
    features, labels, noisy, _, test = digits_with_wrong_labels(seed)
    kept = np.setdiff1d(np.arange(len(labels)), find_label_issues(features, noisy).rows)
    clean = mean_test_accuracy(tmp_path / "clean", features, labels, test, seed)
    with_wrong = mean_test_accuracy(tmp_path / "noisy", features, noisy, test, seed)
    cleaned = mean_test_accuracy(tmp_path / "cleaned", features[kept], noisy[kept], test, seed)
    print(f"\nseed {seed}: accuracy with clean labels {clean:.3f}, noisy {with_wrong:.3f}, cleaned {cleaned:.3f}")
    if clean - with_wrong > 0.01:
        assert cleaned - with_wrong >= (clean - with_wrong) / 2
