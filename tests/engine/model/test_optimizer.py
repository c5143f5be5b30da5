"""State that optimizers keep outside the tensors of a parameter survives phases, resumes and rollbacks."""

import math

import pytest
import torch
from simulated_kill import run_and_kill
from stateful_optimizers import Averaging, CountingMomentum
from tiny import tiny_data
from torch import nn
from torch.nn import functional as F

import tuneforge as tf

PLACES = ["group", "group-tensor", "attribute", "shared"]
COUNTING = [tf.use("stateful_optimizers:Counting", place=place) for place in PLACES]
WITH_MODES = tf.use("stateful_optimizers:WithModes")
OPTIMIZERS = [*COUNTING, WITH_MODES]


class Net(nn.Module):
    """Two layers without norm and dropout: (b, 8) -> (b, 3)."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, inputs):
        return self.head(torch.tanh(self.body(inputs)))


def phases(optimizer):
    """A head phase and one of all layers, two steps each, on the whole training split."""
    options = {"epochs": 2, "lr": 0.1, "schedule": "constant", "optimizer": optimizer}
    return [tf.Phase("a", train="head", **options), tf.Phase("b", train="all", **options)]


def objects(optimizer):
    return {"data": tiny_data(), "model": Net(), "strategy": phases(optimizer)}


def weights(result):
    return {name: each.detach().clone() for name, each in result.model.module.state_dict().items()}


def plain_torch(make):
    """The same four steps in torch: parameters that begin to train later have a group of their own."""
    net, data = Net(), tiny_data()
    optimizer = make([{"params": list(net.head.parameters()), "lr": 0.1}])
    inputs, targets = data.train.source.inputs, data.train.targets
    for step in range(4):
        if step == 2:
            optimizer.add_param_group({"params": list(net.body.parameters()), "lr": 0.1})
        getattr(optimizer, "train", lambda: None)()
        net.zero_grad()
        F.cross_entropy(net(inputs), targets).backward()
        optimizer.step()
        getattr(optimizer, "eval", lambda: None)()
    return net.state_dict()


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=[*PLACES, "modes"])
def test_state_outside_tensors_continues_over_phases_as_in_torch(tune, optimizer):
    result = tune(**objects(optimizer), batch_size=96)
    place = dict(optimizer.options).get("place")
    expected = plain_torch(Averaging if place is None else lambda groups: CountingMomentum(groups, place))
    for name, tensor in weights(result).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("number", [1, 3, 4, 7])
@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=[*PLACES, "modes"])
def test_killed_run_resumes_with_the_state_outside_tensors(tune, tmp_path, optimizer, number):
    settings = {"batch_size": 48, "page": False, "checkpoint_steps": 1}
    unbroken = weights(tune(**objects(optimizer), **settings))
    run_and_kill(tf.Engine(**objects(optimizer), **settings, out=tmp_path / "killed").run, number, only="step-saved")
    resumed = weights(tf.Engine.resume(tmp_path / "killed", **objects(optimizer)).run())
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in unbroken.items())


class NaNOnce:
    """Makes the loss of one optimizer step NaN, once."""

    def __init__(self, step):
        self.step = step

    @tf.hookimpl(wrapper=True)
    def train_step(self, run):
        loss, outputs = yield
        if run.step == self.step:
            self.step = None
            loss = loss * math.nan
        return loss, outputs


class Counts:
    """Reads the optimizer's count at the end of the phase."""

    @tf.hookimpl
    def phase_ended(self, run):
        optimizer = run.optimization.optimizer
        group = optimizer.param_groups[0]
        places = [group.get("count"), group.get("counted"), group.get("k"), getattr(optimizer, "count", 0)]
        places += [each["count"] for each in optimizer.state.values() if "count" in each]
        self.count = max(float(each) for each in places if each is not None)


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=[*PLACES, "modes"])
def test_rollback_restores_the_state_outside_tensors(tune, optimizer):
    found = []
    for step in (None, 3):  # the fourth step is the last of the second epoch
        counts = Counts()
        tune(phases(optimizer)[:1], model=Net(), batch_size=48, on_nan="rollback", callbacks=[NaNOnce(step), counts])
        found.append(counts.count)
    assert found == [4, 2]


def test_best_weights_start_the_optimizer_anew(tune):
    class Records:
        @tf.hookimpl
        def phase_started(self, run):
            self.group = dict(run.optimization.param_groups()[0])

    records = Records()
    options = {"train": "head", "epochs": 2, "lr": 0.1, "optimizer": COUNTING[0]}
    net = Net()
    strategy = [tf.Phase("a", **options), tf.HeadFit("fit"), tf.Phase("b", **options)]
    tune(strategy, model=net, batch_size=48, callbacks=[records])
    assert records.group["count"] == 0


def test_validation_and_saved_weights_are_those_of_eval_mode(tune):
    class Watches:
        def __init__(self):
            self.modes = []

        @tf.hookimpl
        def evaluation_started(self, run):
            self.modes.append(("evaluated", run.optimization.param_groups()[0]["train_mode"]))

        @tf.hookimpl(wrapper=True)
        def optimizer_step(self, run):
            self.modes.append(("stepped", run.optimization.param_groups()[0]["train_mode"]))
            result = yield
            return result

    watches = Watches()
    tune(phases(WITH_MODES)[:1], model=Net(), batch_size=48, callbacks=[watches])
    assert watches.modes == [*[("stepped", True)] * 2, ("evaluated", False)] * 2 + [("evaluated", False)] * 2
