import sys
import types

import pytest
import torch

import tuneforge as tf
from tuneforge.engine.model.device import resolve_device


def test_a_lazy_device_is_told_of_each_step(tune, monkeypatch):
    """The seam for torch-xla with a device made up for the test; nothing is claimed beyond it."""
    marked = []
    fake = types.SimpleNamespace(xla_device=lambda: torch.device("cpu"), mark_step=lambda: marked.append(1))
    for name in ("torch_xla", "torch_xla.core"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "torch_xla.core.xla_model", fake)
    report = tune([tf.Phase("a", epochs=2)], device="xla").strategy_steps[0][1]
    assert len(marked) == report.steps == 12


def test_auto_finds_a_device_that_works():
    device = resolve_device("auto")
    assert torch.zeros(2, device=device.torch).device == device.torch


@pytest.mark.parametrize("name", ["abacus", "xla", "cpu:x"])
def test_a_device_that_is_not_there_is_a_usage_error(name):
    with pytest.raises(tf.UsageError, match=f"'{name}' is not available"):
        resolve_device(name)
