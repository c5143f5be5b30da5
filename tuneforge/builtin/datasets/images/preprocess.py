"""What may be done to a picture before it is stored: a few deterministic operations, each written as a word.

Shapes: n pictures, c channels, h and w pixels; everything is uint8.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence

import attrs
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from tuneforge.plugin import Check

_UNSIZED_OPS = ("grayscale", "invert", "ink", "square")
_SIZED_OPS = ("resize", "center-crop")
_MAX_CROPPED_SIZE = 16  # pixels a side
OPS_HELP = "'grayscale', 'invert', 'ink', 'square', 'resize N', 'resize HxW', 'center-crop N' or 'center-crop HxW'"
"""The vocabulary, as messages show it."""


@attrs.frozen
class ImageOp:
    """One operation on pictures of one size.

    Args:
        name: `grayscale`: one channel (ITU-R 601 luma); `invert`: 255 minus it; `ink`: of a picture of more than 16
            pixels a side, light ink on dark, cut to the ink and filled up to a square; `square`: the shorter side is
            filled up with the median of the border; `resize`: scaled with antialiasing; `center-crop`: cut or filled up
            with 0.
        size: Empty; or the shorter side of `resize` and both of `center-crop`; or height and width.
    """

    name: str
    size: tuple[int, ...] = ()

    @classmethod
    def parse(cls, text: str) -> ImageOp:
        """The operation that a text such as `"resize 32"` or `"center-crop 224x192"` names.

        Raises:
            ValueError: It names none.
        """
        words = text.split()
        if len(words) == 1 and words[0] in _UNSIZED_OPS:
            return cls(words[0])
        if len(words) == 2 and words[0] in _SIZED_OPS and re.fullmatch(r"[1-9]\d{0,4}(x[1-9]\d{0,4})?", words[1]):
            return cls(words[0], tuple(int(side) for side in words[1].split("x")))
        raise ValueError(text)

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width after the operation."""
        if self.name == "square" or (self.name == "ink" and max(height, width) > _MAX_CROPPED_SIZE):
            return (max(height, width),) * 2
        if not self.size:
            return height, width
        if len(self.size) == 1 and self.name == "resize":
            short = min(height, width)
            return self.size[0] * height // short, self.size[0] * width // short
        return self.size[0], self.size[-1]

    def __call__(self, pictures_nchw: Tensor) -> Tensor:
        """The pictures after the operation, (n, c or 1, *shape(h, w))."""
        if self.name == "grayscale":
            return F.rgb_to_grayscale(pictures_nchw) if pictures_nchw.shape[1] == 3 else pictures_nchw
        if self.name == "invert":
            return 255 - pictures_nchw
        if self.name == "square":
            return _pad_to_square(pictures_nchw)
        if self.name == "ink":
            return _crop_to_ink(pictures_nchw)
        out: Tensor
        if self.name == "center-crop":
            out = F.center_crop(pictures_nchw, [self.size[0], self.size[-1]])
        else:
            out = F.resize(pictures_nchw, list(self.output_size(*pictures_nchw.shape[-2:])), antialias=True)
        return out


@functools.lru_cache(maxsize=256)
def parse_ops(texts: tuple[str, ...]) -> tuple[ImageOp, ...]:
    """The operations that `texts` name, in order.

    Raises:
        ValueError: One of them names none.
    """
    return tuple(ImageOp.parse(text) for text in texts)


def compute_output_size(ops: Sequence[ImageOp]) -> tuple[int, int] | None:
    """Height and width after `ops` where they are the same for every picture, else None."""
    probes = {_size_after(ops, 997, 997), _size_after(ops, 499, 997), _size_after(ops, 997, 499)}
    fixed = any(op.size for op in ops)
    return probes.pop() if fixed and len(probes) == 1 else None


def count_max_pixels(ops: Sequence[ImageOp], height: int, width: int) -> int:
    """Pixels of the largest picture on the way through `ops`, so that it can be bounded before any is made."""
    pixels = height * width
    for op in ops:
        height, width = op.output_size(height, width)
        pixels = max(pixels, height * width)
    return pixels


def choose_jpeg_scale(ops: Sequence[ImageOp], height: int, width: int, *, margin: int) -> int:
    """The part of its height and width that a picture may be decoded at: 1, or a half, quarter or eighth as 2, 4 or 8.

    Args:
        ops: What is done to it; a resize makes up for the reduction, if nothing before it depends on single pixels.
        height: Of the whole picture, before it is turned upright.
        width: Of the same.
        margin: How many times what the resize makes each side must be at least; 0 for no reduction.
    """
    places = [place for place, op in enumerate(ops) if op.name in ("resize", "center-crop", "ink")]
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


def _pad_to_square(pictures_nchw: Tensor) -> Tensor:
    count, channels, height, width = pictures_nchw.shape
    if height == width:
        return pictures_nchw
    edges = (pictures_nchw[..., 0, :], pictures_nchw[..., -1, :], pictures_nchw[..., 0], pictures_nchw[..., -1])
    border_nc11 = torch.cat(edges, dim=-1).median(dim=-1).values[..., None, None]
    side = max(height, width)
    out = border_nc11.expand(count, channels, side, side).clone()
    top, left = (side - height) // 2, (side - width) // 2
    out[..., top : top + height, left : left + width] = pictures_nchw
    return out


def _crop_to_ink(pictures_nchw: Tensor) -> Tensor:
    """One character as it comes from paper or a screen, the way characters are cut out for recognition.

    Dark ink on a light ground is turned around, by the median of the border; ink is what lies more than a quarter of
    the way from the ground to the lightest pixel. Pictures of at most 16 pixels a side are cut out already.
    """
    if max(pictures_nchw.shape[-2:]) <= _MAX_CROPPED_SIZE:
        return pictures_nchw
    return torch.cat([_crop_character(picture[None]) for picture in pictures_nchw])


def _crop_character(picture_1chw: Tensor) -> Tensor:
    if _background_level(picture_1chw) > 127:
        picture_1chw = 255 - picture_1chw
    above = picture_1chw.float().amax(dim=(0, 1)) - float(_background_level(picture_1chw))
    inked = above > above.max() / 4
    if above.max() <= 0:
        return _pad_to_square(picture_1chw)
    rows, columns = inked.any(1).nonzero().flatten(), inked.any(0).nonzero().flatten()
    cut = picture_1chw[..., int(rows[0]) : int(rows[-1]) + 1, int(columns[0]) : int(columns[-1]) + 1]
    height, width = cut.shape[-2:]
    side = max(height, width)
    out = cut.new_full((*cut.shape[:2], side, side), int(_background_level(picture_1chw)))
    top, left = (side - height) // 2, (side - width) // 2
    out[..., top : top + height, left : left + width] = cut
    return out


def _background_level(picture_1chw: Tensor) -> Tensor:
    """The median of the border: what a character is written on."""
    edges = (picture_1chw[..., 0, :], picture_1chw[..., -1, :], picture_1chw[..., 0], picture_1chw[..., -1])
    return torch.cat([edge.flatten() for edge in edges]).median()


def _are_valid_ops(texts: Sequence[str]) -> bool:
    try:
        parse_ops(tuple(texts))
    except ValueError:
        return False
    return True


OPS_CHECK = Check(f"a list of {OPS_HELP}", _are_valid_ops, {"items": {"type": "string"}})
"""The rule for an option that holds operations."""
