"""`digit-cnn`: the network of the issue, with its weights or from the seed."""

from __future__ import annotations

import string
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from tuneforge import DataError, LayerGroup, PluginError, UnsafeFileError, UsageError
from tuneforge.builtin.datasets.demo.digits import Glyphs
from tuneforge.builtin.models.digit_cnn import LABELS, PRETRAINED_WEIGHTS, DigitCNN, DigitNet
from tuneforge.exporting import save_tensors


def run_of(labels: tuple[str, ...] = ("a", "b", "c"), *, seed: int = 0, restoring: bool = False, side: int = 32) -> Any:
    return SimpleNamespace(
        config=SimpleNamespace(seed=seed),
        data_seed=seed,
        data=SimpleNamespace(targets=SimpleNamespace(num_outputs=len(labels), labels=labels)),
        example=torch.zeros(2, 3, side, side),
        restoring=restoring,
    )


def weights_file(path: Path, num_outputs: int = 62, **metadata: Any) -> tuple[Path, dict[str, torch.Tensor]]:
    state = {name: tensor.half() for name, tensor in DigitNet(num_outputs).state_dict().items()}
    save_tensors(state, path, metadata=metadata)
    return path, state


def test_the_network_is_five_convolutions_with_relu_and_pooling_and_a_linear_head() -> None:
    net = DigitNet(11)
    convs = [module for module in net.modules() if isinstance(module, nn.Conv2d)]
    assert [(conv.in_channels, conv.out_channels) for conv in convs] == [
        (3, 32), (32, 64), (64, 128), (128, 256), (256, 512),
    ]  # fmt: skip
    assert all((conv.kernel_size, conv.padding) == ((3, 3), (1, 1)) for conv in convs)
    images = torch.rand(2, 3, 32, 32)
    features = images
    for conv in convs:
        features = nn.MaxPool2d(2)(nn.ReLU()(conv(features)))
    assert features.shape == (2, 512, 1, 1)
    assert torch.equal(net(images), net.head(features.flatten(1)))


def test_logits_may_be_negative() -> None:
    assert (DigitNet(62)(torch.rand(4, 3, 32, 32)) < 0).any()


def test_from_scratch_it_has_the_datas_classes_and_a_group_a_layer() -> None:
    model = DigitCNN(pretrained=False).model_adapt(run_of(), None)
    names = ["conv1", "conv2", "conv3", "conv4", "conv5", "head"]
    assert list(model.groups) == [LayerGroup(name, (name,)) for name in names]
    assert (model.head, model.labels, model.pretrained_labels) == ("head", ("a", "b", "c"), ())
    assert isinstance(model.head_module(), nn.Linear)
    assert model.head_module().weight.shape == (3, 512)


def test_from_scratch_the_weights_follow_from_the_seed_alone() -> None:
    def weights(seed: int) -> torch.Tensor:
        return nn.utils.parameters_to_vector(
            DigitCNN(pretrained=False).model_adapt(run_of(seed=seed), None).module.parameters()
        )

    torch.manual_seed(5)
    first = weights(1)
    after = torch.rand(1)
    assert torch.equal(weights(1), first)
    assert not torch.equal(weights(2), first)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(1), after)


def test_weights_are_loaded_with_the_labels_they_know(tmp_path: Path) -> None:
    path, state = weights_file(tmp_path / "w.safetensors")
    model = DigitCNN(weights=path).model_adapt(run_of(), None)
    assert (
        model.labels
        == model.pretrained_labels
        == LABELS
        == tuple(string.digits + string.ascii_uppercase + string.ascii_lowercase)
    )
    for name, parameter in model.parameters().items():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, state[name].float())


def test_labels_of_the_file_beat_the_built_in_ones(tmp_path: Path) -> None:
    path, _ = weights_file(tmp_path / "w.safetensors", 2, labels=["x", "y"])
    assert DigitCNN(weights=path).model_adapt(run_of(), None).labels == ("x", "y")
    path, _ = weights_file(tmp_path / "v.safetensors", 2)
    assert DigitCNN(weights=path).model_adapt(run_of(), None).labels == ()


def test_restoring_builds_the_shape_without_any_file(tmp_path: Path) -> None:
    model = DigitCNN(weights=tmp_path / "gone.safetensors").model_adapt(run_of(restoring=True), None)
    assert model.labels == ("a", "b", "c")
    assert model.parameters()["head.weight"].shape == (3, 512)


def test_weights_of_another_network_are_refused_by_name(tmp_path: Path) -> None:
    path, state = weights_file(tmp_path / "w.safetensors")
    save_tensors(
        {name: tensor for name, tensor in state.items() if name != "conv3.bias"} | {"odd": state["head.bias"]}, path
    )
    with pytest.raises(UsageError, match=r"conv3\.bias, odd"):
        DigitCNN(weights=path).model_adapt(run_of(), None)
    save_tensors({**state, "conv1.weight": torch.zeros(32, 1, 3, 3)}, path)
    with pytest.raises(UsageError, match=r"does not hold the weights of digit-cnn: conv1\.weight"):
        DigitCNN(weights=path).model_adapt(run_of(), None)


def test_a_pickle_is_never_opened(tmp_path: Path) -> None:
    (tmp_path / "w.pt").write_bytes(b"\x80\x04N.")
    with pytest.raises(UnsafeFileError):
        DigitCNN(weights=tmp_path / "w.pt").model_adapt(run_of(), None)


def test_it_builds_and_adapts_nothing() -> None:
    model = DigitCNN(pretrained=False).model_adapt(run_of(), None)
    with pytest.raises(PluginError, match="digit-cnn builds a model; it cannot adapt one"):
        DigitCNN().model_adapt(run_of(), model)


@pytest.mark.parametrize("example", [torch.zeros(2, 3, 28, 28), torch.zeros(2, 7), {"ids": torch.zeros(2, 7)}])
def test_images_of_another_size_are_refused_with_the_option_to_change(example: Any) -> None:
    run = run_of()
    run.example = example
    with pytest.raises(DataError, match=r"takes images of 32x32 pixels.*--data\.size 32"):
        DigitCNN(pretrained=False).model_adapt(run, None)


def test_the_shipped_weights_are_small_and_load() -> None:
    assert PRETRAINED_WEIGHTS.stat().st_size < 4 * 2**20
    model = DigitCNN().model_adapt(run_of(), None)
    assert model.labels == LABELS


def test_the_shipped_weights_are_what_their_recipe_gives() -> None:
    """`examples/pretrain_digit_cnn.py` printed 0.8935 on fresh glyphs; these are fresher still, by another seed."""
    run = run_of(LABELS, seed=1234)
    data = Glyphs(count=10_000).data_prepare(run)
    module = DigitCNN().model_adapt(run, None).module.eval()
    split = data.train.subset(torch.arange(3_000))
    with torch.inference_mode():
        answers = module(data.inputs.preprocess(split.fetch(torch.arange(3_000)))).argmax(1)
    assert (answers == split.targets).float().mean().item() == pytest.approx(0.8935, abs=0.015)
