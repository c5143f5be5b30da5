"""Networks with several heads get one on the features of all of them."""

from __future__ import annotations

import pytest
import timm
import torch
from tuneforge_timm.merged_head import MergedHead
from tuneforge_timm.networks import build_network, find_pretrained_config

CASES = (
    ("deit_tiny_distilled_patch16_224", ("head", "head_dist"), 32, {"img_size": 32}),
    ("levit_128s", ("head.linear", "head_dist.linear"), 224, {}),
    ("crossvit_9_240", ("head.0", "head.1"), 240, {}),
    ("repvit_m0_9", ("head.head.l", "head.head_dist.l"), 64, {}),
)


@pytest.mark.parametrize(("arch", "heads", "side", "arguments"), CASES, ids=[case[0] for case in CASES])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@torch.no_grad()
def test_output_equals_that_of_the_separate_heads(arch, heads, side, arguments, training):
    torch.manual_seed(0)
    network = timm.create_model(arch, num_classes=5, **arguments)
    images = torch.randn(2, 3, side, side)
    linear = [network.get_submodule(path) for path in heads]
    for layer in linear:
        layer.weight.normal_()
        layer.bias.normal_()
    network.train(training)
    torch.manual_seed(0)
    expected = network(images)
    merged = MergedHead(network, heads, 5).train(training)
    merged.head.weight.copy_(torch.cat([layer.weight for layer in linear], dim=1))
    merged.head.bias.copy_(sum(layer.bias for layer in linear) / len(linear))
    torch.manual_seed(0)
    torch.testing.assert_close(merged(images), expected, rtol=1e-4, atol=1e-4)


def test_what_was_changed_is_said():
    network = build_network(
        find_pretrained_config("deit_tiny_distilled_patch16_224"), num_outputs=3, image_size=(32, 32), seed=0
    )
    assert network.head == "head"
    assert network.note.startswith("the heads head, head_dist are replaced by one")
    assert network.module.head.weight.shape == (3, 2 * 192)


def test_a_head_that_is_not_part_of_a_sum_is_removed():
    network = build_network(find_pretrained_config("volo_d1_224"), num_outputs=3, image_size=(32, 32), seed=0)
    assert network.head == "head"
    assert "aux_head" in network.note
    assert not any(name.startswith("aux_head") for name, _ in network.module.named_parameters())
