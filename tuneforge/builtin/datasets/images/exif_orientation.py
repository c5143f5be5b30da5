"""PIL's picture of a file, made plain: upright, 8 bits a channel, opaque. Imports no torch."""

from __future__ import annotations

import numpy as np
from PIL import Image

FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
"""File formats that are read; PIL knows many more, some of which start other programs."""

MAX_BYTES = 64 * 2**20
"""Largest file that is read."""

MAX_PIXELS = 89_478_485
"""Largest picture that is decoded; above it PIL warns of a decompression bomb."""

_EXIF_ORIENTATION = 0x0112
_TRANSPOSE_BY_ORIENTATION = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def convert_to_upright(image: Image.Image) -> Image.Image:
    """The picture that a decoded file shows: turned as its EXIF block says, over white, 8 bits a channel.

    Raises:
        ValueError: Its numbers have no agreed range.
    """
    turn = _TRANSPOSE_BY_ORIENTATION.get(_get_exif_orientation(image))
    plain = _flatten_alpha(_convert_to_8_bits(image))
    return plain if turn is None else plain.transpose(turn)


def check_bit_depth(image: Image.Image) -> None:
    """Refuse numbers that are neither 8 nor 16 bits a channel, without a copy of the picture.

    Raises:
        ValueError: They have no agreed range.
    """
    if image.mode == "F":
        raise ValueError("floating point pictures have no agreed range")
    if image.mode.startswith("I"):
        low, high = image.getextrema()
        if low < 0 or high > 65535:  # type: ignore[operator]  # one channel, so two numbers
            raise ValueError("only 8 and 16 bits a channel are read")


def _flatten_alpha(image: Image.Image) -> Image.Image:
    """The picture over white, where it has transparent parts."""
    if not image.has_transparency_data:
        return image
    layer = image.convert("RGBA")
    over = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return over.convert("L" if image.mode in ("L", "LA", "La", "1") else "RGB")


def _convert_to_8_bits(image: Image.Image) -> Image.Image:
    """The picture with 8 bits a channel; 16 bits are scaled, where PIL would cut them off."""
    check_bit_depth(image)
    if not image.mode.startswith("I"):
        return image
    wide = np.asarray(image).astype(np.int64)
    return Image.fromarray(((wide * 255 + 32767) // 65535).astype(np.uint8))


def _get_exif_orientation(image: Image.Image) -> int:
    """EXIF's number, 1 to 8; a broken EXIF block has none."""
    try:
        return int(image.getexif().get(_EXIF_ORIENTATION, 1))
    except Exception:  # noqa: BLE001 - PIL raises whatever a hostile block makes it raise
        return 1
