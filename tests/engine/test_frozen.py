"""The frozen prefix: one look at the data, the same figures, and none where it is not right or does not pay."""

import random

import attrs
import pytest
import torch
from small import tiny_data, tiny_net
from torch import nn
from torch.nn import functional as F

import tuneforge as tf
from tuneforge.engine import frozen


@pytest.fixture(autouse=True)
def cheap_counts(monkeypatch):
    """The small world's layers are cheap; here that does not matter."""
    monkeypatch.setattr(frozen, "LEAST_WORK", 0.0)


def told(tune, strategy, **given):
    said = []
    result = tune(strategy, say=said.append, **given)
    return result, [line.strip() for line in said if line.strip().startswith(("cached", "not cached"))]


def weights(result):
    return {name: tensor.clone() for name, tensor in result.model.module.state_dict().items()}


PHASES = [tf.Phase("head", train="head", epochs=3, lr=0.02), tf.Phase("top", train="groups[-2:]", epochs=3, lr=0.02)]


def test_cached_and_uncached_phases_agree_and_repeat_to_the_bit(tune):
    cached, said = told(tune, PHASES, optimizer="sgd")
    again, _ = told(tune, PHASES, optimizer="sgd")
    plain, silent = told(tune, PHASES, cache="off", optimizer="sgd")
    assert [line.partition(":")[0] for line in said] == ["cached", "cached"]
    assert [line.partition(":")[0] for line in silent] == ["not cached", "not cached"]
    for name, tensor in weights(cached).items():
        assert torch.equal(tensor, weights(again)[name])
        assert torch.allclose(tensor, weights(plain)[name], atol=1e-5)


class Counting:
    """A source that counts the samples it is asked for."""

    def __init__(self, split):
        self.split, self.looks = split, 0

    def __len__(self):
        return len(self.split)

    def fetch(self, rows):
        self.looks += len(rows)
        return self.split.fetch(rows)


def test_each_sample_is_looked_at_once_however_many_epochs(tune):
    looks = {}
    for epochs in (2, 20):
        source = Counting(tiny_data().train)
        data = attrs.evolve(tiny_data(), train=tf.Split(source, tiny_data().train.targets))
        tune([tf.Phase("head", train="head", epochs=epochs)], data=data)
        looks[epochs] = source.looks
    assert looks[2] == looks[20] < 2 * 96


def reason(tune, network, phase=None, **given):
    _, said = told(tune, [phase or tf.Phase("head", train="head", epochs=2)], model=network, **given)
    (line,) = said
    assert line.startswith("not cached: ")
    return line


