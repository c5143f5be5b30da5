"""Runs of whole networks, from building to loading the result."""

from __future__ import annotations

import pytest
import timm
import torch
from small_images import make_data
from tuneforge_timm.networks import build_network, find_pretrained_config

import tuneforge as tf

FAMILIES = (
    ("resnet10t", 32), ("convnext_atto", 32), ("mobilenetv3_small_050", 32), ("vit_tiny_patch16_224", 32),
    ("deit_tiny_distilled_patch16_224", 32), ("ghostnet_050", 32), ("regnetx_002", 32), ("mixer_s32_224", 32),
    ("tf_efficientnet_lite0", 32), ("mobilevitv2_050", 64), ("levit_128s", 64), ("efficientvim_m1", 64),
)  # fmt: skip


@pytest.mark.parametrize(("arch", "side"), FAMILIES, ids=[arch for arch, _ in FAMILIES])
def test_the_default_strategy_runs_and_the_result_is_loaded(tune, arch, side):
    result = tune(arch, side)
    images = torch.randn(2, 3, side, side)
    loaded = tf.load(result.run_dir).model.module.eval()
    with torch.no_grad():
        assert torch.equal(loaded(images), result.model.module.eval()(images))
    assert result.model.labels == ("0", "1", "2")


def test_random_weights_are_said_and_depend_on_the_seed_only(tune):
    lines: list[str] = []
    one = tune("resnet10t", 32, lines=lines, strategy=[])
    torch.randn(3)
    again, other = tune("resnet10t", 32, strategy=[]), tune("resnet10t", 32, strategy=[], seed=1)
    assert "note: resnet10t is randomly initialized, because weights are 'none'" in lines
    assert not one.model.pretrained
    name = "layer4.0.conv1.weight"
    weights = [each.model.parameters()[name] for each in (one, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_an_image_size_that_does_not_fit_is_refused_before_training(tune):
    with pytest.raises(tf.UsageError, match=r"crossvit_tiny_240 cannot take images of 48x48 pixels.*--data.size 240"):
        tune("crossvit_tiny_240", 48)


def test_an_encoder_is_refused_and_the_classifier_is_named(tune):
    with pytest.raises(tf.UsageError, match=r"qwen3_vit_88m_enc has no classifier.*qwen3_vit_88m"):
        tune("qwen3_vit_88m_enc", 32)


def test_an_unknown_architecture_is_refused_with_the_nearest_name(tune):
    with pytest.raises(tf.UnknownNameError, match=r"has no model 'resnet10_t'.*resnet10t"):
        tune("resnet10_t", 32)


@pytest.mark.parametrize("arch", ["tf_efficientnet_lite0", "tf_efficientnetv2_b0", "tf_mobilenetv3_small_075"])
@pytest.mark.parametrize("size", [(64, 64), (33, 48)])
@torch.no_grad()
def test_same_padding_is_traced_and_equals_that_of_timm(arch, size):
    ours = build_network(find_pretrained_config(arch), num_outputs=3, image_size=size, seed=0).module.eval()
    theirs = timm.create_model(arch, num_classes=3).eval()
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(2, 3, *size)
    assert torch.equal(ours(images), theirs(images))
    assert torch.equal(torch.fx.symbolic_trace(ours)(images), theirs(images))


def test_an_adapted_first_convolution_keeps_its_same_padding(tune):
    data = make_data(32, channels=1)
    model = tune("tf_efficientnet_lite0", 32, data=data, adapt=["input-channels"], strategy=[]).model
    assert model.module.conv_stem.in_channels == 1
    with torch.no_grad():
        assert model.module.conv_stem(torch.zeros(1, 1, 33, 32)).shape == (1, 32, 17, 16)
