import json
import math

import pytest
import torch
from torch.nn import functional as F
from tuneforge_surgical import AutoRGN
from tuneforge_surgical.auto_rgn import compute_lr_scales
from world import make_network

import tuneforge as tf


class GradientNormRecorder:
    """Computes each tensor's relative gradient norm when a phase starts, over the whole training split at once."""

    def __init__(self):
        self.norms = []

    @tf.hookimpl
    def phase_started(self, run):
        split, named = run.data.train, run.model.parameters()
        modes = [(module, module.training) for module in run.model.module.modules()]
        run.model.module.eval()
        loss = F.cross_entropy(run.model.module(split.fetch(torch.arange(len(split)))), split.targets)
        gradients = torch.autograd.grad(loss, list(named.values()))
        self.norms.append(
            {name: float(g.norm() / named[name].detach().norm()) for name, g in zip(named, gradients, strict=True)}
        )
        for module, training in modes:
            module.training = training


def test_rates_are_relative_gradient_norms_over_their_maximum(tune):
    judge, net = GradientNormRecorder(), make_network()
    torch.nn.init.constant_(net.stem[1].bias, 0.3)  # BatchNorm starts it at zero
    torch.nn.init.constant_(net.body[1].bias, 0.3)
    tuned = tune(AutoRGN(epochs=2, lr=0.03), net=net, batch_size=200, callbacks=[judge])
    for norms, (step, _) in zip(judge.norms, tuned.result.strategy_steps[1::2], strict=True):
        expected = {name: norm / max(norms.values()) for name, norm in norms.items()}
        assert dict(step.lr_scales) == pytest.approx(expected, rel=1e-4)


def test_the_optimizer_gets_those_rates(tune):
    tuned = tune(AutoRGN(epochs=2, lr=0.03))
    for rates, (step, _) in zip(tuned.learning_rates, tuned.result.strategy_steps[1::2], strict=True):
        assert rates == pytest.approx({name: 0.03 * scale for name, scale in step.lr_scales.items()})
        assert max(step.lr_scales.values()) == 1.0
        assert set(rates) == set(tuned.result.model.parameters())


def test_a_measurement_comes_before_each_epoch_and_all_layers_train(tune):
    tuned = tune(AutoRGN(epochs=2, lr=0.03, restore_best=False))
    assert tuned.step_names() == ["rgn-1", "epoch-1", "rgn-2", "epoch-2"]
    assert set(tuned.result.model.parameters()) <= tuned.find_changed()


def test_a_tensor_of_zeros_trains_at_the_full_rate_and_silences_no_other(tune):
    rates = {"a.weight": 1.0, "b.weight": 0.5, "b.bias": 1.0}
    assert compute_lr_scales({"a.weight": 2.0, "b.weight": 1.0, "b.bias": 1e11}) == rates
    assert compute_lr_scales({"a.weight": 2.0, "b.weight": 1.0, "b.bias": math.inf}) == rates
    result = tune(AutoRGN(epochs=1), known=()).result
    step, _ = result.strategy_steps[1]  # all rows of the head are fresh, their biases zero
    assert step.lr_scales["head.weight"] == step.lr_scales["head.bias"] == 1.0
    assert min(step.lr_scales.values()) > 1e-6


def test_without_any_gradient_nothing_moves():
    assert compute_lr_scales({"a.weight": 0.0, "a.bias": 0.0}) == {"a.weight": 0.0, "a.bias": 0.0}


def list_val_f1(tuned):
    steps = tuned.result.strategy_steps
    return [result.val["f1_macro"] for step, result in steps if isinstance(step, tf.Phase)]


def test_the_run_ends_on_the_weights_of_its_best_epoch(tune):
    long = list_val_f1(tune(AutoRGN(epochs=12, lr=0.5, restore_best=False)))
    epochs = next(count for count in range(2, 13) if long[count - 1] < max(long[:count]))  # ends on a fall
    tuned = tune(AutoRGN(epochs=epochs, lr=0.5))
    assert list_val_f1(tuned) == long[:epochs]
    assert tuned.result.report["splits"]["val"]["f1_macro"] == max(long[:epochs])
    kept = tune(AutoRGN(epochs=epochs, lr=0.5, restore_best=False))
    assert kept.result.report["splits"]["val"]["f1_macro"] == long[epochs - 1]


def test_it_runs_by_its_name(tune):
    tuned = tune(tf.use("auto-rgn", epochs=1))
    components = json.loads((tuned.result.run_dir / "run.json").read_text())["components"]
    (strategy,) = (each for each in components if each["hook"] == "finetune_strategy")
    assert (strategy["name"], strategy["distribution"]) == ("auto-rgn", "tuneforge-surgical")
