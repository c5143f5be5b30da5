"""Known issues 2 to 4, 6 and 12 of other tools: frozen tensors do not change, trained ones do."""

from itertools import pairwise

import pytest
import torch
from tiny import TinyNet, tiny_data, tiny_net
from torch import nn

import tuneforge as tf


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize(
    "optimizer", [tf.use("adamw", weight_decay=0.5), tf.use("sgd", momentum=0.9, weight_decay=0.5)]
)
def test_frozen_backbone_keeps_its_weights_and_batchnorm_statistics(tune, optimizer):
    net = tiny_net()
    before = state(net)
    tune([tf.Phase("all", epochs=1), tf.Phase("head", train="head", epochs=2)], model=net, optimizer=optimizer)
    net = tiny_net()
    tune([tf.Phase("head", train="head", epochs=2)], model=net, optimizer=optimizer)
    moved = [name for name, tensor in state(net).items() if not torch.equal(before[name], tensor)]
    assert moved == ["head.weight", "head.bias"]


def test_momentum_of_an_earlier_phase_does_not_change_frozen_weights(tune):
    net = tiny_net()
    seen = {}

    def strategy(task):
        yield tf.Phase("all", epochs=1, lr=0.1)
        seen.update(state(net))
        yield tf.Phase("head", train="head", epochs=1, lr=0.1)

    tune(strategy, model=net, optimizer=tf.use("sgd", momentum=0.9))
    moved = [name for name, tensor in state(net).items() if not torch.equal(seen[name], tensor)]
    assert moved == ["head.weight", "head.bias"]


def test_train_call_of_a_user_does_not_unfreeze_batchnorm_statistics(tune):
    class CallsTrain:
        @tf.hookimpl(wrapper=True)
        def train_step(self, run):
            run.model.module.train()
            result = yield
            return result

    net = tiny_net()
    with pytest.raises(tf.HaltError, match="frozen tensor"):
        tune([tf.Phase("head", train="head", epochs=1)], model=net, callbacks=[CallsTrain()])

    class CallsTrainAfterwards:
        @tf.hookimpl(wrapper=True)
        def optimizer_step(self, run):
            result = yield
            run.model.module.train()
            return result

    net = tiny_net()
    before = state(net)
    tune([tf.Phase("head", train="head", epochs=1)], model=net, callbacks=[CallsTrainAfterwards()])
    assert torch.equal(before["first.1.running_mean"], net.first[1].running_mean)


def test_updating_batchnorm_changes_statistics_and_nothing_else(tune):
    net = tiny_net()
    before = state(net)
    tune([tf.Phase("head", train="head", epochs=1, batchnorm_stats="updating")], model=net)
    moved = {name for name, tensor in state(net).items() if not torch.equal(before[name], tensor)}
    assert {"first.1.running_mean", "second.1.running_var", "head.weight"} <= moved
    assert not {"first.0.weight", "first.1.weight"} & moved


def test_callback_that_writes_to_a_frozen_weight_halts_the_run(tune):
    class Meddles:
        @tf.hookimpl
        def epoch_ended(self, run):
            with torch.no_grad():
                run.model.module.first[0].weight[0, 0] += 1e-6

    with pytest.raises(tf.HaltError, match=r"first\.0\.weight"):
        tune([tf.Phase("head", train="head", epochs=1)], callbacks=[Meddles()])


def test_callback_that_restores_a_trained_weight_halts_the_run(tune):
    class Restores:
        @tf.hookimpl(wrapper=True)
        def optimizer_step(self, run):
            kept = run.model.module.head.weight.detach().clone()
            result = yield
            with torch.no_grad():
                run.model.module.head.weight.copy_(kept)
            return result

    with pytest.raises(tf.HaltError, match=r"have not changed: head\.weight"):
        tune([tf.Phase("head", train="head", epochs=1)], callbacks=[Restores()])


