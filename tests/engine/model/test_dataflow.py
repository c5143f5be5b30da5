import contextlib

import pytest
import torch
from torch import nn
from torch.nn import functional

import tuneforge as tf
from tuneforge.engine.model.dataflow import find_function_mode
from tuneforge.engine.model.freezing import compute_modes, freeze, select

HEAD = [tf.Phase("head", train="head", epochs=1)]
ALL = [tf.Phase("all", epochs=1)]


class Net(nn.Module):
    """A body, a dropout and a head, all called by the root itself."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.body, self.norm, self.head = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)
        self.dropout = nn.Dropout(0.5)

    def forward(self, inputs):
        return self.head(self.dropout(self.norm(self.body(inputs))))


def modes(net, *train, batchnorm_stats="frozen"):
    """Return for each module by name whether it is in training mode while these parameters train."""
    model = tf.Model.from_module(net)
    freeze(model, select(model, train))
    names = {module: name for name, module in net.named_modules()}
    example = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    return {names[module]: mode for module, mode in compute_modes(model, example, batchnorm_stats=batchnorm_stats)}


class HoldsNormInEval(Net):
    def train(self, mode=True):
        super().train(mode)
        self.norm.eval()
        return self


class Wrapped(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net, self.head = net, nn.Linear(3, 3)

    def forward(self, inputs):
        return self.head(self.net(inputs))


def with_norm_that_ignores_train():
    net = Net()
    net.norm.eval()
    net.norm.train = lambda mode=True: net.norm
    return net


@pytest.mark.parametrize("batchnorm_stats", ["frozen", "updating"])
@pytest.mark.parametrize("train", [["all"], ["head", "norms"], ["head"]])
@pytest.mark.parametrize(
    "build", [HoldsNormInEval, with_norm_that_ignores_train, lambda: Wrapped(HoldsNormInEval())],
    ids=["root", "method-of-instance", "below-the-root"],
)  # fmt: skip
def test_norm_that_train_leaves_in_eval_mode_stays_there(build, train, batchnorm_stats):
    found = modes(build(), *train, batchnorm_stats=batchnorm_stats)
    assert [mode for name, mode in found.items() if name.endswith("norm")] == [False]
    assert found["head"] is True


def test_norm_that_train_leaves_in_eval_mode_keeps_its_statistics(tune):
    net = HoldsNormInEval()
    weight, mean = net.norm.weight.detach().clone(), net.norm.running_mean.clone()
    tune([*HEAD, *ALL], model=net)
    assert torch.equal(net.norm.running_mean, mean)
    assert not torch.equal(net.norm.weight, weight)


def test_parameters_that_train_freezes_count_as_frozen_by_the_user(tune):
    class FreezesBody(Net):
        def train(self, mode=True):
            super().train(mode)
            self.body.requires_grad_(False)
            return self

    net = FreezesBody()
    before = net.body.weight.clone()
    result = tune(ALL, model=net)
    assert torch.equal(net.body.weight, before)
    assert result.model.user_frozen == ("body.weight", "body.bias")


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, contextlib.nullcontext])
def test_dropout_after_frozen_layers_is_off_also_where_gradients_are_off(context):
    class Net2(Net):
        def forward(self, inputs):
            with context():
                features = self.dropout(self.body(inputs))
            return self.head(features.clone())

    assert modes(Net2(), "head")["dropout"] is False
    assert modes(Net2(), "body", "head")["dropout"] is True


def test_dropout_behind_a_frozen_branch_is_off_beside_a_trained_branch_that_ran_before():
    class TwoBranches(Net):
        def forward(self, inputs):
            side = self.norm(inputs)
            with torch.no_grad():
                features = self.dropout(self.body(inputs))
            return self.head(features + side)

    assert modes(TwoBranches(), "norm", "head")["dropout"] is False


def test_modules_that_run_only_in_training_are_observed():
    class OnlyInTraining(Net):
        def __init__(self):
            super().__init__()
            self.late = nn.Dropout(0.5)

        def forward(self, inputs):
            features = self.body(inputs)
            if self.training:
                features = self.dropout(features)
            outputs = self.head(features)
            return self.late(outputs) if self.training else outputs

    found = modes(OnlyInTraining(), "head")
    assert (found["dropout"], found["late"]) == (False, True)


def test_everything_trains_in_training_mode_where_nothing_is_frozen():
    net = nn.Sequential(nn.Dropout(0.1), nn.BatchNorm1d(8, affine=False), nn.Linear(8, 3))
    assert all(modes(net, "all").values())
    assert modes(nn.Sequential(nn.Dropout(0.1), nn.Linear(8, 8), nn.Linear(8, 3)), "head")["0"] is False


class Functional(nn.Module):
    """Functional dropout and norms between the layers of the root."""

    def __init__(self, drop=lambda x, training: x):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 3)
        self.drop = drop
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("var", torch.ones(8))

    def forward(self, inputs):
        features = functional.batch_norm(self.body(inputs), self.mean, self.var, training=self.training)
        return self.head(self.drop(features, self.training))


@pytest.mark.parametrize("train", ["head", "all"])
def test_functional_norm_updates_its_statistics_only_after_trainable_layers(tune, train):
    net = Functional()
    tune([tf.Phase("only", train=train, epochs=1)], model=net)
    assert torch.equal(net.mean, torch.zeros(8)) is (train == "head")


def test_functional_norm_updates_its_statistics_where_the_phase_asks_for_it(tune):
    net = Functional()
    tune([tf.Phase("only", train="head", epochs=1, batchnorm_stats="updating")], model=net)
    assert not torch.equal(net.mean, torch.zeros(8))


DROPOUTS = {
    "dropout": lambda x, training: functional.dropout(x, 0.5, training),
    "if": lambda x, training: functional.dropout(x, 0.5) if training else x,
    "alpha": lambda x, training: functional.alpha_dropout(x, 0.5, training=training),
    "rrelu": lambda x, training: functional.rrelu(x, training=training),
}


@pytest.mark.parametrize("name", DROPOUTS)
def test_functional_dropout_is_off_after_frozen_layers_only(name):
    net, inputs = Functional(DROPOUTS[name]), torch.ones(2, 8)
    model = tf.Model.from_module(net)
    freeze(model, select(model, ["head"]))
    mode = find_function_mode(net, inputs, compute_modes(model, inputs, batchnorm_stats="frozen"), norms=True)
    with mode:
        assert torch.equal(net(inputs), net(inputs))
    freeze(model, select(model, ["body"]))
    with mode:
        assert not torch.equal(net(inputs), net(inputs))


def test_network_of_modules_needs_no_function_mode():
    net, inputs = Net(), torch.ones(2, 8)
    model = tf.Model.from_module(net)
    freeze(model, select(model, ["norm", "head"]))
    assert find_function_mode(net, inputs, compute_modes(model, inputs, batchnorm_stats="frozen"), norms=True) is None
