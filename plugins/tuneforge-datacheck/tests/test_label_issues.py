"""Wrong labels planted in the real digits are found, and training without them wins back what they cost.

`TUNEFORGE_SEEDS=10` does all ten seeds, and the trainings, which CI leaves out (about ten minutes).
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
INITS = 8


def planted(codes, seed, *, share=0.1):
    """The labels with a share of them replaced by another class at random, and which."""
    rng = np.random.default_rng(seed)
    rows = rng.choice(len(codes), int(share * len(codes)), replace=False)
    noisy = codes.copy()
    noisy[rows] = (noisy[rows] + rng.integers(1, 10, len(rows))) % 10
    return noisy, rows


def accuracy(folder, features, codes, test, seed):
    """Of networks that tuneforge trains on labels, on a clean test: the mean over some beginnings."""
    train, val = train_test_split(np.arange(len(codes)), test_size=0.15, random_state=seed)
    held = {"x_val": features[val], "y_val": codes[val], "x_test": test[0], "y_test": test[1]}
    steps = [tf.Phase("all", train="all", epochs=20, lr=5e-3, restore_best=False)]
    figures = []
    for init in range(INITS):
        torch.manual_seed(init)
        network = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 10))
        data = data_from_arrays(features[train], codes[train], **held)
        engine = tf.Engine(data=data, model=network, strategy=steps, seed=init, out=folder / str(init), page=False)
        figures.append(engine.run().report["splits"]["test"]["accuracy"])
    return np.mean(figures)


def digits_with_wrong_labels(seed):
    """Features, clean labels, labels as given, rows of the wrong ones; and a clean test."""
    features, codes = load_digits(return_X_y=True)
    features = (features / 16).astype(np.float32)
    rows, held_out = train_test_split(np.arange(len(codes)), test_size=0.25, random_state=seed, stratify=codes)
    noisy, wrong = planted(codes[rows], seed)
    return features[rows], codes[rows], noisy, wrong, (features[held_out], codes[held_out])


@pytest.mark.parametrize("seed", range(max(2, SEEDS)))
def test_planted_wrong_labels_are_found(seed):
    features, _, noisy, wrong, _ = digits_with_wrong_labels(seed)
    found = find_label_issues(features, noisy).rows
    precision, recall = (len(np.intersect1d(found, wrong)) / len(each) for each in (found, wrong))
    print(f"\nseed {seed}: precision {precision:.3f}, recall {recall:.3f}")
    assert precision >= 0.8
    assert recall >= 0.8


@pytest.mark.parametrize("seed", range(SEEDS))
def test_leaving_out_the_found_ones_wins_back_half_of_what_wrong_labels_cost(tmp_path, seed):
    features, codes, noisy, _, test = digits_with_wrong_labels(seed)
    kept = np.setdiff1d(np.arange(len(codes)), find_label_issues(features, noisy).rows)
    clean = accuracy(tmp_path / "clean", features, codes, test, seed)
    hurt = accuracy(tmp_path / "noisy", features, noisy, test, seed)
    healed = accuracy(tmp_path / "cleaned", features[kept], noisy[kept], test, seed)
    print(f"\nseed {seed}: accuracy clean {clean:.3f}, with wrong labels {hurt:.3f}, without the found {healed:.3f}")
    if clean - hurt > 0.01:
        assert healed - hurt >= (clean - hurt) / 2
