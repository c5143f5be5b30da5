import pytest
import torch
from tiny import tiny_net

import tuneforge as tf


class Raise:
    """A callback that raises when the phase ends."""

    def __init__(self, error):
        self.error = error

    @tf.hookimpl
    def epoch_ended(self, run):
        raise self.error


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), ValueError("broken"), tf.HaltError("halted")], ids=["ctrl-c", "error", "halt"]
)
def test_every_exit_restores_modes_and_requires_grad_and_drops_gradients(tune, error):
    net = tiny_net()
    net.second.eval()
    net.first[0].bias.requires_grad_(False)
    flags = [(module.training, len(module._forward_pre_hooks), len(module._forward_hooks)) for module in net.modules()]
    requires_grad = [parameter.requires_grad for parameter in net.parameters()]
    with pytest.raises((KeyboardInterrupt, tf.TuneforgeError)):
        tune([tf.Phase("head", train="head", epochs=2)], model=net, callbacks=[Raise(error)])
    assert flags == [
        (module.training, len(module._forward_pre_hooks), len(module._forward_hooks)) for module in net.modules()
    ]
    assert requires_grad == [parameter.requires_grad for parameter in net.parameters()]
    assert all(parameter.grad is None for parameter in net.parameters())


def test_module_of_an_interrupted_run_can_be_trained_by_the_next_run(tune):
    net = tiny_net()
    body = net.first[0].weight.detach().clone()
    with pytest.raises(KeyboardInterrupt):
        tune([tf.Phase("head", train="head", epochs=2)], model=net, callbacks=[Raise(KeyboardInterrupt())])
    assert torch.equal(net.first[0].weight, body)
    tune([tf.Phase("all", epochs=1)], model=net)
    assert not torch.equal(net.first[0].weight, body)
