"""How pretrained weights expect their images."""

from __future__ import annotations

from typing import Literal, get_args

import attrs

Interpolation = Literal["nearest", "bilinear", "bicubic"]
INTERPOLATIONS: tuple[Interpolation, ...] = get_args(Interpolation)


@attrs.frozen
class ImagePreprocessing:
    """The evaluation transform of pretrained weights; the hook `model_inputs` returns it.

    Sources of images follow it where the user gives no value.

    Args:
        name: Of the weights, for messages.
        size: Height and width of the model's input, in pixels.
        resize: Size before the center crop, in pixels: of the shorter side, or height and width.
        interpolation: Of the resize, which is antialiased.
        mean: Mean for normalization, per channel, on the scale 0 to 1.
        std: Standard deviation for normalization, per channel, on the scale 0 to 1.
        fit: How an image becomes square: `crop` keeps its aspect ratio, `stretch` does not, and `pad` keeps it and
            fills the rest.
    """

    name: str
    size: tuple[int, int]
    resize: int
    interpolation: Interpolation
    mean: tuple[float, ...]
    std: tuple[float, ...]
    fit: Literal["crop", "pad", "stretch"] = "crop"

    def resize_for(self, size: int) -> int:
        """Return the shorter side before the crop for another input size, at the same ratio.

        Args:
            size: Height and width of the model's input, in pixels.
        """
        return self.resize if (size, size) == self.size else round(size * self.resize / min(self.size))
