"""Plain attributes of a model that change while it trains come back on resume, or the resume is refused."""

import collections
import types

import numpy as np
import pytest
import torch
from torch import nn

from tuneforge import UsageError
from tuneforge.engine.model.plain_attributes import AttributeState
from tuneforge.engine.storage.checkpoint import pack, unpack
from tuneforge.testing.fuzz import FuzzProgram, check_program


def build(**attributes):
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    for name, value in attributes.items():
        setattr(module[0], name, value)
    return module


def saved(state: AttributeState):
    tensors: dict[str, torch.Tensor] = {}
    return unpack(pack(state.state(), tensors, {}), tensors)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (0, 7),
        (1.0, 0.25),
        ("warm", "cold"),
        (False, True),
        (None, 3),
        (torch.zeros(2), torch.tensor([1.0, -0.0])),
        ([1], [1, 2]),
        ((1, 2), (3,)),
        ({"steps": 0}, {"steps": 4, "mean": torch.ones(1)}),
    ],
    ids=repr,
)
def test_a_changed_attribute_of_a_submodule_is_restored(before, after):
    module, fresh = build(value=before), build(value=before)
    state, other = AttributeState(module), AttributeState(fresh)
    module[0].value = after
    other.restore(saved(state))
    assert type(fresh[0].value) is type(after)
    assert repr(fresh[0].value) == repr(after)


def test_changes_in_place_and_in_objects_of_the_user_are_restored():
    module, fresh = (build(stats=types.SimpleNamespace(steps=0), mean=torch.zeros(2)) for _ in range(2))
    state, other = AttributeState(module), AttributeState(fresh)
    module[0].stats.steps += 5
    module[0].mean.add_(1)
    other.restore(saved(state))
    assert fresh[0].stats.steps == 5
    assert fresh[0].mean.tolist() == [1, 1]


def test_parameters_buffers_modes_and_results_with_a_graph_are_no_plain_attributes():
    module = build()
    state = AttributeState(module)
    module.train()
    module[0].penalty = module(torch.randn(4, 2)).square().mean()
    module[1].running_mean = torch.ones(2)
    module[0].weight.data.add_(1)
    assert state.state() == {"values": {}, "unsaved": []}


@pytest.mark.parametrize(
    ("value", "change"),
    [
        (np.zeros(2), lambda value: value.__setitem__(0, 1.0)),
        (collections.deque([0.5]), lambda value: value.append(1.5)),
        ({1}, lambda value: value.add(2)),
        (torch.Generator(), lambda value: torch.rand(1, generator=value)),
        ({"ring": collections.deque()}, lambda value: value["ring"].append(1)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_change_that_a_checkpoint_cannot_hold_refuses_the_resume(value, change):
    module = build(value=value)
    state = AttributeState(module)
    change(value)
    with pytest.raises(UsageError, match=r"the checkpoint does not hold '0\.value"):
        AttributeState(build(value=value)).restore(saved(state))


class Counts(nn.Module):
    """Counts its passes in several attributes, some of which code reads."""

    seen = used = looked_up = by_callback = 0

    def forward(self, inputs):
        self.seen += 1
        self.used += 1
        self.looked_up += 1
        self.by_callback += 2
        return inputs * self.used + getattr(self, "looked_up")  # noqa: B009 - what the test is about


class Reader:
    def epoch_ended(self, run):
        return run.model.module.by_callback


@pytest.mark.parametrize("others", [[], [Reader()]])
def test_a_count_that_nothing_reads_is_that_of_the_process(others):
    module, fresh = Counts(), Counts()
    state, other = AttributeState(module, others), AttributeState(fresh, others)
    module(torch.zeros(1))
    other.restore(saved(state))
    assert (fresh.seen, fresh.used, fresh.looked_up) == (0, 1, 1)
    assert fresh.by_callback == (2 if others else 0)


def test_a_resumed_run_continues_with_counters_and_an_annealed_temperature():
    program = FuzzProgram(
        seed=3, blocks=("counter", "tensor-attribute"), traits=("temperature",),
        settings={"batch_size": 8, "checkpoint_steps": 1},
    )  # fmt: skip
    outcome = check_program(program, ["resume"])["resume"]
    assert (outcome.verdict, outcome.bitwise) == ("equal", True), outcome.reason
