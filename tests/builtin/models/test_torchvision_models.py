"""torchvision's models: groups and head of every one, weights that fit or are refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torchvision import models

from tuneforge import Model, PluginError, UnknownNameError, UnsafeFileError, UsageError
from tuneforge.builtin.models import torchvision_models
from tuneforge.builtin.models.adapters import Head, InputChannels
from tuneforge.builtin.models.torchvision_models import (
    LAYER_GROUPS_BY_CLASS,
    TorchvisionModel,
    find_head_path,
    find_layer_groups,
)
from tuneforge.exporting import save_tensors

ARCHS = models.list_models(module=models)

SMALL = {
    "alexnet": 64, "convnext_tiny": 32, "densenet121": 32, "efficientnet_b0": 32, "googlenet": 32, "inception_v3": 75,
    "maxvit_t": 224, "mnasnet0_5": 32, "mobilenet_v2": 32, "mobilenet_v3_small": 32, "regnet_y_400mf": 32,
    "resnet18": 32, "shufflenet_v2_x0_5": 32, "squeezenet1_1": 32, "swin_t": 32, "vgg11": 32, "vit_b_32": 32,
}  # fmt: skip
"""One architecture a family, and a size it can take."""


class ParametersOnMeta(TorchFunctionMode):
    """Parameters take no memory and no time; everything else is real (RegNet computes with tensors as it is built)."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **{**(kwargs or {}), **({"device": "meta"} if func is torch.empty else {})})


def run_of(*labels: str, side: int = 32, seed: int = 0, restoring: bool = False) -> Any:
    return SimpleNamespace(
        config=SimpleNamespace(seed=seed),
        data=SimpleNamespace(targets=SimpleNamespace(num_outputs=len(labels), labels=labels)),
        example=torch.zeros(2, 3, side, side),
        restoring=restoring,
        log=lambda text: None,
    )


def build(arch: str, *labels: str, **options: Any) -> Model:
    side = options.pop("side", SMALL.get(arch, 224))
    run = run_of(
        *(labels or ("a", "b", "c")), side=side, **{k: options.pop(k) for k in ("seed", "restoring") if k in options}
    )
    return TorchvisionModel(**{"weights": "none", "arch": arch, **options}).model_adapt(run, None)


@pytest.mark.parametrize("arch", ARCHS)
def test_groups_have_every_parameter_once_and_the_head_is_the_output_layer(arch: str) -> None:
    with ParametersOnMeta():
        module = torchvision_models._build_network(arch, 7, (224, 224), pretrained=False)
    head = find_head_path(module)
    model = Model(module, groups=find_layer_groups(module, head), head=head)
    infos = model.group_infos()
    assert type(module).__name__ in LAYER_GROUPS_BY_CLASS
    assert len(infos) >= 5
    assert infos[-1].name == "head"
    assert all(info.num_parameters > 0 for info in infos)
    assert sum(len(info.parameter_names) for info in infos) == len(list(module.parameters()))
    assert f"{head}.weight" in infos[-1].parameter_names
    answering = model.head_module()
    assert getattr(answering, "out_features", None) == 7 or getattr(answering, "out_channels", None) == 7


def test_every_family_of_torchvision_is_tried() -> None:
    with ParametersOnMeta():
        kinds = {
            type(torchvision_models._build_network(arch, 2, (224, 224), pretrained=False)).__name__ for arch in SMALL
        }
    assert kinds == set(LAYER_GROUPS_BY_CLASS)


@pytest.mark.parametrize("arch", [arch for arch in SMALL if arch not in ("maxvit_t", "vgg11", "alexnet")])
def test_forward_runs_and_groups_are_in_the_order_of_the_data_flow(arch: str) -> None:
    model = build(arch)
    ran: list[int] = []
    for name, module in model.module.named_modules():
        for place, group in enumerate(model.groups):
            if group.contains(f"{name}.weight") and next(module.parameters(recurse=False), None) is not None:
                module.register_forward_hook(lambda _module, _args, _out, place=place: ran.append(place))
    with torch.no_grad():
        out = model.module.eval()(torch.rand(2, 3, SMALL[arch], SMALL[arch]))
    assert out.shape == (2, 3)
    assert list(dict.fromkeys(ran)) == list(range(len(model.groups)))


@pytest.mark.parametrize("arch", ["resnet18", "squeezenet1_1", "mobilenet_v3_small", "swin_t"])
def test_head_and_input_can_be_adapted(arch: str) -> None:
    model = InputChannels(channels=1).model_adapt(run_of("a", "x"), Head().model_adapt(run_of("a", "x"), build(arch)))
    out = model.module.eval()(torch.rand(2, 1, 32, 32))
    assert out.shape == (2, 2)
    assert len(model.changes) == 2


def test_from_scratch_the_weights_follow_from_the_seed_alone() -> None:
    def weights(seed: int) -> torch.Tensor:
        return nn.utils.parameters_to_vector(build("squeezenet1_1", seed=seed).module.parameters())

    torch.manual_seed(0)
    first = weights(1)
    assert torch.equal(weights(1), first)
    assert not torch.equal(weights(2), first)


def test_from_scratch_it_has_the_datas_classes_and_nothing_kept() -> None:
    model = build("resnet18", "x", "y")
    assert (model.head, model.labels, model.pretrained_labels) == ("fc", ("x", "y"), ())
    assert [group.name for group in model.groups] == ["stem", "layer1", "layer2", "layer3", "layer4", "head"]


