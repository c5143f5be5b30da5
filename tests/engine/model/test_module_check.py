import copy

import pytest
import torch
from torch import nn

import tuneforge as tf


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 3))


def with_parameter(tensor: torch.Tensor) -> nn.Module:
    module = net()
    module[0].extra = nn.Parameter(tensor, requires_grad=False)
    return module


def with_buffer(tensor: torch.Tensor) -> nn.Module:
    module = net()
    module[0].register_buffer("extra", tensor, persistent=False)
    return module


def with_compiled_body() -> nn.Module:
    module = net()
    module[0] = torch.compile(module[0], backend="eager")
    return module


def made_in_inference_mode() -> nn.Module:
    with torch.inference_mode():
        return net()


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("head", [None, "2"])
@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: torch.compile(net(), backend="eager"), ("OptimizedModule", "torch.compile", "--compile")),
        (with_compiled_body, ("torch.compile", "module '0'")),
        (lambda: nn.DataParallel(net()), ("DataParallel", ".module")),
        (lambda: torch.optim.swa_utils.AveragedModel(net()), ("AveragedModel",)),
        (lambda: torch.jit.script(net()), ("TorchScript", "Python module")),
        (lambda: torch.jit.trace(net(), torch.ones(2, 8)), ("TorchScript",)),
        (lambda: torch.export.export(net(), (torch.ones(2, 8),)).module(), ("torch.export",)),
        (lambda: nn.Sequential(nn.LazyLinear(4), nn.ReLU(), nn.LazyLinear(3)), ("lazy layer LazyLinear", "0.weight")),
        (lambda: nn.Sequential(nn.LazyBatchNorm1d(), nn.ReLU(), nn.Linear(8, 3)), ("LazyBatchNorm1d",)),
        (lambda: with_parameter(torch.eye(3).to_sparse()), ("sparse", "'0.extra' of Linear", ".to_dense()")),
        (lambda: with_buffer(torch.eye(3).to_sparse()), ("sparse", "'0.extra'")),
        (lambda: with_parameter(torch.ones(2, dtype=torch.complex128)), ("complex128", "'0.extra'")),
    ],
    ids=["compiled", "compiled-body", "data-parallel", "averaged", "scripted", "traced", "exported", "lazy",
         "lazy-norm", "sparse", "sparse-buffer", "complex128"],
)  # fmt: skip
def test_modules_that_cannot_be_trained_are_refused_when_they_are_given(build, words, head):
    with pytest.raises(tf.PluginError) as caught:
        tf.Model.from_module(build(), head=head)
    assert all(word in str(caught.value) for word in words)


def test_module_made_in_inference_mode_is_refused_for_training_only(tune):
    with pytest.raises(tf.PluginError, match=r"inference_mode.*copy\.deepcopy"):
        tune([tf.Phase("all", epochs=1)], model=made_in_inference_mode())
    run_dir = tune([tf.Phase("all", epochs=1)], model=copy.deepcopy(made_in_inference_mode())).run_dir
    with torch.inference_mode():
        assert len(list(tf.load(run_dir, model=net()).predict_outputs(torch.ones(2, 8).tolist()))) == 2


def test_module_on_the_meta_device_is_described_and_refused_for_training(tune):
    assert tf.Model.from_module(net().to("meta")).head == "2"
    with pytest.raises(tf.PluginError, match=r"meta device.*load the weights"):
        tune([tf.Phase("all", epochs=1)], model=net().to("meta"))


def test_what_the_errors_advise_works():
    lazy = nn.Sequential(nn.LazyLinear(4), nn.ReLU(), nn.LazyLinear(3))
    lazy(torch.ones(2, 8))
    assert tf.Model.from_module(lazy).head == "2"
    assert tf.Model.from_module(nn.DataParallel(net()).module).head == "2"


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_scripted_layer_below_the_head_is_trained(tune):
    module = nn.Sequential(torch.jit.script(nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5))), nn.Linear(8, 3))
    before = module[0][0].weight.detach().clone()
    tune([tf.Phase("head", train="head", epochs=1), tf.Phase("all", epochs=1)], model=module)
    assert not torch.equal(module[0][0].weight, before)
