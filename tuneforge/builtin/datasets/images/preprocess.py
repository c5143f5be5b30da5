"""Deterministic operations on images before they are stored, each named by a word.

Shapes: n images, c channels, h and w pixels; everything is uint8.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence

import attrs
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from tuneforge.plugin import INTERPOLATIONS, Check, Interpolation

_UNSIZED_OPS = ("grayscale", "invert", "crop-to-ink", "pad-to-square")
_SIZED_OPS = ("resize", "center-crop")
_MAX_CROPPED_SIZE = 16  # pixels a side
OPS_HELP = (
    "'grayscale', 'invert', 'crop-to-ink', 'pad-to-square', 'resize N', 'resize HxW', 'center-crop N' or "
    "'center-crop HxW'; 'nearest', 'bilinear' or 'bicubic' may follow a resize"
)
"""All operations, for messages."""


@attrs.frozen
class ImageOp:
    """An operation on images of equal size.

    Args:
        name: `grayscale`: one channel (ITU-R 601 luma); `invert`: 255 minus the pixel; `crop-to-ink`: images of more
            than 16 pixels a side become light ink on dark, cropped to the ink and padded to a square; `pad-to-square`:
            the shorter side is padded with the median of the border; `resize`: with antialiasing; `center-crop`:
            cropped, or padded with 0.
        interpolation: Of a `resize` by Pillow; None: bilinear, by torchvision.
        size: Empty, or one number (the shorter side of `resize`, both sides of `center-crop`), or height and width.
    """

    name: str
    size: tuple[int, ...] = ()
    interpolation: Interpolation | None = None

    @classmethod
    def parse(cls, text: str) -> ImageOp:
        """Return the operation of a text such as `"resize 32"` or `"center-crop 224x192"`.

        Raises:
            ValueError: The text is not an operation.
        """
        words = text.split()
        if len(words) == 1 and words[0] in _UNSIZED_OPS:
            return cls(words[0])
        interpolation: Interpolation | None = None
        if len(words) == 3 and words[0] == "resize" and words[2] in INTERPOLATIONS:
            interpolation = INTERPOLATIONS[INTERPOLATIONS.index(words.pop())]
        if len(words) == 2 and words[0] in _SIZED_OPS and re.fullmatch(r"[1-9]\d{0,4}(x[1-9]\d{0,4})?", words[1]):
            return cls(words[0], tuple(int(side) for side in words[1].split("x")), interpolation)
        raise ValueError(text)

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Return height and width after the operation."""
        if self.name == "pad-to-square" or (self.name == "crop-to-ink" and max(height, width) > _MAX_CROPPED_SIZE):
            return (max(height, width),) * 2
        if not self.size:
            return height, width
        if len(self.size) == 1 and self.name == "resize":
            short = min(height, width)
            return self.size[0] * height // short, self.size[0] * width // short
        return self.size[0], self.size[-1]

    def __call__(self, images_nchw: Tensor) -> Tensor:
        """Apply the operation to images (n, c, h, w)."""
        if self.name == "grayscale":
            return F.rgb_to_grayscale(images_nchw) if images_nchw.shape[1] == 3 else images_nchw
        if self.name == "invert":
            return 255 - images_nchw
        if self.name == "pad-to-square":
            return _pad_to_square(images_nchw)
        if self.name == "crop-to-ink":
            return _crop_to_ink(images_nchw)
        out: Tensor
        if self.name == "center-crop":
            out = F.center_crop(images_nchw, [self.size[0], self.size[-1]])
        else:
            out = _resize(images_nchw, self.output_size(*images_nchw.shape[-2:]), self.interpolation)
        return out


@functools.lru_cache(maxsize=256)
def parse_ops(texts: tuple[str, ...]) -> tuple[ImageOp, ...]:
    """Return the operations of `texts`, in order.

    Raises:
        ValueError: A text is not an operation.
    """
    return tuple(ImageOp.parse(text) for text in texts)


def compute_output_size(ops: Sequence[ImageOp]) -> tuple[int, int] | None:
    """Return height and width after `ops` if they are the same for every image, else None."""
    probes = {_size_after(ops, 997, 997), _size_after(ops, 499, 997), _size_after(ops, 997, 499)}
    fixed = any(op.size for op in ops)
    return probes.pop() if fixed and len(probes) == 1 else None


def count_max_pixels(ops: Sequence[ImageOp], height: int, width: int) -> int:
    """Return the largest number of pixels before and after each operation, to check it before any is applied."""
    pixels = height * width
    for op in ops:
        height, width = op.output_size(height, width)
        pixels = max(pixels, height * width)
    return pixels


