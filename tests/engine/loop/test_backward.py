"""Numbers that are none are found at their step, and memory that runs out costs a repeated step.

The full set of planted numbers: `TUNEFORGE_NANS=20 python -m pytest tests/engine/loop/test_backward.py`.
"""

import math
import os

import attrs
import pytest
import torch
from tiny import tiny_data, tiny_net
from torch import nn

import tuneforge as tf
from tuneforge.engine.storage import fault_injection as faults
from tuneforge.plugin import ComponentSpec

STEPS = 24
COUNT = int(os.environ.get("TUNEFORGE_NANS", "2"))
PLANTED = [2 + place * (STEPS - 2) // COUNT for place in range(COUNT)]
EPOCHS = [tf.Phase("all", epochs=4, lr=0.01)]


class Spoils:
    """Puts a number that is none where it is told, at one optimizer step; what comes before it is untouched."""

    def __init__(self, kind, step, value=math.nan):
        self.kind, self.step, self.value, self.seen = kind, step, value, []

    @tf.hookimpl(wrapper=True)
    def train_step(self, run, batch):
        here = run.step + 1 == self.step and (self.kind, run.step) not in self.seen
        if here:
            self.seen.append((self.kind, run.step))
        if here and self.kind == "input":
            batch.inputs[3, 2] = self.value
            self.named = run.data.train.id_of(int(batch.indices[3]))
        loss, outputs = yield
        if here and self.kind == "loss":
            return loss * self.value, outputs
        if here and self.kind == "gradient":
            weight = run.model.parameters()["second.0.weight"]
            weight.register_hook(lambda gradient: gradient.index_fill(0, torch.tensor([1]), self.value))
        return loss, outputs

    @tf.hookimpl(wrapper=True)
    def optimizer_step(self, run):
        assert all(each.grad is None or each.grad.isfinite().all() for each in run.model.module.parameters())
        result = yield
        return result


class SpoilsOnce(Spoils):
    """The same; its hook on a gradient is taken off after the step."""

    @tf.hookimpl(wrapper=True)
    def train_step(self, run, batch):
        if run.step + 1 > self.step and self.kind == "gradient":
            run.model.parameters()["second.0.weight"]._backward_hooks.clear()
        result = yield from Spoils.train_step(self, run, batch)
        return result


class LeavesOut:
    """What the user would do by hand: nothing at all in that step."""

    def __init__(self, step):
        self.step = step

    @tf.hookimpl(wrapper=True)
    def train_step(self, run, batch):
        if run.step + 1 == self.step:
            self.before = {name: each.clone() for name, each in run.model.module.named_buffers()}
        result = yield
        return result

    @tf.hookimpl(wrapper=True)
    def optimizer_step(self, run):
        if run.step + 1 == self.step:
            for name, buffer in run.model.module.named_buffers():
                buffer.copy_(self.before[name])
            for parameter in run.model.module.parameters():
                parameter.grad = None
        result = yield
        return result


def weights(result):
    return result.model.module.state_dict()


def same(one, other):
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize("step", PLANTED)
@pytest.mark.parametrize("kind", ["loss", "gradient", "input"])
def test_a_number_that_is_none_halts_the_run_at_its_step_and_names_samples(tune, kind, step):
    spoils = SpoilsOnce(kind, step)
    with pytest.raises(tf.HaltError, match=f"optimizer step {step}[,; ]") as caught:
        tune(EPOCHS, callbacks=[spoils])
    assert caught.value.exit_code == 70
    assert "sample" in str(caught.value)
    if kind == "input":
        assert f"NaN or Inf in the input of {spoils.named}" in str(caught.value)
    if kind == "gradient":
        assert "second.0.weight" in str(caught.value)


@pytest.mark.parametrize("step", PLANTED)
def test_a_step_that_is_left_out_changes_nothing_whatever_was_wrong_in_it(tune, step):
    by_hand = tune(EPOCHS, callbacks=[LeavesOut(step)], optimizer="sgd")
    for kind in ("loss", "gradient", "input"):
        result = tune(EPOCHS, callbacks=[SpoilsOnce(kind, step)], on_nan="skip", optimizer="sgd")
        assert result.strategy_steps[0][1].skipped_steps == (step,)
        assert same(weights(result), weights(by_hand))


@pytest.mark.parametrize("step", PLANTED)
@pytest.mark.parametrize("kind", ["loss", "gradient", "input"])
def test_going_back_takes_the_weights_of_the_epochs_beginning_and_half_the_rate(tune, kind, step):
    rates = []

    class Watches:
        @tf.hookimpl
        def epoch_ended(self, run):
            rates.append(run.history[-1]["lr"])

    phase = attrs.evolve(EPOCHS[0], schedule="constant")
    result = tune([phase], callbacks=[SpoilsOnce(kind, step), Watches(), ComponentSpec("ema")], on_nan="rollback")
    assert result.strategy_steps[0][1].skipped_steps == (step,)
    assert rates == [0.01 if (epoch + 1) * 6 <= step else 0.005 for epoch in range(4)]  # of each epoch's last step
    assert all(tensor.isfinite().all() for tensor in weights(result).values())


@pytest.mark.parametrize("on_nan", ["skip", "rollback"])
def test_a_run_that_went_on_and_is_killed_after_that_ends_the_same(tune, tmp_path, monkeypatch, on_nan):
    given = {"on_nan": on_nan, "checkpoint_s": 0.0, "model": tiny_net()}
    whole = tune(EPOCHS, callbacks=[SpoilsOnce("loss", 9)], **given)
    seen = []

    class KilledError(BaseException):
        pass

    def at(point):
        if point == "step-saved":
            seen.append(point)
            if len(seen) == 11:
                raise KilledError

    monkeypatch.setattr(faults, "point", at)
    with pytest.raises(KilledError):
        tune(EPOCHS, callbacks=[SpoilsOnce("loss", 9)], **{**given, "model": tiny_net()}, data=tiny_data())
    monkeypatch.undo()
    path = max(tmp_path.glob("run*"))
    objects = {"data": tiny_data(), "model": tiny_net(), "strategy": EPOCHS, "callbacks": [SpoilsOnce("loss", 9)]}
    resumed = tf.Engine.resume(path, **objects).run()
    assert same(weights(resumed), weights(whole))
    assert resumed.strategy_steps[0][1].skipped_steps == (9,)


def test_weights_that_are_no_numbers_halt_a_run_that_leaves_steps_out(tune):
    class Ruins:
        @tf.hookimpl(wrapper=True)
        def optimizer_step(self, run):
            result = yield
            if run.step == 1:
                with torch.no_grad():
                    run.model.parameters()["head.bias"].fill_(math.nan)
            return result

    with pytest.raises(tf.HaltError, match="10 steps in succession"):
        tune([tf.Phase("all", epochs=9, lr=0.01)], callbacks=[Ruins()], on_nan="skip", batch_size=4)


class Plain(nn.Module):
    """No norm, so that pieces of a batch add up to it; dropout, so that random states count."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.3))
        self.head = nn.Linear(16, 3)

    def forward(self, inputs):
        return self.head(self.body(inputs))


class SmallMemory:
    """Memory for so many samples a pass, from a step on, as a device would tell it: in forward or in backward."""

    def __init__(self, most, *, start=1, where="forward"):
        self.most, self.start, self.where = most, start, where

    @tf.hookimpl(wrapper=True)
    def train_step(self, run, batch):
        full = run.step + 1 >= self.start and len(batch.indices) > self.most
        if full and self.where == "forward":
            raise torch.OutOfMemoryError("tried to allocate 2 GiB")
        loss, outputs = yield
        if full:

            def fail(gradient):
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 2 GiB")

            run.model.parameters()["body.0.bias"].register_hook(fail)
        elif self.where == "backward":
            (run.model.parameters()["body.0.bias"]._backward_hooks or {}).clear()
        return loss, outputs


class Told:
    """The user who knows from which step on a smaller pass is needed."""

    def __init__(self, most, start):
        self.most, self.start = most, start

    @tf.hookimpl
    def phase_started(self, run):
        if self.start == 1:
            run.engine_state.micro_batch_size = self.most

    @tf.hookimpl(wrapper=True)
    def optimizer_step(self, run):
        result = yield
        if run.step + 1 == self.start - 1:
            run.engine_state.micro_batch_size = self.most
        return result


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("start", [1, 7])
@pytest.mark.parametrize("grad_accum_steps", [1, 2])
def test_memory_that_runs_out_halves_the_pass_and_the_run_equals_one_told_so(tune, where, start, grad_accum_steps):
    torch.manual_seed(3)
    given = {"grad_accum_steps": grad_accum_steps, "optimizer": "adamw"}
    models = [Plain(), Plain()]
    models[1].load_state_dict(models[0].state_dict())
    small = tune(EPOCHS, model=models[0], callbacks=[SmallMemory(5, start=start, where=where)], **given)
    told = tune(EPOCHS, model=models[1], callbacks=[Told(4, start)], **given)
    assert same(weights(small), weights(told))
    assert "micro-batch size reduced to 4" in (small.run_dir / "log.txt").read_text()


def test_pieces_of_a_batch_add_up_to_the_batch(tune):
    torch.manual_seed(3)
    models = [Plain(), Plain()]
    models[1].load_state_dict(models[0].state_dict())
    for model in models:
        model.body[2].p = 0.0
    whole, pieces = (tune(EPOCHS, model=model, micro_batch=size) for model, size in zip(models, (None, 5), strict=True))
    for name, tensor in weights(whole).items():
        torch.testing.assert_close(weights(pieces)[name], tensor, rtol=1e-4, atol=1e-6)
    assert pieces.report["splits"]["test"]["accuracy"] == whole.report["splits"]["test"]["accuracy"]


def test_memory_for_no_sample_at_all_halts_and_norms_are_told_of(tune):
    with pytest.raises(tf.HaltError, match=r"a training pass of 2 sample.*tried to allocate 2 GiB") as caught:
        tune(EPOCHS, callbacks=[SmallMemory(1)])
    assert caught.value.exit_code == 70
    result = tune(EPOCHS, callbacks=[SmallMemory(9)])
    assert "BatchNorm now normalizes with micro-batches" in (result.run_dir / "log.txt").read_text()


def test_an_evaluation_that_runs_out_of_memory_is_done_again_in_smaller_passes(tune):
    class Narrow(Plain):
        def forward(self, inputs):
            if not self.training and len(inputs) > 10:
                raise torch.OutOfMemoryError("tried to allocate 2 GiB")
            return super().forward(inputs)

    torch.manual_seed(3)
    narrow, plain = Narrow(), Plain()
    plain.load_state_dict(narrow.state_dict())
    small, whole = (tune(EPOCHS, model=model, cache="off") for model in (narrow, plain))
    assert small.report["splits"]["test"]["confusion"] == whole.report["splits"]["test"]["confusion"]
    assert (small.run_dir / "hardest_samples.json").read_text() == (whole.run_dir / "hardest_samples.json").read_text()


def test_a_probe_and_a_fit_that_run_out_of_memory_go_on_in_smaller_passes(tune):
    class Narrow(Plain):
        def forward(self, inputs):
            if not self.training and len(inputs) > 10:
                raise torch.OutOfMemoryError("tried to allocate 2 GiB")
            return super().forward(inputs)

    def measured(model):
        readings = []

        def strategy(task):
            for measure in ("gradients", "lrs"):
                readings.append((yield tf.Diagnosis(measure, measure=measure)).values)
            yield tf.HeadFit("head")

        result = tune(strategy, model=model)
        return readings, weights(result), (result.run_dir / "log.txt").read_text()

    torch.manual_seed(3)
    narrow, plain = Narrow(), Plain()
    plain.load_state_dict(narrow.state_dict())
    (small, fitted, log), (whole, fitted_whole, _) = measured(narrow), measured(plain)
    for one, other in zip(small, whole, strict=True):
        assert one == pytest.approx(other, rel=1e-4)
    for name, tensor in fitted_whole.items():
        torch.testing.assert_close(fitted[name], tensor, rtol=1e-3, atol=1e-4)
    assert "out of memory during a diagnosis: micro-batch size reduced to 8" in log
