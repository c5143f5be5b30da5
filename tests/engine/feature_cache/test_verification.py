"""A cut is verified before it is trusted: what tracing loses is found, and such a phase trains as without a cache."""

import collections
import random
import warnings

import attrs
import numpy as np
import pytest
import torch
from tiny import blobs, tiny_data
from torch import nn
from torch.nn import functional as F

import tuneforge as tf
from tuneforge.engine.feature_cache import build as feature_cache_build


@pytest.fixture(autouse=True)
def cache_cheap_layers(monkeypatch):
    """Cache the layers of small models, although that would not pay."""
    monkeypatch.setattr(feature_cache_build, "MIN_MACS_PER_BYTE", 0.0)
    monkeypatch.setattr(feature_cache_build, "MIN_MACS_PER_BYTE_ON_DISK", 0.0)
    free = dict.fromkeys(feature_cache_build.MACS_PER_TRACED_MODULE, 0.0)
    monkeypatch.setattr(feature_cache_build, "MACS_PER_TRACED_MODULE", free)


class Network(nn.Module):
    """A stem that is frozen, and a layer and a head that train: (b, 8) -> (b, 3)."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.middle, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, inputs):
        return self.head(self.between(torch.tanh(self.stem(inputs))))

    def between(self, features):
        return torch.tanh(self.middle(features))


class Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values):
        return values.view_as(values)

    @staticmethod
    def backward(ctx, gradient):
        return -gradient


class DoubledGradient(Reverse):
    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


class ReversedGradient(Network):
    def between(self, features):
        return Reverse.apply(super().between(features))


class ScaledGradient(Network):
    def between(self, features):
        return DoubledGradient.apply(super().between(features))


class Gate(Network):
    def between(self, features):
        with torch.no_grad():
            gate = torch.sigmoid(self.middle(features))
        return features * gate


class GateWithoutContext(Network):
    def between(self, features):
        torch.set_grad_enabled(False)
        gate = torch.sigmoid(self.middle(features))
        torch.set_grad_enabled(True)
        return features * gate


class RunningCenter(Network):
    """A buffer that forward updates in place."""

    def __init__(self):
        super().__init__()
        self.register_buffer("center", torch.zeros(8))

    def between(self, features):
        values = super().between(features)
        if self.training:
            with torch.no_grad():
                self.center.mul_(0.9).add_(values.mean(0), alpha=0.1)
        return values - self.center


class AssignedCenter(RunningCenter):
    """A buffer that forward assigns, from frozen features."""

    def between(self, features):
        if self.training:
            self.center = 0.9 * self.center + 0.1 * features.mean(0).detach()
        return torch.tanh(self.middle(features - self.center))


class PlainCenter(Network):
    """The same as a plain attribute."""

    def __init__(self):
        super().__init__()
        self.mean = torch.zeros(8)

    def between(self, features):
        values = super().between(features)
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * values.detach().mean(0)
        return values - self.mean


class Counting(Network):
    passes = 0

    def between(self, features):
        self.passes += self.training
        return super().between(features) * (1 + self.passes / 10)


class CountingInAList(Network):
    def __init__(self):
        super().__init__()
        self.seen = collections.deque()

    def between(self, features):
        if self.training:
            self.seen.append(len(features))
        return super().between(features) * (1 + len(self.seen) / 10)


class CountingInTheClass(Network):
    def between(self, features):
        type(self).calls = getattr(type(self), "calls", 0) + self.training
        return super().between(features) * (1 + type(self).calls / 10)


class ClippedInputs(Network):
    """Overwrites a view of its inputs, by a statement whose value nobody uses, where a sample has large numbers."""

    def forward(self, inputs):
        inputs = inputs.clone()
        inputs[:, 0].clamp_(max=2.5)
        return super().forward(inputs)


class MaskedFeatures(Network):
    def between(self, features):
        features = features.clone()
        features[:, :4][features[:, :4] > 0.99] = 0.0
        return super().between(features)


class Scripted(Network):
    def __init__(self):
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecated by torch
            self.activation = torch.jit.script(Relu())

    def between(self, features):
        return self.activation(self.middle(features))


class Relu(nn.Module):
    def forward(self, values):
        return torch.relu(values)


class BackwardHook(Network):
    def __init__(self):
        super().__init__()
        self.block = Block()
        self.block.register_full_backward_hook(lambda module, inputs, outputs: tuple(each * 0.1 for each in inputs))

    def between(self, features):
        return self.block(super().between(features))


class BackwardPreHook(Network):
    def __init__(self):
        super().__init__()
        self.middle = Block()
        self.middle.register_full_backward_pre_hook(lambda module, gradients: tuple(each * 0 for each in gradients))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, values):
        return torch.tanh(self.linear(values))


TOP = tf.Phase(
    "top",
    train=("middle", "block", "head"),
    epochs=3,
    lr=0.5,
    optimizer=tf.use("sgd", momentum=0.0, weight_decay=0.0),
    schedule="constant",
)


def trained(tune, network, *, train=("middle", "head"), cache="auto", **given):
    """Return all that the network holds after a phase, and the log lines about the feature cache."""
    log = []
    model = tf.Model.from_module(network, head="head")
    given = {"batch_size": 96, "log": log.append, "cache": cache, **given}
    tune([attrs.evolve(TOP, train=train)], model=model, **given)
    return state(network), [line.strip() for line in log if "feature cache: o" in line]


def state(network):
    tensors = {name: each.clone() for name, each in network.state_dict().items()}
    return tensors | {name: each for name, each in vars(network).items() if isinstance(each, torch.Tensor)}


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(
            tensor, other[name], rtol=0, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize(
    ("network", "reason"),
    [
        (ReversedGradient, "'gradient of middle.weight'"),
        (ScaledGradient, "'gradient of middle.weight'"),
        (Gate, "feature cache: o"),
        (RunningCenter, "feature cache: o"),
        (AssignedCenter, "off, because"),
        (PlainCenter, "off, because"),
        (Counting, "'passes' of the model changes"),
        (CountingInAList, "off, because"),
        (CountingInTheClass, "of the model changes"),
        (BackwardPreHook, "backward hooks"),
        (Scripted, "feature cache: o"),
        (ClippedInputs, "feature cache: on"),
        (MaskedFeatures, "feature cache: o"),
        (GateWithoutContext, "feature cache: o"),
    ],
)
def test_what_a_trace_would_lose_trains_as_without_a_cache(tune, network, reason):
    cached, log = trained(tune, network())
    if network is CountingInTheClass:
        del CountingInTheClass.calls
    uncached, _ = trained(tune, network(), cache="off")
    assert_same(cached, uncached)
    assert reason in log[0], log


def test_backward_hook_of_a_block_is_called(tune):
    cached, log = trained(tune, BackwardHook(), train=("middle", "block", "head"))
    uncached, _ = trained(tune, BackwardHook(), train=("middle", "block", "head"), cache="off")
    assert_same(cached, uncached)
    assert "backward hooks" in log[0]


def test_inspections_leave_no_object_of_their_own_in_the_model(tune):
    network = PlainCenter()
    trained(tune, network)
    assert type(network.mean) is torch.Tensor
    network = AssignedCenter()
    trained(tune, network)
    assert type(network.center) is torch.Tensor
    network = Counting()
    trained(tune, network)
    assert network.passes == 3


@pytest.mark.parametrize("lists", [False, True])
def test_what_forward_leaves_for_the_loss_is_fresh(tune, lists):
    class Penalized(Network):
        def between(self, features):
            values = super().between(features)
            self.penalty = [values.square().mean()] if lists else values.square().mean()
            return values

    class PenalizedLoss:
        @tf.hookimpl
        def train_step(self, run, batch):
            outputs = run.forward(batch.inputs)
            penalty = run.model.module.penalty
            return F.cross_entropy(outputs, batch.targets) + 5 * (penalty[0] if lists else penalty), outputs

    networks = Penalized(), Penalized()
    _, log = trained(tune, networks[0], loss=PenalizedLoss())
    trained(tune, networks[1], loss=PenalizedLoss(), cache="off")
    assert_same(*(dict(network.state_dict()) for network in networks))
    assert "'penalty" in log[0]


class Tempered(Network):
    temperature = 1.0

    def __init__(self):
        super().__init__()
        self.settings = {"scale": 1.0}
        self.register_buffer("shift", torch.zeros(8))

    def forward(self, inputs):
        features = torch.tanh(self.stem(inputs)) + self.shift
        return self.head(self.between(features) * self.settings["scale"]) / self.temperature


def _set_temperature(network, value):
    network.temperature = value


def _set_class_attribute(network, value):
    type(network).temperature = value


def _set_item(network, value):
    network.settings["scale"] = value


def _fill_buffer(network, value):
    network.shift.fill_(value)


def _replace_buffer(network, value):
    network.shift = torch.full((8,), value)


CHANGES = (_set_temperature, _set_class_attribute, _set_item, _fill_buffer, _replace_buffer)
HOOKS = ("optimizer_step", "evaluation_started", "train_step")


@pytest.mark.parametrize(
    ("hook", "change"), [("epoch_ended", each) for each in CHANGES] + [(each, _set_temperature) for each in HOOKS]
)
def test_attribute_that_a_callback_changes_is_followed(tune, hook, change):
    states = []
    for cache in ("auto", "off"):
        network = Tempered()

        class Annealing:
            def _anneal(self, run, network=network):
                change(network, 1 / (1.2 + 0.2 * run.step))

            @tf.hookimpl(wrapper=True, specname=hook if hook in ("optimizer_step", "train_step") else "optimizer_step")
            def wrap(self, run):
                if hook == "train_step":
                    self._anneal(run)
                result = yield
                if hook == "optimizer_step":
                    self._anneal(run)
                return result

            @tf.hookimpl(specname=hook if hook not in ("optimizer_step", "train_step") else "epoch_ended")
            def observe(self, run):
                if hook not in ("optimizer_step", "train_step"):
                    self._anneal(run)

        tensors, log = trained(tune, network, cache=cache, callbacks=[Annealing()], batch_size=32)
        Tempered.temperature = 1.0
        states.append(tensors)
        if cache == "auto":
            assert any("has changed" in line or "off, because" in line for line in log), log
    assert_same(*states)


def test_phase_that_lost_its_cache_resumes_bit_identical(tmp_path):
    def engine(network, path, **given):
        return tf.Engine(
            model=tf.Model.from_module(network, head="head"), data=tiny_data(), batch_size=16, page=False,
            strategy=[attrs.evolve(TOP, train=("middle", "head"))], callbacks=[Cooling(network)], out=path, **given,
        )  # fmt: skip

    class Cooling:
        def __init__(self, network):
            self.network = network

        @tf.hookimpl
        def phase_started(self, run):
            self.epoch_ended(run)

        @tf.hookimpl
        def epoch_ended(self, run):
            self.network.temperature = 1.0 if run.epoch < 1 else 0.5

    whole = Tempered()
    engine(whole, tmp_path / "whole").run()

    network = Tempered()
    stopped = engine(network, tmp_path / "stopped")

    class Stopping:
        @tf.hookimpl
        def epoch_ended(self, run):
            if run.epoch == 2:
                stopped.stop("a test", exit_code=1)

    stopped._set_observers([Stopping()])
    with pytest.raises(tf.StoppedError):
        stopped.run()
    again = Tempered()
    again.temperature = 0.5
    log = []
    tf.Engine.resume(
        tmp_path / "stopped", model=tf.Model.from_module(again, head="head"), data=tiny_data(), log=log.append,
        strategy=[attrs.evolve(TOP, train=("middle", "head"))], callbacks=[Cooling(again)],
    ).run()  # fmt: skip
    assert any("off, as before the interruption" in line for line in log)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


class Drawing(torch.utils.data.Dataset):
    """Samples that are random at each access."""

    def __init__(self, draw):
        self.draw, self.fetched = draw, 0

    def __len__(self):
        return 96

    def __getitem__(self, row):
        self.fetched += 1
        train = tiny_data().train
        return train.fetch(torch.tensor([row]))[0] + 0.1 * self.draw(), int(train.targets[row])


@pytest.mark.parametrize("draw", [lambda: torch.randn(8), lambda: np.random.normal(), random.random])
def test_random_dataset_draws_each_sample_anew_in_each_epoch(tune, draw):
    dataset, log = Drawing(draw), []
    tune([attrs.evolve(TOP, epochs=4, train="head")], data=dataset, model=Network(), log=log.append)
    assert any("off, because the samples are random" in line for line in log)
    assert dataset.fetched >= 4 * 48


def test_component_of_the_loss_is_left_as_it_was(tune):
    class CountingLoss:
        def __init__(self):
            self.steps, self.sizes = 0, []

        @tf.hookimpl
        def train_step(self, run, batch):
            self.steps += 1
            self.sizes.append(len(batch.targets))
            outputs = run.forward(batch.inputs)
            return F.cross_entropy(outputs, batch.targets) / self.steps, outputs

    counting = CountingLoss()
    cached, log = trained(tune, Network(), loss=counting, batch_size=32)
    assert log[0].startswith("feature cache: on")
    assert counting.steps == 9
    assert counting.sizes == [32] * 9
    uncached, _ = trained(tune, Network(), loss=CountingLoss(), batch_size=32, cache="off")
    assert_same(cached, uncached)


def test_loss_that_looks_at_the_inputs_trains_uncached(tune):
    class LooksAtInputs:
        @tf.hookimpl
        def train_step(self, run, batch):
            outputs = run.forward(batch.inputs)
            weights = 1 + batch.inputs[:, 0].sigmoid()
            return (F.cross_entropy(outputs, batch.targets, reduction="none") * weights).mean(), outputs

    cached, log = trained(tune, Network(), loss=LooksAtInputs())
    uncached, _ = trained(tune, Network(), loss=LooksAtInputs(), cache="off")
    assert_same(cached, uncached)
    assert "off, because the two parts of the model cannot run" in log[0]


class OnlyExported(Network):
    """A network that `torch.export` can trace and `torch.fx` cannot."""

    def between(self, features):
        parts = [*torch.chunk(features, 2, dim=1)]
        return torch.tanh(self.middle(torch.cat(parts, dim=1)))


def test_head_fit_of_a_model_that_only_export_can_trace(tune):
    log = []
    result = tune([tf.HeadFit("fit", l2=0.1)], model=OnlyExported(), log=log.append)
    plain = tune([tf.HeadFit("fit", l2=0.1)], model=OnlyExported(), cache="off")
    heads = [each.model.head_module().weight for each in (result, plain)]
    torch.testing.assert_close(*heads, rtol=0, atol=1e-5)
    assert any(line.strip().startswith("feature cache: on") for line in log)


def test_later_phase_that_overwrites_a_frozen_value_gets_the_value_before(tune):
    class Adds(Network):
        def forward(self, inputs):
            features = torch.tanh(self.stem(inputs))
            features += self.middle(features.clone())
            return self.head(features)

    phases = [
        attrs.evolve(TOP, name="head", train="head", lr=0.1),
        attrs.evolve(TOP, name="both", train=("middle", "head"), lr=0.1),
    ]
    states = []
    for cache in ("auto", "off"):
        network = Adds()
        tune(phases, model=tf.Model.from_module(network, head="head"), cache=cache)
        states.append(state(network))
    assert_same(*states)


def test_tracing_that_takes_longer_than_training_is_not_tried(tune, monkeypatch):
    dear = dict.fromkeys(feature_cache_build.MACS_PER_TRACED_MODULE, 1e12)
    monkeypatch.setattr(feature_cache_build, "MACS_PER_TRACED_MODULE", dear)
    _, log = trained(tune, Network())
    assert "tracing the model takes longer" in log[0]


def test_split_of_one_sample_and_split_with_a_last_batch_of_one(tune):
    for count in (1, 2, 65):
        data = attrs.evolve(tiny_data(), train=blobs(count, seed=1))
        cached, _ = trained(tune, Network(), data=data)
        uncached, _ = trained(tune, Network(), data=data, cache="off")
        assert_same(cached, uncached)
