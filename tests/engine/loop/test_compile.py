"""With `--compile` each phase trains the same parameters as without it."""

import shutil

import pytest
import torch
from torch import nn

import tuneforge as tf

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler"),
    pytest.mark.filterwarnings("ignore"),  # warnings of torch.compile
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


def test_layers_that_a_later_phase_unfreezes_train_when_compiled(tune):
    lines = []
    compiled = tune(PHASES, model=network(), optimizer="sgd", compile=True, log=lines.append)
    eager = tune(PHASES, model=network(), optimizer="sgd")
    initial = network().state_dict()
    for name, tensor in compiled.model.module.state_dict().items():
        assert torch.allclose(tensor, eager.model.module.state_dict()[name], atol=1e-4), name
        assert name == "0.bias" or not torch.equal(tensor, initial[name]), name  # BatchNorm cancels that bias
    compile_lines = [line for line in lines if line.startswith("  compile: ")]
    assert len(compile_lines) == len(PHASES)
    assert all("less than it costs" in line for line in compile_lines)


def test_model_that_cannot_be_compiled_is_an_error(tune, monkeypatch):
    def broken(network):
        def call(*args, **kwargs):
            raise RuntimeError("no compiler")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(tf.UsageError, match=r"cannot be compiled.*no compiler"):
        tune(PHASES, model=network(), compile=True)
