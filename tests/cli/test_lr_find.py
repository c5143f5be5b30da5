"""The learning rate range test finds the value that theory gives, and changes nothing."""

import json
import math

import pytest
import torch
from tiny import TinyNet, tiny_data, tiny_net
from torch import nn

import tuneforge as tf
from tuneforge.__main__ import main
from tuneforge.builtin.datasets.tables.arrays import TensorInputs
from tuneforge.builtin.targets import RegressionTargets
from tuneforge.comparison.lr_range_test import suggest_lr

FEW = ["--data.per-class", "4", "--data.other-share", "0"]


@pytest.fixture
def run(capsys):
    def call(*arguments):
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def quadratic(curvature: float, **options) -> tf.Engine:
    """The mean of (w * x)^2 where x^2 = curvature / 2: the loss is curvature / 2 * w^2 from w = 1, exactly."""
    x = torch.full((32, 1), math.sqrt(curvature / 2))
    split = tf.Split(x, torch.zeros(32))
    module = nn.Sequential(nn.Linear(1, 1, bias=False))
    nn.init.ones_(module[0].weight)
    data = tf.Data(split, split, split, inputs=TensorInputs(), targets=RegressionTargets())
    model = tf.Model(module, groups=[tf.LayerGroup("head", ("0",))], head="0")
    return tf.Engine(data=data, model=model, page=False, **options)


def full_state(module):
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    flags = {name: (each.requires_grad, each.grad) for name, each in module.named_parameters()}
    return state, flags, [child.training for child in module.modules()], torch.get_rng_state()


@pytest.mark.parametrize("curvature", [4.0, 100.0, 1e4])
def test_on_a_quadratic_the_suggestion_is_near_half_of_one_over_the_curvature(curvature):
    found = tf.lr_find(quadratic(curvature, optimizer=tf.use("sgd", momentum=0.0)))
    assert 0.5 <= found.lowest_lr * curvature <= 1.5
    assert 0.25 <= found.suggestion * curvature <= 1.0
    for lr, loss in found.losses.items():
        assert loss == pytest.approx(curvature / 2 * (1 - lr * curvature) ** 2, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_training_at_the_suggestion_converges_and_well_above_the_lowest_loss_diverges(tmp_path, momentum):
    sgd = tf.use("sgd", momentum=momentum)
    found = tf.lr_find(quadratic(50.0, optimizer=sgd))

    def loss(lr):
        step = tf.Phase("all", steps=100, lr=lr)
        result = quadratic(50.0, optimizer=sgd, strategy=step, out=tmp_path / f"{lr:.6f}").run()
        return result.strategy_steps[0][1].val["rmse"]

    assert loss(found.suggestion) < 0.05  # from 5
    with pytest.raises(tf.HaltError, match="the training loss is inf"):
        loss(8 * found.lowest_lr)


def test_weights_buffers_gradients_modes_and_generators_are_bit_identical_afterwards():
    net = tiny_net()
    net.first.eval()
    net.second[0].bias.requires_grad_(False)
    before = full_state(net)
    found = tf.lr_find(tf.Engine(data=tiny_data(), model=net, page=False), batches=3)
    state, flags, modes, generator = full_state(net)
    assert all(torch.equal(state[name], tensor) for name, tensor in before[0].items())
    assert (flags, modes) == before[1:3]
    assert torch.equal(generator, before[3])
    assert found.suggestion is not None


def test_a_run_after_a_range_test_is_byte_identical_to_one_without(tune):
    steps = [tf.Phase("all", epochs=1)]
    net = tiny_net()
    tf.lr_find(tf.Engine(data=tiny_data(), model=net, page=False))
    after, plain = tune(steps, model=net), tune(steps)
    assert (after.run_dir / "model.safetensors").read_bytes() == (plain.run_dir / "model.safetensors").read_bytes()


def test_only_selected_parameters_are_trained():
    everything, head = (
        tf.lr_find(tf.Engine(data=tiny_data(), model=tiny_net(), page=False), train=train) for train in ("all", "head")
    )
    assert everything.num_trained == sum(each.numel() for each in TinyNet().parameters())
    assert head.num_trained == 16 * 3 + 3
    assert everything.losses != head.losses


def test_a_penalty_that_a_strategy_adds_to_the_loss_counts():
    plain, penalized = (
        tf.lr_find(tf.Engine(data=tiny_data(), model=tiny_net(), page=False, strategy=strategy))
        for strategy in ("full", tf.use("l2-sp", alpha=1e4))
    )
    assert penalized.losses[1.0] > plain.losses[1.0] + 100


def test_there_is_no_suggestion_if_no_learning_rate_lowers_the_loss():
    found = suggest_lr({1e-3: 1.0, 1e-2: 1.5, 1e-1: math.inf})
    assert found.suggestion is None
    assert "no learning rate lowers the loss" in found.reason


def test_losses_after_a_non_finite_one_are_ignored():
    found = suggest_lr({1e-4: 1.0, 1e-3: 0.5, 1e-2: math.nan, 1e-1: 0.0})
    assert found.lowest_lr == 1e-3
    assert list(found.smoothed) == [1e-4, 1e-3]


def test_a_loss_that_still_decreases_at_the_end_is_reported():
    found = suggest_lr({1e-2: 1.0, 1e-1: 0.9, 1.0: 0.5})
    assert found.suggestion == pytest.approx(0.1)
    assert suggest_lr(found.losses, momentum=0.9).suggestion == pytest.approx(0.01)
    assert "still decreases at the highest learning rate" in found.reason


def test_one_outlier_does_not_determine_the_suggestion():
    losses = {10**-exponent: 1.0 for exponent in range(6, 3, -1)} | {1e-3: 0.8, 1e-2: 0.5, 1e-1: 0.45, 1.0: 0.9}
    assert suggest_lr({**losses, 1e-5: 0.44}).lowest_lr in (1e-2, 1e-1)


def test_the_command_prints_a_table_and_a_suggestion_and_writes_a_plot(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = run("lr-find", *FEW, "--train", "head", "--batches", "1", "--plot", "rates.png")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].startswith("trainable: ")
    assert lines[0].endswith("(head)")
    assert len([line for line in lines if line[:8].strip()[:1].isdigit()]) == 25
    assert [sum(line.endswith(mark) for line in lines) for mark in ("  lowest", "  steepest")] == [1, 1]
    assert any(line.startswith("suggestion: ") for line in lines)
    assert (tmp_path / "rates.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["rates.png"]


def test_the_command_prints_json(run):
    code, out, _ = run("lr-find", *FEW, "--train", "head", "--batches", "1", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["suggestion"] in [each["lr"] for each in found["losses"]]
    assert len(found["losses"]) == 25


@pytest.mark.parametrize("name", ["rates.xyz", "nowhere/rates.png"])
def test_a_plot_that_cannot_be_written_is_an_error_with_a_fix(name, tmp_path):
    with pytest.raises(tf.UsageError, match="cannot write the plot .* name a .png file"):
        suggest_lr({1e-2: 1.0, 1e-1: 0.9, 1.0: 1.5}).plot(tmp_path / name)


def test_a_selector_without_a_match_is_an_error_that_names_it(run):
    code, _, err = run("lr-find", *FEW, "--train", "haed")
    assert code == 2
    assert "haed" in err
