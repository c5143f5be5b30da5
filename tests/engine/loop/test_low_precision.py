import pytest
import torch
from tiny import tiny_net

import tuneforge as tf


def plain_net(dtype):
    net = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    with torch.no_grad():
        net[0].weight.copy_(torch.eye(8))
    return net.to(dtype)


@pytest.mark.parametrize(
    ("dtype", "lr", "said"),
    [(torch.bfloat16, 1e-6, True), (torch.float16, 1e-6, True), (torch.bfloat16, 0.1, False), (torch.float32, 1e-6, 0)],
)
def test_phase_says_that_updates_were_lost_to_the_spacing_of_the_dtype(tune, dtype, lr, said):
    lines = []
    tune([tf.Phase("all", epochs=1, lr=lr)], model=plain_net(dtype), log=lines.append)
    found = [line for line in lines if "rounded away" in line]
    assert bool(found) == said
    assert all(str(dtype).removeprefix("torch.") in line for line in found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_head_of_any_dtype_is_solved(tune, dtype):
    net = plain_net(dtype)
    result = tune([tf.HeadFit("fit")], model=net)
    assert net[2].weight.dtype == dtype
    assert result.report["splits"]["val"]["accuracy"] > 0.8


def test_large_gradient_that_an_adaptive_optimizer_scales_down_does_not_halt_a_bfloat16_phase(tune):
    class Sum:
        @tf.hookimpl
        def train_step(self, run, batch):
            outputs = run.forward(batch.inputs)
            return 1e4 * torch.nn.functional.cross_entropy(outputs, batch.targets), outputs

    result = tune([tf.Phase("all", epochs=1, lr=1e-6)], model=tiny_net().bfloat16(), loss=Sum())
    assert result.strategy_steps[0][1].skipped_steps == ()