def test_equal_zero_biases_are_both_trained(tune):
    class Twins(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
            nn.init.zeros_(self.one.bias)
            nn.init.zeros_(self.two.bias)

        def forward(self, inputs):
            return self.head(torch.tanh(self.one(inputs)) + torch.tanh(self.two(inputs)))

    net = Twins()
    result = tune([tf.Phase("all", epochs=1, lr=0.1)], model=net)
    assert net.one.bias.abs().min() > 0
    assert net.two.bias.abs().min() > 0
    assert result.strategy_steps[0][1].never_updated == ()


def test_parameter_without_a_gradient_is_reported_as_never_updated(tune):
    class Auxiliary(TinyNet):
        def __init__(self):
            super().__init__()
            self.aux = nn.Linear(16, 3)

    net = Auxiliary()
    result = tune([tf.Phase("all", epochs=1)], model=tf.Model.from_module(net, head="head"))
    assert result.strategy_steps[0][1].never_updated == ("aux.weight", "aux.bias")


def test_selector_without_a_match_stops_the_run(tune):
    with pytest.raises(tf.SelectorError, match="did you mean 'second'"):
        tune([tf.Phase("x", train="seccond", epochs=1)])


def test_layer_frozen_again_after_unfreezing_stays_frozen(tune):
    net = tiny_net()
    seen = []

    def strategy(task):
        for index, train in enumerate(["head", "all", "head", "groups[-2:]"]):
            yield tf.Phase(f"p{index}", train=train, epochs=1, lr=0.05)
            seen.append(state(net))

    tune(strategy, model=net)
    same = [torch.equal(a["first.0.weight"], b["first.0.weight"]) for a, b in pairwise(seen)]
    assert same == [False, True, True]


def test_report_counts_trainable_and_frozen_parameters(tune):
    report = tune([tf.Phase("head", train="head", epochs=1)]).strategy_steps[0][1]
    assert (report.num_trainable, report.num_frozen) == (51, sum(p.numel() for p in TinyNet().parameters()) - 51)
    assert report.reason == "1 epoch completed"


def test_test_split_is_evaluated_once(tune):
    seen = []

    class Watches:
        @tf.hookimpl
        def evaluation_started(self, run):
            seen.append(run.eval_split)

    tune([tf.Phase("a", epochs=2), tf.Phase("b", epochs=1)], callbacks=[Watches()])
    assert seen == ["val", "val", "val", "val", "test"]


def test_small_dataset_can_be_learned(tune):
    assert tune([tf.Phase("all", epochs=12, lr=0.01)], data=tiny_data()).report["splits"]["test"]["accuracy"] > 0.9


class AddsLate:
    """Adds 1 to a tensor in one hook of the final evaluation, or after the run."""

    def __init__(self, name, hook):
        self.name, self.hook = name, hook

    def add(self, run, hook):
        if hook == self.hook and run.phase is None:
            with torch.no_grad():
                run.model.module.state_dict()[self.name].add_(1)

    @tf.hookimpl
    def evaluation_started(self, run):
        self.add(run, "evaluation_started")

    @tf.hookimpl
    def evaluation_ended(self, run):
        self.add(run, "evaluation_ended")

    @tf.hookimpl
    def run_ended(self, run):
        self.add(run, "run_ended")


@pytest.mark.parametrize("hook", ["evaluation_started", "evaluation_ended", "run_ended"])
@pytest.mark.parametrize("name", ["first.0.weight", "first.1.running_mean", "head.bias"])
def test_weight_that_a_callback_changes_after_the_last_step_is_found(tune, hook, name):
    with pytest.raises(tf.HaltError, match=rf"changed after the last step of the strategy: {name}"):
        tune([tf.Phase("head", train="head", steps=1)], callbacks=[AddsLate(name, hook)])


def test_frozen_weight_that_a_callback_changes_in_the_evaluation_of_a_head_fit_is_found(tune):
    with pytest.raises(tf.HaltError, match=r"changed during the phase: first\.0\.weight"):
        tune([tf.HeadFit("fit")], callbacks=[AddsLate("first.0.weight", "evaluation_started")])


def test_callback_that_swaps_weights_for_the_final_evaluation_may_do_so(tune):
    class Swaps:
        @tf.hookimpl
        def evaluation_started(self, run):
            with torch.no_grad():
                self.kept = run.model.module.head.bias.clone()
                run.model.module.head.bias.zero_()

        @tf.hookimpl
        def evaluation_ended(self, run):
            with torch.no_grad():
                run.model.module.head.bias.copy_(self.kept)

    assert tune([tf.Phase("head", train="head", steps=1)], callbacks=[Swaps()]).report["splits"]
