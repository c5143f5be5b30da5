"""Weights, buffers, outputs and metrics that are NaN or Inf end a run, also after its last update."""

import math

import pytest
import torch
from tiny import TinyNet, tiny_data, tiny_net
from torch import nn

import tuneforge as tf

ONE_STEP = [tf.Phase("a", steps=1, lr=0.01)]


class Breaks:
    """Writes a value into a tensor in one hook."""

    def __init__(self, name, value):
        self.name, self.value = name, value

    def write(self, run):
        with torch.no_grad():
            run.model.module.state_dict()[self.name].fill_(self.value)


class BreaksInStep(Breaks):
    @tf.hookimpl(wrapper=True)
    def optimizer_step(self, run):
        result = yield
        self.write(run)
        return result


class BreaksAfterPhase(Breaks):
    @tf.hookimpl
    def phase_ended(self, run):
        self.write(run)


@pytest.mark.parametrize("callback", [BreaksInStep, BreaksAfterPhase])
@pytest.mark.parametrize("name", ["head.weight", "first.1.running_var"])
@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_nonfinite_tensor_after_the_last_update_halts_the_run(tune, callback, name, value):
    with pytest.raises(tf.HaltError, match=f"NaN or Inf: {name}") as caught:
        tune(ONE_STEP, callbacks=[callback(name, value)])
    assert "phase 'a', epoch 1" in str(caught.value) or "the end of step 'a'" in str(caught.value)


def test_too_large_last_update_halts_the_run(tune):
    net = tiny_net()
    with torch.no_grad():
        net.head.weight.mul_(1e3)  # so that the loss and its gradient are large, and finite
    with pytest.raises(tf.HaltError, match="NaN or Inf"):
        tune([tf.Phase("a", train="head", steps=1, lr=3e38, schedule="constant")], model=net, optimizer="sgd")


def test_extreme_sample_that_breaks_batchnorm_statistics_halts_the_run(tune):
    data = tiny_data()
    data.train.source.inputs[30] *= 1e20
    with pytest.raises(tf.HaltError, match=r"first\.1\.running_var"):
        tune([tf.Phase("a", epochs=1, lr=1e-3)], data=data)


def test_buffer_that_was_infinite_at_the_start_is_left_alone(tune):
    class Masked(TinyNet):
        def __init__(self):
            super().__init__()
            self.register_buffer("mask", torch.tensor([0.0, 0.0, -math.inf]))

        def forward(self, inputs):
            return super().forward(inputs) + self.mask

    data = tiny_data()
    for split in (data.train, data.val, data.test):
        split.targets.clamp_(max=1)
    result = tune(ONE_STEP, model=Masked(), data=data)
    assert result.report["splits"]["val"]["accuracy"] >= 0


class OddInEvaluation(TinyNet):
    """Adds a value to the outputs in eval mode, for the first `count` samples of a batch."""

    def __init__(self, value, count):
        super().__init__()
        self.value, self.count = value, count

    def forward(self, inputs):
        outputs = super().forward(inputs)
        if not self.training:
            outputs[: self.count] += self.value
        return outputs


@pytest.mark.parametrize(("value", "count"), [(math.nan, 30), (math.nan, 1), (math.inf, 2), (-math.inf, 3)])
def test_nonfinite_validation_output_halts_the_run_and_names_the_samples(tune, value, count):
    with pytest.raises(tf.HaltError, match=f"NaN or Inf for {count} of 30 samples of 'val'") as caught:
        tune(ONE_STEP, model=OddInEvaluation(value, count), cache="off")
    assert "samples 0" in str(caught.value)


def test_nonfinite_test_output_is_logged_with_its_sample(tune):
    data = tiny_data()
    inputs = data.test.source.inputs.clone()
    inputs[4] = math.nan
    lines = []
    data = tf.Data(data.train, data.val, tf.Split(inputs, data.test.targets), data.inputs, data.targets)
    tune(ONE_STEP, data=data, log=lines.append)
    assert any("NaN or Inf for 1 of 30 samples of 'test': 4; they count" in line for line in lines)


class Constant:
    """A metric `odd` with the same value in each epoch."""

    def __init__(self, value):
        self.value = value

    @tf.hookimpl
    def evaluate(self):
        return self

    def update(self, outputs, targets):
        pass

    def compute(self):
        return {"odd": self.value}


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("options", [{"patience": 1}, {"restore_best": True}, {}])
def test_monitored_metric_that_is_never_finite_halts_the_run(tune, value, options):
    phase = tf.Phase("a", epochs=2, lr=0.01, monitor="odd", monitor_mode="max", **options)
    with pytest.raises(tf.HaltError, match="'odd' is (nan|inf) after every epoch"):
        tune([phase], metrics=["classification", Constant(value)])


def test_average_whose_metric_is_never_finite_halts_the_run(tune):
    average = tf.WeightAverage("mix", snapshots=["start", "a"], monitor="odd", monitor_mode="max")
    with pytest.raises(tf.HaltError, match="for every candidate"):
        tune([*ONE_STEP, average], metrics=["classification", Constant(math.nan)])


def test_head_solved_on_nonfinite_features_halts_the_run(tune):
    class Overflows(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(8, 4), nn.Linear(4, 3)

        def forward(self, inputs):
            return self.head(self.body(inputs) * 1e30 * 1e30 if len(inputs) > 2 else self.body(inputs))

    with pytest.raises(tf.TuneforgeError, match="NaN or Inf for 96 of 96 samples"):
        tune([tf.HeadFit("fit")], model=Overflows(), cache="off")
