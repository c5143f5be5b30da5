import attrs
import pytest
import torch
from tiny import tiny_data
from torch import nn

import tuneforge as tf
from tuneforge.engine.storage.safetensors_io import load_tensors


class Filter(nn.Module):
    """A complex gain between two Fourier transforms, then a head."""

    def __init__(self):
        super().__init__()
        self.gain, self.head = nn.Parameter(torch.ones(5, dtype=torch.complex64)), nn.Linear(8, 3)

    def forward(self, inputs):
        return self.head(torch.fft.irfft(torch.fft.rfft(inputs) * self.gain, n=8))


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", tf.use("torch", kind="RMSprop")])
def test_complex_parameter_trains_after_a_phase_in_which_it_was_frozen(tune, optimizer):
    net = Filter()
    phases = [tf.Phase("head", train="head", epochs=1), tf.Phase("all", epochs=2)]
    result = tune(phases, model=net, optimizer=optimizer, callbacks=[tf.use("ema"), tf.use("grad-clip")])
    assert not torch.equal(net.gain, torch.ones(5, dtype=torch.complex64))
    assert torch.equal(load_tensors(result.run_dir / "model.safetensors")[0]["gain"], net.gain.detach())


def test_update_of_a_complex_parameter_is_that_of_torch(tune):
    net, plain = Filter(), Filter()
    plain.load_state_dict(net.state_dict())
    inputs, targets = torch.randn(16, 8, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 3
    tune(
        [tf.Phase("all", epochs=1, lr=0.1, schedule="constant", weight_decay=0.0)],
        model=net,
        data=attrs.evolve(tiny_data(), train=tf.Split(inputs, targets)),
        optimizer="adamw",
    )
    optimizer = torch.optim.AdamW(plain.parameters(), 0.1, weight_decay=0.0)
    nn.functional.cross_entropy(plain(inputs), targets).backward()
    optimizer.step()
    assert torch.allclose(net.gain, plain.gain, atol=1e-6)
