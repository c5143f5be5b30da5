"""Layer groups are those of timm's own layer-wise learning rate decay."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay
from tuneforge_timm.merged_head import MergedHead
from tuneforge_timm.networks import build_network, find_pretrained_config

import tuneforge as tf

FAMILIES = (
    "beit_base_patch16_224", "cait_xxs24_224", "coat_lite_tiny", "coatnet_nano_rw_224", "convit_tiny", "convnext_atto",
    "crossvit_tiny_240", "cspresnet50", "davit_tiny", "deit3_small_patch16_224", "deit_tiny_distilled_patch16_224",
    "densenet121", "dla34", "dpn68", "edgenext_xx_small", "efficientformer_l1", "efficientnet_b0", "efficientvit_b0",
    "eva02_tiny_patch14_224", "fastvit_t8", "focalnet_tiny_srf", "gcvit_xxtiny", "ghostnet_050", "hiera_tiny_224",
    "hrnet_w18_small", "inception_next_atto", "inception_v3", "legacy_seresnet18", "levit_128s", "mambaout_femto",
    "maxvit_tiny_tf_224", "mixer_s32_224", "mobilenetv3_small_050", "mobilevit_xxs", "mobilevitv2_050", "mvitv2_tiny",
    "nfnet_f0", "pvt_v2_b0", "regnetx_002", "repvit_m0_9", "resnet18", "resnetv2_50", "rexnet_100", "sequencer2d_s",
    "starnet_s1", "swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256", "tf_efficientnet_lite0", "vgg11",
    "vit_tiny_patch16_224", "volo_d1_224", "xception41", "xcit_nano_12_p16_224",
)  # fmt: skip
WITHOUT_MATCHER = ("caformer_s18", "pit_ti_224", "poolformer_s12")
ENCODERS = {
    "deepseek_vit_412m_enc", "gemma4_vit_167m_enc", "gemma4_vit_570m_enc", "mobilenetv5_300m_enc", "qwen3_vit_306m_enc",
    "qwen3_vit_416m_enc", "qwen3_vit_88m_enc",
}  # fmt: skip
NUM_CHUNKS = 16


def build_on_meta(arch: str) -> tf.Model:
    config = find_pretrained_config(arch)
    with torch.device("meta"):
        network = build_network(config, num_outputs=7, image_size=tuple(config.input_size[1:]), seed=0)
    assert all(parameter.is_meta for parameter in network.module.parameters())
    return tf.Model(network.module, groups=network.groups, head=network.head)


def timm_scales(arch: str) -> dict[str, float]:
    """Return timm's factor on the learning rate of each parameter."""
    with torch.device("meta"):
        module = timm.create_model(arch, num_classes=7)
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    groups = param_groups_layer_decay(module, layer_decay=0.75)
    return {names[id(parameter)]: group["lr_scale"] for group in groups for parameter in group["params"]}


@pytest.mark.parametrize("arch", FAMILIES)
def test_learning_rates_of_layer_decay_equal_those_of_timm(arch):
    model, theirs = build_on_meta(arch), timm_scales(arch)
    several_heads = isinstance(model.module, MergedHead)
    prefix = "network." if several_heads else ""
    ours = {name.removeprefix(prefix): 0.75 ** model.depth_of(name) for name in model.parameters()}
    assert several_heads or ours.keys() | {"aux_head.weight", "aux_head.bias"} >= theirs.keys()
    for name, scale in ours.items():
        new = several_heads and name in ("head.weight", "head.bias")
        assert scale == pytest.approx(1.0 if new else theirs[name], rel=1e-12), name
    assert model.groups[-1].name == "head"
    assert all(model.depth_of(f"{model.head}.{name}") == 0 for name, _ in model.head_module().named_parameters())


@pytest.mark.parametrize("arch", WITHOUT_MATCHER)
def test_a_network_without_matcher_gets_groups_from_its_structure(arch):
    model = build_on_meta(arch)
    assert not hasattr(model.module, "group_matcher")
    assert [group.name for group in model.groups][-1] == "head"
    assert len(model.groups) >= 5


def test_groups_are_named_by_their_modules():
    names = [group.name for group in build_on_meta("resnet18").groups]
    assert names == ["stem", *(f"layer{stage}.{block}" for stage in (1, 2, 3, 4) for block in (0, 1)), "head"]
    vit = build_on_meta("vit_tiny_patch16_224")
    assert [group.name for group in vit.groups] == ["stem", *(f"blocks.{index}" for index in range(12)), "head"]
    assert vit.groups[0].prefixes == ("cls_token", "pos_embed", "patch_embed")


@pytest.mark.slow
@pytest.mark.parametrize("chunk", range(NUM_CHUNKS))
def test_every_classification_network_gets_groups(chunk):
    names = timm.list_models()[chunk::NUM_CHUNKS]
    grouped = 0
    for name in names:
        if name in ENCODERS:
            with pytest.raises(tf.UsageError, match=f"{name} has no classifier"):
                build_on_meta(name)
            continue
        model = build_on_meta(name)
        assert sum(info.num_parameters for info in model.group_infos()) == sum(
            parameter.numel() for parameter in model.parameters().values()
        ), name
        grouped += 1
    print(f"chunk {chunk}: {grouped} of {len(names)} names of timm {timm.__version__} have layer groups")
    assert grouped == len(names) - len(ENCODERS & set(names))
