"""NaN and Inf are found at the step that produces them, and running out of memory repeats a step with fewer samples.

The full set of injected values: `TUNEFORGE_NANS=20 python -m pytest tests/engine/loop/test_backward.py`.
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
INJECTED = [2 + number * (STEPS - 2) // COUNT for number in range(COUNT)]
EPOCHS = [tf.Phase("all", epochs=4, lr=0.01)]


class NonFinite:
    """Injects NaN into the loss, a gradient or an input at one optimizer step."""

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


class NonFiniteOnce(NonFinite):
    """`NonFinite` that removes its gradient hook after the step."""

    @tf.hookimpl(wrapper=True)
    def train_step(self, run, batch):
        if run.step + 1 > self.step and self.kind == "gradient":
            run.model.parameters()["second.0.weight"]._backward_hooks.clear()
        result = yield from NonFinite.train_step(self, run, batch)
        return result


class SkipsByHand:
    """Skips one optimizer step as a user would: gradients are dropped and buffers restored."""

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


def are_equal(one, other):
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize("step", INJECTED)
@pytest.mark.parametrize("kind", ["loss", "gradient", "input"])
def test_nan_halts_the_run_at_its_step_and_names_the_samples(tune, kind, step):
    nonfinite = NonFiniteOnce(kind, step)
    with pytest.raises(tf.HaltError, match=f"optimizer step {step}[,; ]") as caught:
        tune(EPOCHS, callbacks=[nonfinite])
    assert caught.value.exit_code == 70
    assert "sample" in str(caught.value)
    if kind == "input":
        assert f"NaN or Inf in the input of {nonfinite.named}" in str(caught.value)
    if kind == "gradient":
        assert "second.0.weight" in str(caught.value)


@pytest.mark.parametrize("step", INJECTED)
def test_skipped_step_changes_nothing(tune, step):
    by_hand = tune(EPOCHS, callbacks=[SkipsByHand(step)], optimizer="sgd")
    for kind in ("loss", "gradient", "input"):
        result = tune(EPOCHS, callbacks=[NonFiniteOnce(kind, step)], on_nan="skip", optimizer="sgd")
        assert result.strategy_steps[0][1].skipped_steps == (step,)
        assert are_equal(weights(result), weights(by_hand))


@pytest.mark.parametrize("step", INJECTED)
@pytest.mark.parametrize("kind", ["loss", "gradient", "input"])
def test_rollback_restores_the_epochs_initial_weights_and_halves_the_lr(tune, kind, step):
    lrs = []

    class Recorder:
        @tf.hookimpl
        def epoch_ended(self, run):
            lrs.append(run.history[-1]["lr"])

    phase = attrs.evolve(EPOCHS[0], schedule="constant")
    result = tune([phase], callbacks=[NonFiniteOnce(kind, step), Recorder(), ComponentSpec("ema")], on_nan="rollback")
    assert result.strategy_steps[0][1].skipped_steps == (step,)
    assert lrs == [0.01 if (epoch + 1) * 6 <= step else 0.005 for epoch in range(4)]  # of each epoch's last step
    assert all(tensor.isfinite().all() for tensor in weights(result).values())


@pytest.mark.parametrize("on_nan", ["skip", "rollback"])
def test_run_killed_after_a_skip_or_rollback_resumes_bit_identical(tune, tmp_path, monkeypatch, on_nan):
    settings = {"on_nan": on_nan, "checkpoint_s": 0.0, "model": tiny_net()}
    unbroken = tune(EPOCHS, callbacks=[NonFiniteOnce("loss", 9)], **settings)
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
        tune(EPOCHS, callbacks=[NonFiniteOnce("loss", 9)], **{**settings, "model": tiny_net()}, data=tiny_data())
    monkeypatch.undo()
    path = max(tmp_path.glob("run*"))
    objects = {"data": tiny_data(), "model": tiny_net(), "strategy": EPOCHS, "callbacks": [NonFiniteOnce("loss", 9)]}
    resumed = tf.Engine.resume(path, **objects).run()
    assert are_equal(weights(resumed), weights(unbroken))
    assert resumed.strategy_steps[0][1].skipped_steps == (9,)


def test_nan_in_the_weights_halts_a_run_that_skips_steps(tune):
    class WritesNaN:
        @tf.hookimpl(wrapper=True)
        def optimizer_step(self, run):
            result = yield
            if run.step == 1:
                with torch.no_grad():
                    run.model.parameters()["head.bias"].fill_(math.nan)
            return result

    with pytest.raises(tf.HaltError, match="10 steps in succession"):
        tune([tf.Phase("all", epochs=9, lr=0.01)], callbacks=[WritesNaN()], on_nan="skip", batch_size=4)


class WithoutNorm(nn.Module):
    """A network without BatchNorm, so that micro-batches add up to the batch, and with dropout."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.3))
        self.head = nn.Linear(16, 3)

    def forward(self, inputs):
        return self.head(self.body(inputs))


class SmallMemory:
    """Raises an out-of-memory error in forward or backward if a pass has more than `most` samples."""

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


