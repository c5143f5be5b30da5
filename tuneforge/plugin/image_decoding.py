"""Opening image files with limits, and the conversion of a PIL image to an upright, opaque one with 8 bits a channel.

Imports no torch, so that a sandboxed process starts quickly and stays small.
"""

from __future__ import annotations

import contextlib
import struct
from typing import IO

import numpy as np
from PIL import Image, UnidentifiedImageError, features

IMAGE_FORMATS = (
    "PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM", *(("AVIF",) if features.check("avif") else ())
)  # fmt: skip
"""File formats that are read. PIL knows many more, some of which start other programs."""

MAX_IMAGE_BYTES = 64 * 2**20
"""Size of the largest file that is read, in bytes."""

MAX_IMAGE_PIXELS = 89_478_485
"""Default size of the largest image that is decoded, in pixels."""

MAX_JPEG_PIXELS = 4 * MAX_IMAGE_PIXELS
"""Size of the largest JPEG that is opened, in pixels: it can be decoded at 1/8 of its size."""

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


def open_image(file: IO[bytes]) -> Image.Image:
    """Return the image of a file without decoding it; its size is not checked.

    `PIL.Image.open` refuses large sizes before it is known at which fraction of its size a JPEG will be decoded.

    Raises:
        UnidentifiedImageError: It has none of the supported formats.
    """
    start = file.read(16)
    Image.preinit()
    for name in IMAGE_FORMATS:
        if name not in Image.OPEN:
            Image.init()
        factory, accepts = Image.OPEN[name]
        if accepts is None or accepts(start) is True:
            file.seek(0)
            with contextlib.suppress(SyntaxError, IndexError, TypeError, struct.error):  # as PIL does: try the next
                return factory(file, "")
    raise UnidentifiedImageError("not an image of a supported format")


def convert_to_upright(image: Image.Image) -> Image.Image:
    """Return the image turned as its EXIF orientation says, composited over white, with 8 bits a channel.

    Raises:
        ValueError: The pixel values are floating point, or exceed 16 bits, so their range is unknown.
    """
    turn = _TRANSPOSE_BY_ORIENTATION.get(_get_exif_orientation(image))
    plain = _flatten_alpha(_convert_to_8_bits(image))
    return plain if turn is None else plain.transpose(turn)


def check_bit_depth(image: Image.Image) -> None:
    """Raise unless the image has 8 or 16 bits a channel; the image is not copied.

    Raises:
        ValueError: The pixel values are floating point, or exceed 16 bits.
    """
    if image.mode == "F":
        raise ValueError("floating point images have no agreed range")
    if image.mode.startswith("I"):
        low, high = image.getextrema()
        if low < 0 or high > 65535:  # type: ignore[operator]  # one channel, so two numbers
            raise ValueError("only 8 and 16 bits a channel are read")


def _flatten_alpha(image: Image.Image) -> Image.Image:
    """Composite the image over white if it has transparency."""
    if not image.has_transparency_data:
        return image
    layer = image.convert("RGBA")
    over = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return over.convert("L" if image.mode in ("L", "LA", "La", "1") else "RGB")


def _convert_to_8_bits(image: Image.Image) -> Image.Image:
    """Scale 16 bits a channel to 8; PIL's own conversion would clip them."""
    check_bit_depth(image)
    if not image.mode.startswith("I"):
        return image
    wide = np.asarray(image).astype(np.int64)
    return Image.fromarray(((wide * 255 + 32767) // 65535).astype(np.uint8))


def _get_exif_orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8; 1 if the EXIF block is broken."""
    try:
        return int(image.getexif().get(_EXIF_ORIENTATION, 1))
    except Exception:  # noqa: BLE001 - PIL raises whatever a hostile block makes it raise
        return 1
