"""`--compile`: the phases train what they name, as without it."""

import shutil

import pytest
import torch
from torch import nn

import tuneforge as tf

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler"),
    pytest.mark.filterwarnings("ignore"),  # of torch's own compiler
]

PHASES = [
    tf.Phase("head", train="head", epochs=2, lr=0.02),
    tf.Phase("top", train="groups[-2:]", epochs=2, lr=0.02),
    tf.Phase("all", train="all", epochs=2, lr=0.02),
]


def network():
    torch.manual_seed(0)
    layers = {"first": nn.Linear(8, 16), "norm": nn.BatchNorm1d(16), "act": nn.ReLU(), "second": nn.Linear(16, 16)}
    return nn.Sequential(*layers.values(), nn.ReLU(), nn.Linear(16, 3))


def test_what_a_later_phase_thaws_trains_under_compile_as_without(tune):
    said = []
    fast = tune(PHASES, model=network(), optimizer="sgd", compile=True, log=said.append)
    slow = tune(PHASES, model=network(), optimizer="sgd")
    start = network().state_dict()
    for name, tensor in fast.model.module.state_dict().items():
        assert torch.allclose(tensor, slow.model.module.state_dict()[name], atol=1e-4), name
        assert name == "0.bias" or not torch.equal(tensor, start[name]), name  # a norm takes that bias away
    spoken = [line for line in said if line.startswith("  compile: ")]
    assert len(spoken) == len(PHASES)
    assert all("less than it costs" in line for line in spoken)


def test_a_model_that_does_not_compile_is_an_error_that_says_so(tune, monkeypatch):
    def broken(network):
        def call(*args, **kwargs):
            raise RuntimeError("no compiler")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(tf.UsageError, match=r"cannot be compiled.*no compiler"):
        tune(PHASES, model=network(), compile=True)