class SetsMicroBatch:
    """Sets the micro-batch size before the step that would run out of memory."""

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
def test_oom_halves_the_micro_batch_and_the_run_equals_one_with_that_size(tune, where, start, grad_accum_steps):
    torch.manual_seed(3)
    settings = {"grad_accum_steps": grad_accum_steps, "optimizer": "adamw"}
    models = [WithoutNorm(), WithoutNorm()]
    models[1].load_state_dict(models[0].state_dict())
    small = tune(EPOCHS, model=models[0], callbacks=[SmallMemory(5, start=start, where=where)], **settings)
    expected = tune(EPOCHS, model=models[1], callbacks=[SetsMicroBatch(4, start)], **settings)
    assert are_equal(weights(small), weights(expected))
    assert "micro-batch size reduced to 4" in (small.run_dir / "log.txt").read_text()


def test_micro_batches_add_up_to_the_batch(tune):
    torch.manual_seed(3)
    models = [WithoutNorm(), WithoutNorm()]
    models[1].load_state_dict(models[0].state_dict())
    for model in models:
        model.body[2].p = 0.0
    whole, split = (tune(EPOCHS, model=model, micro_batch=size) for model, size in zip(models, (None, 5), strict=True))
    for name, tensor in weights(whole).items():
        torch.testing.assert_close(weights(split)[name], tensor, rtol=1e-4, atol=1e-6)
    assert split.report["splits"]["test"]["accuracy"] == whole.report["splits"]["test"]["accuracy"]


def test_oom_of_the_smallest_micro_batch_halts_and_batchnorm_is_noted(tune):
    with pytest.raises(tf.HaltError, match=r"a training pass of 2 sample.*tried to allocate 2 GiB") as caught:
        tune(EPOCHS, callbacks=[SmallMemory(1)])
    assert caught.value.exit_code == 70
    result = tune(EPOCHS, callbacks=[SmallMemory(9)])
    assert "BatchNorm now normalizes with micro-batches" in (result.run_dir / "log.txt").read_text()


def test_oom_without_a_message_halves_the_micro_batch(tune):
    class Exhausted:
        @tf.hookimpl(wrapper=True)
        def train_step(self, batch):
            if len(batch.indices) > 8:
                raise MemoryError
            result = yield
            return result

    result = tune(EPOCHS, callbacks=[Exhausted()])
    assert "micro-batch size reduced to 8" in (result.run_dir / "log.txt").read_text()


def test_oom_in_evaluation_repeats_it_with_smaller_batches(tune):
    class SmallEvaluation(WithoutNorm):
        def forward(self, inputs):
            if not self.training and len(inputs) > 10:
                raise torch.OutOfMemoryError("tried to allocate 2 GiB")
            return super().forward(inputs)

    torch.manual_seed(3)
    narrow, plain = SmallEvaluation(), WithoutNorm()
    plain.load_state_dict(narrow.state_dict())
    small, whole = (tune(EPOCHS, model=model, cache="off") for model in (narrow, plain))
    assert small.report["splits"]["test"]["confusion"] == whole.report["splits"]["test"]["confusion"]
    assert (small.run_dir / "hardest_samples.json").read_text() == (whole.run_dir / "hardest_samples.json").read_text()


def test_oom_in_diagnosis_and_head_fit_continues_with_smaller_batches(tune):
    class SmallEvaluation(WithoutNorm):
        def forward(self, inputs):
            if not self.training and len(inputs) > 10:
                raise torch.OutOfMemoryError("tried to allocate 2 GiB")
            return super().forward(inputs)

    def measure(model):
        diagnostics = []

        def strategy(task):
            for measure in ("gradients", "lrs"):
                diagnostics.append((yield tf.Diagnosis(measure, measure=measure)).values)
            yield tf.HeadFit("head")

        result = tune(strategy, model=model)
        return diagnostics, weights(result), (result.run_dir / "log.txt").read_text()

    torch.manual_seed(3)
    narrow, plain = SmallEvaluation(), WithoutNorm()
    plain.load_state_dict(narrow.state_dict())
    (small, fitted, log), (whole, fitted_whole, _) = measure(narrow), measure(plain)
    for one, other in zip(small, whole, strict=True):
        assert one == pytest.approx(other, rel=1e-4)
    for name, tensor in fitted_whole.items():
        torch.testing.assert_close(fitted[name], tensor, rtol=1e-3, atol=1e-4)
    assert "out of memory during a diagnosis: micro-batch size reduced to 8" in log


@pytest.mark.parametrize("optimizer", ["adamw", tf.use("sgd", momentum=0.0), tf.use("torch", kind="adagrad")])
def test_embedding_with_sparse_gradients_trains_as_one_with_dense_ones(tune, optimizer):
    rows = torch.arange(36).reshape(12, 3) % 5
    data = (rows, torch.arange(12) % 3)
    tuned = []
    for sparse in (True, False):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            net = torch.nn.Sequential(torch.nn.EmbeddingBag(5, 4, sparse=sparse), torch.nn.Linear(4, 3))
        tune([tf.Phase("all", epochs=2)], model=net, data=data, optimizer=optimizer, micro_batch=4)
        tuned.append(net)
    assert torch.equal(tuned[0][0].weight, tuned[1][0].weight)


class DetachedBody(nn.Module):
    """No gradient passes the body's output."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, inputs):
        return self.head(self.body(inputs).detach())


def test_phase_whose_parameters_do_not_reach_the_loss_is_refused_by_name(tune):
    with pytest.raises(tf.UsageError, match=r"loss does not depend on any parameter.*phase 'body'.*trains body"):
        tune([tf.Phase("body", train="body.*", epochs=1)], model=DetachedBody())