def saved(path: Path, module: nn.Module, **metadata: Any) -> str:
    save_tensors(module.state_dict(), path, metadata=metadata)
    return str(path)


def test_weights_from_a_file_keep_their_own_head_and_labels(tmp_path: Path) -> None:
    source = models.squeezenet1_1(num_classes=5)
    file = saved(tmp_path / "w.safetensors", source, labels=list("vwxyz"))
    model = build("squeezenet1_1", "y", "new", weights=file)
    assert model.labels == model.pretrained_labels == tuple("vwxyz")
    images = torch.rand(1, 3, 64, 64)
    assert torch.equal(model.module.eval()(images), source.eval()(images))
    adapted = Head().model_adapt(run_of("y", "new"), model)
    assert adapted.pretrained_labels == ("y",)


def test_weights_without_labels_or_without_head_are_taken_too(tmp_path: Path) -> None:
    source = models.resnet18(num_classes=5)
    model = build("resnet18", "a", "b", weights=saved(tmp_path / "w.safetensors", source))
    assert (model.labels, model.pretrained_labels) == ((), ())
    assert model.head_module().out_features == 5
    body = {name: tensor for name, tensor in source.state_dict().items() if not name.startswith("fc.")}
    save_tensors(body, tmp_path / "body.safetensors")
    model = build("resnet18", "a", "b", weights=str(tmp_path / "body.safetensors"))
    assert (model.labels, model.pretrained_labels) == (("a", "b"), ())
    assert torch.equal(model.parameters()["conv1.weight"], source.conv1.weight)


def test_weights_with_auxiliary_heads_or_old_names_are_taken(tmp_path: Path) -> None:
    source = models.googlenet(num_classes=5, aux_logits=True, init_weights=False)
    model = build("googlenet", weights=saved(tmp_path / "g.safetensors", source))
    assert model.module.transform_input
    assert torch.equal(model.parameters()["fc.weight"], source.fc.weight)
    dense = models.densenet121(num_classes=5)
    old = {
        name.replace(".norm1.", ".norm.1.").replace(".conv2.", ".conv.2."): tensor
        for name, tensor in dense.state_dict().items()
    }
    save_tensors(old, tmp_path / "d.safetensors")
    model = build("densenet121", weights=str(tmp_path / "d.safetensors"))
    name = "features.denseblock1.denselayer1.norm1.weight"
    assert torch.equal(model.parameters()[name], dense.state_dict()[name])


def test_a_transformer_takes_the_size_of_the_data(tmp_path: Path) -> None:
    module = models.VisionTransformer(
        image_size=64, patch_size=32, num_layers=1, num_heads=1, hidden_dim=8, mlp_dim=8, num_classes=3
    )
    run = run_of("a", "b", "c")
    target = models.VisionTransformer(
        image_size=96, patch_size=32, num_layers=1, num_heads=1, hidden_dim=8, mlp_dim=8, num_classes=3
    )
    model = torchvision_models._load_weights(target, "heads.head", module.state_dict(), ("a", "b", "c"), run)
    assert model.parameters()["encoder.pos_embedding"].shape == (1, 10, 8)
    assert model.module.eval()(torch.rand(1, 3, 96, 96)).shape == (1, 3)


def test_weights_of_another_network_are_refused_by_name(tmp_path: Path) -> None:
    file = saved(tmp_path / "w.safetensors", models.resnet18(num_classes=3))
    with pytest.raises(
        UsageError, match=r"not those of this ResNet.*with another shape: fc\.weight, layer1\.0\.conv1\.weight"
    ) as caught:
        build("resnet50", weights=file)
    assert "missing: layer1.0.bn3.bias" in caught.value.why


@pytest.mark.parametrize("suffix", [".pth", ".PT", ".bin", ".pth.tar"])
def test_pickled_weights_are_never_opened(tmp_path: Path, suffix: str) -> None:
    with pytest.raises(UnsafeFileError, match="convert it once: tuneforge import"):
        build("resnet18", weights=str(tmp_path / f"resnet18{suffix}"))


def test_a_pickle_by_another_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "w.safetensors").write_bytes(b"\x80\x04N.")
    with pytest.raises(UnsafeFileError, match="not a valid safetensors file"):
        build("resnet18", weights=str(tmp_path / "w.safetensors"))


def test_restoring_builds_the_shape_without_any_file() -> None:
    model = build("resnet18", "x", "y", weights="gone.safetensors", restoring=True)
    assert model.head_module().out_features == 2
    assert build("googlenet", weights="gone.safetensors", restoring=True).module.transform_input


@pytest.mark.parametrize(
    ("arch", "size"), [("alexnet", 224), ("inception_v3", 299), ("vit_b_16", 224), ("maxvit_t", 224)]
)
def test_too_small_images_are_refused_with_the_size_to_use(arch: str, size: int) -> None:
    with pytest.raises(UsageError, match=rf"{arch} cannot take images of 20x20 pixels.*use --data\.size {size}"):
        build(arch, side=20)


def test_an_unknown_architecture_offers_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'resnet18'"):
        build("resnet-18")


def test_it_builds_and_adapts_nothing() -> None:
    with pytest.raises(PluginError, match="it cannot adapt one"):
        TorchvisionModel().model_adapt(run_of("a", "b"), build("resnet18"))


def test_inputs_that_are_no_images_are_refused() -> None:
    run = run_of("a", "b")
    run.example = torch.zeros(2, 7)
    with pytest.raises(UsageError, match="take images, and the inputs are not images"):
        TorchvisionModel(weights="none").model_adapt(run, None)
