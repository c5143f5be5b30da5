import sys
import types

import pytest
import torch

import tuneforge as tf
from tuneforge.engine.model.device import resolve_device


def test_lazy_device_marks_each_step(tune, monkeypatch):
    """Only the interface for torch-xla is tested, with a made-up device."""
    marked = []
    fake = types.SimpleNamespace(xla_device=lambda: torch.device("cpu"), mark_step=lambda: marked.append(1))
    for name in ("torch_xla", "torch_xla.core"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "torch_xla.core.xla_model", fake)
    report = tune([tf.Phase("a", epochs=2)], device="xla").strategy_steps[0][1]
    assert len(marked) == report.steps == 12


def test_auto_chooses_a_working_device():
    device = resolve_device("auto")
    assert torch.zeros(2, device=device.torch).device == device.torch


@pytest.mark.parametrize("name", ["abacus", "xla", "cpu:x"])
def test_missing_device_is_a_usage_error(name):
    with pytest.raises(tf.UsageError, match=f"'{name}' is not available"):
        resolve_device(name)
