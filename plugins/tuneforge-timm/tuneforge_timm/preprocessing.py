"""The evaluation transform of weights of timm."""

from __future__ import annotations

import math
from typing import Any, Literal

from timm.data import resolve_data_config
from timm.models import PretrainedCfg

from tuneforge.plugin import ImagePreprocessing
from tuneforge_timm.weight_files import name_of

_FITS: dict[str, Literal["crop", "pad", "stretch"]] = {"center": "crop", "squash": "stretch", "border": "pad"}


def describe_preprocessing(config: PretrainedCfg) -> ImagePreprocessing:
    """Return what `timm.data.create_transform` does for evaluation with the data config of these weights.

    Args:
        config: timm's configuration of the weights.
    """
    settings: dict[str, Any] = resolve_data_config(pretrained_cfg=config.to_dict())
    height, width = settings["input_size"][1:]
    return ImagePreprocessing(
        name=name_of(config),
        size=(height, width),
        resize=math.floor(min(height, width) / settings["crop_pct"]),
        interpolation=settings["interpolation"],
        mean=tuple(settings["mean"]),
        std=tuple(settings["std"]),
        fit=_FITS[settings["crop_mode"]],
    )
