"""Micro-batches give the loss and the gradient of the whole batch, or are refused before training."""

import pytest
import torch
from tiny import tiny_data, tiny_net
from torch import nn
from torch.nn import functional as F

import tuneforge as tf

WEIGHTS = torch.tensor([5.0, 1.0, 0.2])
ONE_EPOCH = [tf.Phase("a", epochs=1, lr=0.1, schedule="constant", optimizer=tf.use("sgd", momentum=0.0))]


class Net(nn.Module):
    """Two layers with dropout: (b, 8) -> (b, 3)."""

    def __init__(self, dropout=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(dropout))
        self.head = nn.Linear(16, 3)

    def forward(self, inputs):
        return self.head(self.body(inputs))


class CenteredInTraining(Net):
    def forward(self, inputs):
        return super().forward(inputs - inputs.mean(0) if self.training else inputs)


class Centered(Net):
    def forward(self, inputs):
        return super().forward(inputs - inputs.mean(0))


class Loss:
    """A `train_step` with a loss of the outputs and the targets."""

    def __init__(self, loss):
        self.loss, self.calls = loss, []

    @tf.hookimpl
    def train_step(self, run, batch):
        self.calls.append(len(batch.targets))
        run.state(self)["count"] = run.state(self).get("count", 0) + 1
        outputs = run.forward(batch.inputs)
        return self.loss(outputs, batch.targets), outputs


def weighted(outputs, targets):
    return F.cross_entropy(outputs, targets, weight=WEIGHTS)


def per_sample_weighted(outputs, targets):
    return (F.cross_entropy(outputs, targets, reduction="none") * WEIGHTS[targets]).mean()


def hardest_half(outputs, targets):
    losses = F.cross_entropy(outputs, targets, reduction="none")
    return losses.topk(max(1, len(losses) // 2)).values.mean()


def ignores_a_class(outputs, targets):
    return F.cross_entropy(outputs, targets, ignore_index=1)


def summed(outputs, targets):
    return F.cross_entropy(outputs, targets, reduction="sum")


def decorrelated(outputs, targets):
    return F.cross_entropy(outputs, targets) + torch.cov(outputs.T).square().sum()


@pytest.mark.parametrize("loss", [weighted, hardest_half, ignores_a_class, summed, decorrelated])
@pytest.mark.parametrize("micro_batch", [1, 8])
def test_loss_that_is_no_mean_over_samples_is_refused(tune, loss, micro_batch):
    net = Net()
    before = {name: each.clone() for name, each in net.state_dict().items()}
    with pytest.raises(tf.UsageError, match=f"at --micro-batch {micro_batch}; the (loss|gradient)"):
        tune(ONE_EPOCH, model=net, loss=Loss(loss), micro_batch=micro_batch)
    assert all(torch.equal(each, before[name]) for name, each in net.state_dict().items())


@pytest.mark.parametrize("kind", [Centered, CenteredInTraining])
def test_model_that_mixes_samples_is_refused(tune, kind):
    with pytest.raises(tf.UsageError, match="outputs.* of a batch and of its parts differ"):
        tune(ONE_EPOCH, model=kind(), micro_batch=4)


@pytest.mark.parametrize("loss", [per_sample_weighted, lambda outputs, targets: F.cross_entropy(outputs, targets)])
def test_mean_over_samples_trains_in_micro_batches_as_in_whole_batches(tune, loss):
    whole, parts = (tune(ONE_EPOCH, model=Net(), loss=Loss(loss), micro_batch=size) for size in (None, 5))
    for name, tensor in whole.model.module.state_dict().items():
        torch.testing.assert_close(parts.model.module.state_dict()[name], tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("loss", ["cross-entropy", tf.use("cross-entropy", class_weights={"a": 3.0})])
def test_builtin_losses_dropout_and_batchnorm_are_accepted(tune, loss):
    for net in (Net(dropout=0.5), tiny_net()):
        assert tune(ONE_EPOCH, model=net, loss=loss, micro_batch=4).report["splits"]
    sampled = [tf.Phase("a", epochs=1, class_weights="balanced")]
    assert tune(sampled, model=Net(), loss=loss, micro_batch=4, data=tiny_data()).report["splits"]


def test_comparison_leaves_components_and_their_state_as_they_were(tune):
    loss = Loss(per_sample_weighted)

    class Reads:
        @tf.hookimpl
        def phase_ended(self, run):
            self.count = run.state(loss)["count"]

    reads = Reads()
    tune(ONE_EPOCH, model=Net(), loss=loss, micro_batch=8, callbacks=[reads])
    assert loss.calls == [8] * 12
    assert reads.count == 12


def test_loss_that_is_no_mean_is_refused_when_memory_runs_out(tune):
    class SmallMemory:
        @tf.hookimpl(wrapper=True)
        def train_step(self, run, batch):
            if len(batch.indices) == 16 and run.forward_pass.__class__.__name__ == "ForwardPass":
                raise torch.OutOfMemoryError("tried to allocate 2 GiB")
            result = yield
            return result

    with pytest.raises(tf.UsageError, match="which ran out of memory"):
        tune(ONE_EPOCH, model=Net(), loss=Loss(weighted), callbacks=[SmallMemory()])
