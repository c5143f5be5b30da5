"""The paper's result at a small scale: the best block to train is the one that the shift concerns.

Six networks are trained on clusters of points, then one block of each on 90 points of a shifted distribution.
"""

import copy
import statistics

import pytest
import torch
from small_models import CLASSES, make_blobs, make_network
from tuneforge_surgical import Surgical

import tuneforge as tf
from tuneforge.sklearn import data_from_arrays


def flip_input_signs(inputs, classes, seed):
    """Flip the sign of some features."""
    signs = torch.where(torch.rand(6, generator=torch.Generator().manual_seed(seed)) < 0.5, -1.0, 1.0)
    return inputs * signs, classes


def reverse_classes(inputs, classes, seed):
    """Rename class k to 2 - k."""
    del seed
    return inputs, 2 - classes


@pytest.fixture
def accuracy(tune):
    """Train one block and return the test accuracy: `accuracy(net, "first", data, seed)`."""

    def train_block(net, block, data, seed):
        recorded = tune(Surgical(block=block, epochs=40, lr=0.01), net=copy.deepcopy(net), data=data, seed=seed)
        return recorded.result.report["splits"]["test"]["accuracy"]

    return train_block


def test_training_the_shifted_block_is_more_accurate_than_training_another(tune, accuracy):
    improvements = {"first": [], "last": []}  # of the block that the paper names over the other one
    for seed in range(6):
        net = make_network(seed)
        tune(tf.use("full", epochs=20, lr=0.01), net=net, data=make_blobs(600, seed), seed=seed)
        for shifted, best, other in ((flip_input_signs, "first", "last"), (reverse_classes, "last", "first")):
            x, y = shifted(*make_blobs(600, seed + 100), seed=seed + 7)
            data = data_from_arrays(x[:90], y[:90], val=0.3, x_test=x[90:], y_test=y[90:], names=CLASSES)
            improvements[best].append(accuracy(net, best, data, seed) - accuracy(net, other, data, seed))
    for each in improvements.values():
        assert statistics.mean(each) > statistics.stdev(each) / len(each) ** 0.5, improvements
