"""Random numbers in a dataset: a sample's draw follows from seed, epoch and sample, whatever generator it uses."""

import functools
import random

import numpy as np
import pytest
import torch
from tiny import StubRun, tiny_net
from torch.utils.data import Dataset, TensorDataset
from torch.utils.data import Subset as TorchSubset

import tuneforge as tf
from tuneforge.engine.data.loader import fetch_batches
from tuneforge.engine.data.sample_seeds import epoch_key
from tuneforge.sklearn import data_from_arrays

MODULE_RNG = np.random.default_rng(0)


class Drawing(Dataset):
    """Row number and a random number, drawn by `draw`; three classes."""

    def __init__(self, draw, size=96):
        self.draw, self.size = draw, size

    def __len__(self):
        return self.size

    def __getitem__(self, row):
        return torch.tensor([float(row), *(float(self.draw()) for _ in range(7))]), row % 3


class HoldsGenerator:
    """A transform with a generator of its own, as albumentations has."""

    def __init__(self):
        self.rng = np.random.RandomState(0)
        self.others = {"list": [torch.Generator(), random.Random(0)]}

    def __call__(self):
        return self.rng.rand() + self.others["list"][1].random() + torch.rand(1, generator=self.others["list"][0])


def closure(rng):
    return lambda: rng.random()


DRAWS = {
    "numpy": lambda: np.random.normal(),
    "python": random.random,
    "torch": lambda: torch.randn(1),
    "own numpy generator": np.random.default_rng(0).normal,
    "own generators in an attribute": HoldsGenerator(),
    "closure": closure(random.Random(1)),
    "partial": functools.partial(np.random.default_rng(5).normal, 2.0, 1.0),
    "generator of the module": lambda: MODULE_RNG.random(),
}


@pytest.fixture(params=DRAWS.values(), ids=DRAWS.keys())
def split(request, run_stub):
    return data_from_arrays(Drawing(request.param)).data_prepare(run_stub).train


@pytest.fixture
def run_stub():
    return StubRun


def test_a_draw_depends_on_key_and_sample_alone(split):
    rows = torch.tensor([3, 9, 0, 27])
    together = split.fetch(rows, epoch_key(0, 1))
    alone = torch.cat([split.fetch(row[None], epoch_key(0, 1)) for row in rows.flip(0)]).flip(0)
    assert torch.equal(together, alone)
    other = split.fetch(rows, epoch_key(0, 2))
    assert torch.equal(other[:, 0], together[:, 0])
    assert (other[:, 1:] != together[:, 1:]).all()
    assert len(together[:, 1:].unique()) == 28


def test_workers_draw_the_same(split):
    rows = [torch.arange(start, start + 8) for start in (0, 16, 8)]
    drawn = [
        torch.cat([stored for _, stored in fetch_batches(split, iter(rows), workers=workers, key=7)])
        for workers in (0, 2)
    ]
    assert torch.equal(*drawn)


def test_generators_get_their_states_back(run_stub):
    own = np.random.default_rng(3)
    split = data_from_arrays(Drawing(own.random)).data_prepare(run_stub).train
    states = own.bit_generator.state, torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    split.fetch(torch.arange(4))
    after = own.bit_generator.state, torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    assert [str(each) for each in states] == [str(each) for each in after]


def test_a_run_says_that_samples_are_random_and_repeats_them(tune):
    def weights(**settings):
        lines = []
        dataset = Drawing(lambda: random.random() + np.random.rand())
        result = tune(
            [tf.Phase("all", train="all", epochs=2)], data=dataset, model=tiny_net(), log=lines.append, **settings
        )
        assert any("the samples are random" in line for line in lines)
        return result.model.module.head.weight

    first = weights()
    random.seed(123)
    np.random.seed(123)
    assert torch.equal(weights(num_workers=2), first)
    assert not torch.equal(weights(seed=1), first)


@pytest.mark.parametrize("draw", [lambda: np.random.default_rng().random(), random.SystemRandom().random])
def test_draws_that_no_seed_repeats_are_refused(draw, run_stub):
    with pytest.raises(tf.DataError, match="random numbers that no seed repeats"):
        data_from_arrays(Drawing(draw)).data_prepare(run_stub)


def test_a_random_target_is_refused(run_stub):
    class Rotated(Drawing):
        def __getitem__(self, row):
            turn = random.randrange(4)
            return torch.tensor([float(row), turn]), turn

    with pytest.raises(tf.DataError, match="returns the target"):
        data_from_arrays(Rotated(None)).data_prepare(run_stub)


def test_a_tensor_dataset_with_its_own_getitem_keeps_it(run_stub):
    class Noisy(TensorDataset):
        def __getitem__(self, row):
            inputs, target = super().__getitem__(row)
            return inputs + torch.randn_like(inputs), target

    dataset = Noisy(torch.zeros(30, 4), torch.arange(30) % 3)
    for each in (dataset, TorchSubset(dataset, range(30))):
        assert len(data_from_arrays(each).data_prepare(run_stub).train.fetch(torch.arange(10)).unique()) == 40


def test_a_source_without_seeds_of_its_own_is_fetched_sample_by_sample():
    class Noise:
        def __len__(self):
            return 20

        def fetch(self, indices):
            return {"x": torch.randn(len(indices), 2)}

    split = tf.Split(Noise(), torch.zeros(20)).subset(torch.arange(5, 20))
    rows = torch.arange(10)
    assert torch.equal(split.fetch(rows)["x"][4:6], split.fetch(rows[4:6])["x"])
    assert not torch.equal(split.fetch(rows, 1)["x"], split.fetch(rows)["x"])
