import json
import math

import pytest
import torch
from small_models import make_network
from torch.nn import functional as F
from tuneforge_surgical import AutoRGN
from tuneforge_surgical.auto_rgn import compute_lr_scales

import tuneforge as tf


class GradientNormRecorder:
    """Computes the relative gradient norms over the whole training split when a phase starts."""

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


def test_lr_scales_are_relative_gradient_norms_over_their_maximum(tune):
    recorder, net = GradientNormRecorder(), make_network()
    torch.nn.init.constant_(net.stem[1].bias, 0.3)  # BatchNorm starts it at zero
    torch.nn.init.constant_(net.body[1].bias, 0.3)
    recorded = tune(AutoRGN(epochs=2, lr=0.03), net=net, batch_size=200, callbacks=[recorder])
    for norms, (step, _) in zip(recorder.norms, recorded.result.strategy_steps[1::2], strict=True):
        expected = {name: norm / max(norms.values()) for name, norm in norms.items()}
        assert dict(step.lr_scales) == pytest.approx(expected, rel=1e-4)


def test_optimizer_uses_the_scaled_learning_rates(tune):
    recorded = tune(AutoRGN(epochs=2, lr=0.03))
    for learning_rates, (step, _) in zip(recorded.learning_rates, recorded.result.strategy_steps[1::2], strict=True):
        assert learning_rates == pytest.approx({name: 0.03 * scale for name, scale in step.lr_scales.items()})
        assert max(step.lr_scales.values()) == 1.0
        assert set(learning_rates) == set(recorded.result.model.parameters())


def test_each_epoch_follows_a_measurement_and_trains_all_layers(tune):
    recorded = tune(AutoRGN(epochs=2, lr=0.03, restore_best=False))
    assert recorded.step_names() == ["rgn-1", "epoch-1", "rgn-2", "epoch-2"]
    assert set(recorded.result.model.parameters()) <= recorded.find_changed()


def test_tensor_of_zeros_trains_at_the_full_learning_rate_and_does_not_reduce_others(tune):
    scales = {"a.weight": 1.0, "b.weight": 0.5, "b.bias": 1.0}
    assert compute_lr_scales({"a.weight": 2.0, "b.weight": 1.0, "b.bias": 1e11}) == scales
    assert compute_lr_scales({"a.weight": 2.0, "b.weight": 1.0, "b.bias": math.inf}) == scales
    result = tune(AutoRGN(epochs=1), known=()).result
    step, _ = result.strategy_steps[1]  # all head rows are randomly initialized, with biases of 0
    assert step.lr_scales["head.weight"] == step.lr_scales["head.bias"] == 1.0
    assert min(step.lr_scales.values()) > 1e-6


def test_scales_without_gradients_are_zero():
    assert compute_lr_scales({"a.weight": 0.0, "a.bias": 0.0}) == {"a.weight": 0.0, "a.bias": 0.0}


def list_val_f1(recorded):
    steps = recorded.result.strategy_steps
    return [result.val["f1_macro"] for step, result in steps if isinstance(step, tf.Phase)]


def test_best_epoch_is_restored_at_the_end(tune):
    scores = list_val_f1(tune(AutoRGN(epochs=12, lr=0.5, restore_best=False)))
    epochs = next(count for count in range(2, 13) if scores[count - 1] < max(scores[:count]))  # ends below its best
    recorded = tune(AutoRGN(epochs=epochs, lr=0.5))
    assert list_val_f1(recorded) == scores[:epochs]
    assert recorded.result.report["splits"]["val"]["f1_macro"] == max(scores[:epochs])
    last = tune(AutoRGN(epochs=epochs, lr=0.5, restore_best=False))
    assert last.result.report["splits"]["val"]["f1_macro"] == scores[epochs - 1]


def test_strategy_is_found_by_name(tune):
    recorded = tune(tf.use("auto-rgn", epochs=1))
    components = json.loads((recorded.result.run_dir / "run.json").read_text())["components"]
    (strategy,) = (each for each in components if each["hook"] == "finetune_strategy")
    assert (strategy["name"], strategy["distribution"]) == ("auto-rgn", "tuneforge-surgical")