def choose_jpeg_scale(ops: Sequence[ImageOp], height: int, width: int, *, margin: int) -> int:
    """Return the factor 1, 2, 4 or 8 by which an image may be reduced when it is decoded.

    Args:
        ops: Operations on the image; only a resize that no operation on single pixels precedes allows a reduction.
        height: Height of the image in the file, before its EXIF orientation is applied.
        width: Width in the file.
        margin: Minimum ratio of each reduced side to the output of the resize; 0 for no reduction.
    """
    places = [place for place, op in enumerate(ops) if op.name in ("resize", "center-crop", "crop-to-ink")]
    if not margin or not places or ops[places[0]].name != "resize":
        return 1
    before, resize = ops[: places[0]], ops[places[0]]
    for scale in (8, 4, 2):
        low, high = sorted((-(-height // scale), -(-width // scale)))
        sides = [_size_after(before, *shape) for shape in ((low, high), (high, low))]
        if all(
            had >= margin * made for shape in sides for had, made in zip(shape, resize.output_size(*shape), strict=True)
        ):
            return scale
    return 1


def _size_after(ops: Sequence[ImageOp], height: int, width: int) -> tuple[int, int]:
    for op in ops:
        height, width = op.output_size(height, width)
    return height, width


def _resize(images_nchw: Tensor, size: tuple[int, int], interpolation: Interpolation | None) -> Tensor:
    """Resize with antialiasing.

    torchvision is two to six times as fast as Pillow, but differs by up to 3 levels from it, and the transforms of
    pretrained weights use Pillow.
    """
    out: Tensor
    if interpolation is None:
        out = F.resize(images_nchw, list(size), antialias=True)
        return out
    height, width = size
    method = Image.Resampling[interpolation.upper()]
    resized = [
        [np.array(Image.fromarray(channel.numpy()).resize((width, height), method)) for channel in image.unbind(0)]
        for image in images_nchw.unbind(0)
    ]
    return torch.from_numpy(np.array(resized, dtype=np.uint8).reshape(*images_nchw.shape[:2], height, width))


def _pad_to_square(images_nchw: Tensor) -> Tensor:
    count, channels, height, width = images_nchw.shape
    if height == width:
        return images_nchw
    edges = (images_nchw[..., 0, :], images_nchw[..., -1, :], images_nchw[..., 0], images_nchw[..., -1])
    border_nc11 = torch.cat(edges, dim=-1).median(dim=-1).values[..., None, None]
    side = max(height, width)
    out = border_nc11.expand(count, channels, side, side).clone()
    top, left = (side - height) // 2, (side - width) // 2
    out[..., top : top + height, left : left + width] = images_nchw
    return out


def _crop_to_ink(images_nchw: Tensor) -> Tensor:
    """Crop a character on paper or on a screen to its ink, as is usual for character recognition.

    Dark ink on a light background is inverted, by the median of the border. Ink is what exceeds the background
    by more than a quarter of the maximum. Images of at most 16 pixels a side count as cropped already.
    """
    if max(images_nchw.shape[-2:]) <= _MAX_CROPPED_SIZE:
        return images_nchw
    return torch.cat([_crop_character(image[None]) for image in images_nchw])


def _crop_character(image_1chw: Tensor) -> Tensor:
    if _background_level(image_1chw) > 127:
        image_1chw = 255 - image_1chw
    above = image_1chw.float().amax(dim=(0, 1)) - float(_background_level(image_1chw))
    inked = above > above.max() / 4
    if above.max() <= 0:
        return _pad_to_square(image_1chw)
    rows, columns = inked.any(1).nonzero().flatten(), inked.any(0).nonzero().flatten()
    cut = image_1chw[..., int(rows[0]) : int(rows[-1]) + 1, int(columns[0]) : int(columns[-1]) + 1]
    height, width = cut.shape[-2:]
    side = max(height, width)
    out = cut.new_full((*cut.shape[:2], side, side), int(_background_level(image_1chw)))
    top, left = (side - height) // 2, (side - width) // 2
    out[..., top : top + height, left : left + width] = cut
    return out


def _background_level(image_1chw: Tensor) -> Tensor:
    """Return the median of the border."""
    edges = (image_1chw[..., 0, :], image_1chw[..., -1, :], image_1chw[..., 0], image_1chw[..., -1])
    return torch.cat([edge.flatten() for edge in edges]).median()


def _are_valid_ops(texts: Sequence[str]) -> bool:
    try:
        parse_ops(tuple(texts))
    except ValueError:
        return False
    return True


OPS_CHECK = Check(f"a list of {OPS_HELP}", _are_valid_ops, {"items": {"type": "string"}})
"""Check for an option that holds operations."""
