"""Wrong labels planted in the real digits are found, and training without them wins back what they cost.

`TUNEFORGE_SEEDS=10` does all ten seeds, the training included (about two minutes).
"""

import os

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import tuneforge as tf
from tuneforge.check.labels import doubts

SEEDS = int(os.environ.get("TUNEFORGE_SEEDS", "1"))


def planted(codes, seed, *, share=0.1):
    """The labels with a share of them replaced by another class at random, and which."""
    rng = np.random.default_rng(seed)
    rows = rng.choice(len(codes), int(share * len(codes)), replace=False)
    noisy = codes.copy()
    noisy[rows] = (noisy[rows] + rng.integers(1, 10, len(rows))) % 10
    return noisy, rows


def accuracy(folder, features, codes, test, seed):
    """Of a network that tuneforge trains on labels, on a clean test."""
    train, val = train_test_split(np.arange(len(codes)), test_size=0.15, random_state=seed)
    held = {"x_val": features[val], "y_val": codes[val], "x_test": test[0], "y_test": test[1]}
    data = tf.data_of(features[train], codes[train], **held)
    network = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 10))
    steps = [tf.Phase("all", train="all", epochs=20, lr=5e-3, restore_best=False)]
    run = tf.Engine(data=data, model=network, strategy=steps, seed=seed, out=folder, page=False, cache="off").run()
    return run.report["splits"]["test"]["accuracy"]


@pytest.mark.parametrize("seed", range(SEEDS))
def test_planted_wrong_labels_are_found_and_leaving_them_out_wins_back_half_of_their_cost(tmp_path, seed):
    features, codes = load_digits(return_X_y=True)
    features = (features / 16).astype(np.float32)
    rows, held_out = train_test_split(np.arange(len(codes)), test_size=0.25, random_state=seed, stratify=codes)
    features, codes, test = features[rows], codes[rows], (features[held_out], codes[held_out])
    noisy, wrong = planted(codes, seed)

    found = doubts(features, noisy).rows

    precision = len(np.intersect1d(found, wrong)) / len(found)
    recall = len(np.intersect1d(found, wrong)) / len(wrong)
    kept = np.setdiff1d(np.arange(len(codes)), found)
    clean = accuracy(tmp_path / "clean", features, codes, test, seed)
    hurt = accuracy(tmp_path / "noisy", features, noisy, test, seed)
    healed = accuracy(tmp_path / "cleaned", features[kept], noisy[kept], test, seed)
    print(
        f"\nseed {seed}: precision {precision:.3f}, recall {recall:.3f}; "
        f"accuracy clean {clean:.3f}, with wrong labels {hurt:.3f}, without the found ones {healed:.3f}"
    )
    assert precision >= 0.8
    assert recall >= 0.8
    if clean - hurt > 0.01:
        assert healed - hurt >= (clean - hurt) / 2
