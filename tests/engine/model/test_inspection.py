"""An inspection restores all that a module holds, and names what has changed."""

import collections
import random

import attrs
import numpy as np
import pytest
import torch
from torch import nn

from tuneforge.engine.model.inspection import StateCopy, preserve_state


@attrs.define
class Meter:
    total: float = 0.0


class Holder(nn.Module):
    level = 1

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.register_buffer("center", torch.zeros(2))
        self.numbers, self.queue, self.names = [1], collections.deque([1]), {"a"}
        self.stats, self.meter, self.array = {"n": 0}, Meter(), np.zeros(2)
        self.mean = torch.zeros(2)
        self.generators = random.Random(0), np.random.default_rng(0), torch.Generator()


CHANGES = {
    "linear.weight": lambda each: each.linear.weight.data.mul_(2),
    "linear.bias": lambda each: setattr(each.linear, "bias", nn.Parameter(torch.ones(2))),
    "center": lambda each: each.center.add_(1),
    "center is assigned": lambda each: setattr(each, "center", each.center + 1),
    "requires_grad of center": lambda each: each.center.add_(each.linear.bias),
    "requires_grad of linear.weight": lambda each: each.linear.weight.requires_grad_(False),
    "numbers[1]": lambda each: each.numbers.append(2),
    "queue[0]": lambda each: each.queue.appendleft(0),
    "names": lambda each: each.names.add("b"),
    "stats['n']": lambda each: each.stats.update(n=1),
    "meter.total": lambda each: setattr(each.meter, "total", 1.0),
    "array": lambda each: each.array.__setitem__(0, 1.0),
    "mean": lambda each: setattr(each, "mean", each.mean + 1),
    "mean in place": lambda each: each.mean.add_(1),
    "generators[0]": lambda each: each.generators[0].random(),
    "generators[1]": lambda each: each.generators[1].random(),
    "generators[2]": lambda each: torch.rand(1, generator=each.generators[2]),
    "extra": lambda each: setattr(each, "extra", 1),
    "Holder.level": lambda each: setattr(type(each), "level", 2),
    "added.weight": lambda each: setattr(each, "added", nn.Linear(1, 1)),
    "linear._forward_hooks": lambda each: each.linear.register_forward_hook(lambda *args: None),
}


@pytest.mark.parametrize("name", CHANGES)
def test_change_is_named_and_restored(name):
    holder = Holder()
    before, tensors = StateCopy({"": holder}), (holder.center, holder.mean, holder.linear.bias)
    with torch.no_grad() if name in ("center",) else torch.enable_grad():
        CHANGES[name](holder)
    named = [path for path in before.changes() if path.startswith(name.partition(" is ")[0].partition(" in ")[0])]
    assert named
    before.restore()
    assert before.changes() == {}
    assert all(
        one is other for one, other in zip(tensors, (holder.center, holder.mean, holder.linear.bias), strict=True)
    )
    assert not holder.center.requires_grad


def test_modes_and_random_generators_are_restored():
    holder = Holder()
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    with preserve_state(holder):
        holder.eval()
        random.random(), np.random.rand(), torch.rand(1)
    assert holder.training
    assert holder.linear.training
    assert states[0] == random.getstate()
    assert states[1] == np.random.get_state()[1].tolist()
    assert torch.equal(states[2], torch.get_rng_state())


def test_gradients_are_restored():
    holder = Holder()
    holder.linear.weight.grad = gradient = torch.ones(2, 2)
    with preserve_state(holder):
        holder.linear.weight.grad = None
    assert holder.linear.weight.grad is gradient


def test_equal_value_in_another_object_is_no_change():
    holder = Holder()
    before = StateCopy({"": holder})
    holder.mean, holder.stats, holder.numbers = torch.zeros(2), {"n": 0}, [1]
    assert before.changes() == {}
    holder.mean = torch.tensor([0.0, -0.0])
    assert list(before.changes()) == ["mean"]
