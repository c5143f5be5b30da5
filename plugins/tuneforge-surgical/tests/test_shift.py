"""The paper's finding at a small scale: the block that pays is the one that the shift concerns.

Six networks learn clouds of points, then meet 90 points of a shifted world, and one block of each is tuned.
"""

import copy
import statistics

import pytest
import torch
from tuneforge_surgical import Surgical
from world import CLASSES, make_blobs, make_network

import tuneforge as tf
from tuneforge.sklearn import data_from_arrays


def flip_input_signs(inputs, classes, seed):
    """Some features change sign."""
    signs = torch.where(torch.rand(6, generator=torch.Generator().manual_seed(seed)) < 0.5, -1.0, 1.0)
    return inputs * signs, classes


def reverse_classes(inputs, classes, seed):
    """What was class k is now called 2 - k."""
    del seed
    return inputs, 2 - classes


@pytest.fixture
def accuracy(tune):
    """Test accuracy of a network after one block is tuned: `accuracy(net, "first", data, seed)`."""

    def of(net, block, data, seed):
        tuned = tune(Surgical(block=block, epochs=40, lr=0.01), net=copy.deepcopy(net), data=data, seed=seed)
        return tuned.result.report["splits"]["test"]["accuracy"]

    return of


def test_the_block_that_the_shift_concerns_is_the_one_to_tune(tune, accuracy):
    gains = {"first": [], "last": []}  # of the block that the paper names over the other one
    for seed in range(6):
        net = make_network(seed)
        tune(tf.use("full", epochs=20, lr=0.01), net=net, data=make_blobs(600, seed), seed=seed)
        for shifted, best, other in ((flip_input_signs, "first", "last"), (reverse_classes, "last", "first")):
            x, y = shifted(*make_blobs(600, seed + 100), seed=seed + 7)
            data = data_from_arrays(x[:90], y[:90], val=0.3, x_test=x[90:], y_test=y[90:], names=CLASSES)
            gains[best].append(accuracy(net, best, data, seed) - accuracy(net, other, data, seed))
    for each in gains.values():
        assert statistics.mean(each) > statistics.stdev(each) / len(each) ** 0.5, gains
