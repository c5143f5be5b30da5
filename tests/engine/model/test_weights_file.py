import pytest
import torch
from torch import nn

import tuneforge as tf

PHASE = [tf.Phase("all", epochs=1)]


class WithState(nn.Linear):
    """A layer whose extra state is any value."""

    value = None

    def get_extra_state(self):
        return self.value

    def set_extra_state(self, state):
        self.value = state


def net(value=None, kind=WithState):
    module = nn.Sequential(nn.Sequential(kind(8, 8), nn.ReLU()), nn.Linear(8, 3))
    module[0][0].value = value
    return module


@pytest.mark.parametrize(
    "value",
    [{"calls": 3, 1: (0.1, [None, "text"])}, 7, {"scale": torch.tensor([1.5, 2.5])}, torch.tensor([1, 2])],
    ids=["plain", "number", "tensor in a mapping", "tensor"],
)
def test_extra_state_is_stored_with_the_weights(tune, value):
    result = tune(PHASE, model=net(value))
    module = net()
    tf.load(result.run_dir, model=module)
    loaded = module[0][0].value
    if isinstance(value, dict) and "scale" in value:
        loaded, value = loaded["scale"], value["scale"]
    assert torch.equal(loaded, value) if isinstance(value, torch.Tensor) else loaded == value


def test_weights_without_extra_state_hold_no_trace_of_it(tune):
    from tuneforge.engine.storage.safetensors_io import load_tensors

    assert list(load_tensors(tune(PHASE).run_dir / "model.safetensors")[1]) == ["labels"]


@pytest.mark.parametrize("value", [object(), b"bytes", {1, 2}, {"deep": [object()]}])
def test_extra_state_that_cannot_be_stored_is_refused_before_training(tune, value):
    module = net(value)
    before = module[1].weight.detach().clone()
    with pytest.raises(tf.PluginError, match="the extra state of module '0.0'"):
        tune(PHASE, model=module)
    assert torch.equal(module[1].weight, before)


def test_extra_state_that_cannot_be_loaded_is_refused_before_training(tune):
    class Half(nn.Linear):
        def get_extra_state(self):
            return 1

    with pytest.raises(tf.PluginError, match="'0.0' has get_extra_state and no set_extra_state"):
        tune(PHASE, model=net(kind=Half))
