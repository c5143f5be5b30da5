import pytest
import torch

from tuneforge.engine.loop.metric_set import HardestSamples


@pytest.mark.parametrize("batch_size", [1, 4, 7, 50])
def test_hardest_samples_are_those_of_the_largest_losses_in_any_batches(batch_size):
    generator = torch.Generator().manual_seed(0)
    losses = torch.randint(0, 6, (50,), generator=generator).float()  # with ties and correct samples
    outputs = torch.randn(50, 3, generator=generator, dtype=torch.bfloat16)
    hardest = HardestSamples(8)
    for indices in torch.arange(50).split(batch_size):
        hardest.update(losses[indices], indices, outputs[indices])
    expected = sorted(range(50), key=lambda row: (-losses[row], row))[:8]
    assert hardest.indices.tolist() == expected
    assert torch.equal(hardest.losses, losses[expected])
    assert torch.equal(hardest.outputs, outputs[expected].float())


def test_correct_samples_are_never_among_the_hardest():
    hardest = HardestSamples(8)
    hardest.update(torch.zeros(3), torch.arange(3), torch.zeros(3, 2))
    assert len(hardest.indices) == len(hardest.outputs) == 0