class Body(nn.Module):
    """What the cases below vary: (batch, 8) -> (batch, 3)."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, inputs):
        return self.head(self.between(self.body(inputs)))

    def between(self, features):
        return features


class Mixes(Body):
    def between(self, features):
        return features - features.mean(0, keepdim=True)


class Branches(Body):
    def between(self, features):
        return features if features.sum() > 0 else -features


class Skips(Body):
    def forward(self, inputs):
        return self.head(self.body(inputs)) + inputs[:, :3]


class Functional(Body):
    def between(self, features):
        return F.dropout(features, 0.5, training=self.training)


class Always(Body):
    def between(self, features):
        return features + torch.rand_like(features)


class InPlace(Body):
    """A frozen value that a trained part overwrites, and that is read again afterwards."""

    def __init__(self):
        super().__init__()
        self.middle = nn.Linear(8, 8)

    def forward(self, inputs):
        features = self.body(inputs)
        features += self.middle(features.clone())
        return self.head(features * features)


class Viewer(Body):
    """A shape crosses the border."""

    def forward(self, inputs):
        features = self.body(inputs)
        count = features.size(0)
        return self.head(features.view(count, -1))


class DrawsInPython(Body):
    """Layer drop with a generator that a trace does not see: the branch of the trace would be taken for ever."""

    def between(self, features):
        return features if random.random() < 0.5 else -features


class DrawsAConstant(Body):
    def between(self, features):
        return features + torch.rand(1)


class Odd(Body):
    def between(self, features):
        return features * len(str(features.shape)) if isinstance(features, torch.Tensor) else features.odd(1)


@pytest.mark.parametrize(
    ("network", "words"),
    [
        (DrawsInPython, "draws random numbers"),
        (DrawsAConstant, "draws random numbers"),
        (Odd, "cannot be run in parts"),
        (Mixes, "mixes samples"),
        (Branches, "cannot be traced"),
    ],
)
def test_a_model_that_cannot_be_split_trains_uncached_and_says_why(tune, network, words):
    assert words in reason(tune, network())


@pytest.mark.parametrize("network", [Viewer, Body, Skips, Functional, Always])
def test_a_model_that_can_be_split_is_and_gives_the_same(tune, network):
    phase = [tf.Phase("head", train="head", epochs=2, lr=0.05)]
    one, said = told(tune, phase, model=network())
    two, _ = told(tune, phase, model=network(), cache="off")
    assert said[0].startswith("cached")
    for name, tensor in weights(one).items():
        assert torch.allclose(tensor, weights(two)[name], atol=1e-5)


def test_a_value_that_training_overwrites_is_not_read_stale(tune):
    phase = tf.Phase("x", train=("middle", "head"), epochs=2, lr=0.05)
    one, said = told(tune, [phase], model=tf.Model.of(InPlace(), head="head"))
    two, _ = told(tune, [phase], model=tf.Model.of(InPlace(), head="head"), cache="off")
    assert said[0].startswith("cached")
    for name, tensor in weights(one).items():
        assert torch.allclose(tensor, weights(two)[name], atol=1e-6)


def test_one_epoch_augmentation_hooks_and_moving_norms_are_not_cached(tune):
    assert "looked at once anyway" in reason(tune, tiny_net(), tf.Phase("head", train="head", epochs=1))
    hooked = tiny_net()
    hooked.first.register_forward_hook(lambda module, args, output: None)
    assert "forward hooks" in reason(tune, hooked)
    moving = tf.Phase("head", train="head", epochs=2, norms="moving")
    _, said = told(tune, [moving], model=tiny_net())
    assert said[0].startswith("cached")  # of what lies before the first norm that moves


def test_a_component_that_needs_the_inputs_turns_it_off(tune):
    class Teacher:
        needs_inputs = True

        @tf.hookimpl(wrapper=True)
        def train_step(self, batch):
            assert batch.inputs.shape[1] == 8
            result = yield
            return result

    assert "needs the inputs" in reason(tune, tiny_net(), extensions=[Teacher()])


def test_a_cheap_prefix_or_a_large_border_stays_out_of_the_way(tune, monkeypatch):
    monkeypatch.setattr(frozen, "LEAST_WORK", 1e9)
    assert "so cheap" in reason(tune, tiny_net())
    monkeypatch.setattr(frozen, "LEAST_WORK", 0.0)
    assert "more than --cache-mb 0" in reason(tune, tiny_net(), cache_mb=0)


def test_weights_and_sampling_reach_cached_batches(tune):
    phase = tf.Phase("head", train="head", epochs=2, class_weights={"b": 3.0}, sampling={"a": 0.0})
    one, said = told(tune, [phase])
    two, _ = told(tune, [phase], cache="off")
    assert said[0].startswith("cached")
    assert torch.allclose(weights(one)["head.weight"], weights(two)["head.weight"], atol=1e-6)


def test_a_split_of_odd_size_is_filled_to_the_last_sample(tune):
    data = attrs.evolve(tiny_data(), train=tiny_data().train.take(torch.arange(67)))
    one, _ = told(tune, PHASES[:1], data=data)
    two, _ = told(tune, PHASES[:1], data=data, cache="off")
    assert torch.allclose(weights(one)["head.weight"], weights(two)["head.weight"], atol=1e-6)
