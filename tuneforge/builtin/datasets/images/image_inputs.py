"""Images as model inputs: decoding, fixed operations and normalization.

Shapes: b images in a batch, n in all, c channels as stored, h and w pixels as stored.
"""

from __future__ import annotations

import contextlib
import io
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Literal

import attrs
import numpy as np
import PIL
import torch
import torchvision
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from tuneforge import DataError, Inputs, between, component, gt, option
from tuneforge.builtin.checks import POSITIVE_STDS
from tuneforge.builtin.datasets.images.preprocess import (
    OPS_CHECK,
    OPS_HELP,
    choose_jpeg_scale,
    compute_output_size,
    count_max_pixels,
    parse_ops,
)
from tuneforge.builtin.datasets.images.sample_names import describe_raw
from tuneforge.plugin import (
    IMAGE_FORMATS,
    MAX_IMAGE_BYTES,
    MAX_IMAGE_PIXELS,
    MAX_JPEG_PIXELS,
    convert_to_upright,
    open_image,
)

_MIN_PREVIEW_SIZE = 96  # pixels; smaller images are enlarged for display


@component(api=1)
class ImageInputs(Inputs):
    """Images, stored as uint8 after fixed operations and normalized before the model."""

    takes_paths = True

    ops: tuple[str, ...] = option(
        default=(), help=f"Operations on a decoded image, in order: {OPS_HELP}.", check=OPS_CHECK
    )
    channels: Literal[1, 3] = option(
        default=3, help="Channels of the model's input; grayscale is repeated, colors are averaged."
    )
    mean: tuple[float, ...] = option(
        default=(0.0,), help="Mean for normalization, on the scale 0 to 1, one or one per channel."
    )
    std: tuple[float, ...] = option(
        default=(1.0,),
        help="Std for normalization, on the scale 0 to 1, one or one per channel.",
        check=POSITIVE_STDS,
    )
    jpeg_margin: int = option(
        default=2,
        help="A JPEG is decoded at 1/2, 1/4 or 1/8 of its size if that is at least this many times the output of the "
        "first resize; 1 is fastest, 0 always decodes the full size.",
        check=between(0, 8),
    )
    max_bytes: int = option(default=MAX_IMAGE_BYTES, help="Maximum size of a file, in bytes.", check=gt(0))
    max_pixels: int = option(
        default=MAX_IMAGE_PIXELS, help="Maximum size of a decoded or resized image, in pixels.", check=gt(0)
    )

    @property
    def size(self) -> tuple[int, int] | None:
        """Return the stored height and width, or None if they depend on the image."""
        return compute_output_size(parse_ops(self.ops))

    @property
    def shape(self) -> tuple[int, int, int] | None:
        """Return the stored shape (c, h, w), or None if it depends on the image."""
        return None if self.size is None else (1 if "grayscale" in self.ops else 3, *self.size)

    def with_normalization(self, mean: tuple[float, ...], std: tuple[float, ...]) -> ImageInputs:
        """Return the inputs with another mean and standard deviation."""
        return attrs.evolve(self, mean=mean, std=std)  # type: ignore[misc]  # a component is an attrs class

    def decode(self, raw: Any) -> Tensor:
        """Return the stored form of one image, uint8 (c, h, w).

        Args:
            raw: Bytes of a file, a path, a PIL image, or a uint8 array (h, w) or (h, w, c).

        Raises:
            DataError: It is broken, too large, or not an image of a supported format.
        """
        name = describe_raw(raw)
        pixels_chw = (
            self._pixels_from_array(raw, name) if isinstance(raw, np.ndarray) else self._pixels_from_image(raw, name)
        )
        return self.apply_ops(pixels_chw[None], name=name)[0]

    def apply_ops(self, images_nchw: Tensor, *, name: str = "the images") -> Tensor:
        """Apply the operations to uint8 tensors (n, c, h, w).

        Raises:
            DataError: An operation would exceed `max_pixels`.
        """
        ops = parse_ops(self.ops)
        self.check_size(images_nchw.shape[-2], images_nchw.shape[-1], name)
        for op in ops:
            images_nchw = op(images_nchw)
        return images_nchw.contiguous()

    def preprocess(self, samples: Any) -> Tensor:
        """Return normalized float32 (b, channels, h, w) from stored uint8 (b, c, h, w), on the same device."""
        if samples.shape[1] > self.channels:
            samples = samples.float().mean(dim=1, keepdim=True)
        scale = 1.0 / (255.0 * torch.tensor(self._per_channel(self.std), dtype=torch.float64))
        shift = -torch.tensor(self._per_channel(self.mean), dtype=torch.float64) * 255.0 * scale
        scale, shift = (each.float()[:, None, None].to(samples.device) for each in (scale, shift))
        return torch.mul(samples, scale).add_(shift)

    def render_image(self, sample: Any) -> bytes:
        """Return a PNG of a stored image, enlarged to at least 96 pixels by nearest neighbor."""
        image = Image.fromarray(np.ascontiguousarray(sample.permute(1, 2, 0).squeeze(2).numpy()))
        factor = -(-_MIN_PREVIEW_SIZE // max(image.size))
        enlarged = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
        file = io.BytesIO()
        enlarged.save(file, format="PNG")
        return file.getvalue()

    def render_text(self, sample: Any) -> str:
        """Return the size and kind of a stored image as text."""
        channels, height, width = sample.shape
        return f"{'grayscale' if channels == 1 else 'color'} image, {width}x{height}"

    def check_file(self, path: str | Path) -> None:
        """Check the header of a file.

        Raises:
            DataError: It is too large, or not an image of a supported format.
        """
        name = describe_raw(path)
        with self._open_file(path, name) as file:
            self._open_image(file, name)

    @property
    def decoding_fingerprint(self) -> str:
        """Return everything that determines the stored form of a file, except for the file."""
        return f"{self.ops} {self.jpeg_margin} Pillow {PIL.__version__} torchvision {torchvision.__version__}"

    def _per_channel(self, values: tuple[float, ...]) -> tuple[float, ...]:
        if len(values) not in (1, self.channels):
            raise DataError(
                f"{len(values)} values of mean or std for {self.channels} channel(s)",
                where="normalization",
                fix="give one value, or one per channel",
            )
        return values * (self.channels // len(values))

    def check_size(self, height: int, width: int, name: str, *, is_jpeg: bool = False) -> None:
        """Check the size at which an image is decoded, also after each operation.

        Raises:
            DataError: It exceeds `max_pixels`; the message calls the image `name`.
        """
        scale = self._jpeg_scale(height, width) if is_jpeg and height * width <= MAX_JPEG_PIXELS else 1
        if count_max_pixels(parse_ops(self.ops), -(-height // scale), -(-width // scale)) > self.max_pixels:
            raise DataError(
                f"{name} is too large or too long: {width}x{height} pixels",
                why=f"the limit is {self.max_pixels:,} pixels, because of decompression bombs",
                fix="make the image smaller",
            )

    def _jpeg_scale(self, height: int, width: int) -> int:
        return choose_jpeg_scale(parse_ops(self.ops), height, width, margin=self.jpeg_margin)

    def _pixels_from_array(self, array: np.ndarray[Any, Any], name: str) -> Tensor:
        """Return the pixels (c, h, w) of an array (h, w) or (h, w, c)."""
        if array.dtype != np.uint8 or array.ndim not in (2, 3) or 0 in array.shape:
            raise DataError(
                f"an array of {array.dtype} and shape {array.shape} is not an image",
                why="other dtypes have no standard range",
                fix="give uint8 of shape (height, width) or (height, width, 1, 3 or 4)",
            )
        if array.ndim == 3 and array.shape[2] not in (1, 3, 4):
            raise DataError(f"an image with {array.shape[2]} channels", fix="give 1, 3 or 4 channels")
        return self._pixels_from_image(Image.fromarray(array.squeeze(2) if array.shape[2:] == (1,) else array), name)

    def _pixels_from_image(self, raw: Any, name: str) -> Tensor:
        """Return the pixels (c, h, w) of a file or a PIL image, with EXIF orientation applied.

        The result has 1 channel if the operations and the image are grayscale, else 3.
        """
        image = raw if isinstance(raw, Image.Image) else self._open_image(self._read_bytes(raw, name), name)
        grayscale = "grayscale" in self.ops
        if image is raw:
            self.check_size(image.height, image.width, name)
        try:
            if image is not raw:
                scale = self._jpeg_scale(image.height, image.width)
                image.draft("L" if grayscale else "RGB", (max(1, image.width // scale), max(1, image.height // scale)))
            return _to_pixels(image, grayscale=grayscale)
        except Exception as error:  # noqa: BLE001 - PIL raises whatever a hostile file makes it raise
            raise _decode_error(name, error) from None

    def _open_image(self, file: IO[bytes], name: str) -> Image.Image:
        try:
            image = open_image(file)
        except Exception as error:  # noqa: BLE001 - PIL raises whatever a hostile file makes it raise
            raise _decode_error(name, error) from None
        self.check_size(image.height, image.width, name, is_jpeg=image.format == "JPEG")
        return image

    def _read_bytes(self, raw: Any, name: str) -> io.BytesIO:
        """Return the bytes, after a check of their number."""
        if isinstance(raw, (str, Path)):
            with self._open_file(raw, name) as file:
                return io.BytesIO(file.read())
        if not isinstance(raw, (bytes, bytearray, memoryview)):
            raise DataError(
                f"a {type(raw).__name__} is not an image",
                fix="give the bytes of a file, a path, a PIL image or a uint8 array",
            )
        self._check_num_bytes(len(raw), name)
        return io.BytesIO(raw)

    @contextlib.contextmanager
    def _open_file(self, path: str | Path, name: str) -> Iterator[IO[bytes]]:
        try:
            status = os.stat(path)
            if not stat.S_ISREG(status.st_mode):
                raise DataError(f"{name} is not a file", fix="name an image file")
            self._check_num_bytes(status.st_size, name)
            with open(path, "rb") as file:
                yield file
        except (OSError, ValueError) as error:  # ValueError: a null byte in the name
            why = getattr(error, "strerror", None) or str(error)
            raise DataError(f"cannot read {name}", why=why, fix="check the path and its permissions") from None

    def _check_num_bytes(self, count: int, name: str) -> None:
        if count > self.max_bytes:
            raise DataError(
                f"{name} is too large: {count:,} bytes",
                why=f"the limit is {self.max_bytes:,} bytes",
                fix="make the image smaller",
            )


def _decode_error(name: str, error: BaseException) -> DataError:
    kind = "not an image of a supported format" if isinstance(error, UnidentifiedImageError) else str(error)
    return DataError(
        f"cannot decode {name}",
        why=kind if kind.strip() else type(error).__name__,
        fix=f"repair or remove it; supported are {', '.join(IMAGE_FORMATS)}",
    )


def _to_pixels(image: Image.Image, *, grayscale: bool) -> Tensor:
    """Return 8-bit pixels, upright, alpha over white: (1, h, w) if `grayscale` and the image is, else (3, h, w)."""
    image.load()
    plain = convert_to_upright(image)
    mode = "L" if grayscale and plain.mode in ("L", "1") else "RGB"
    pixels = torch.from_numpy(np.array(plain.convert(mode)))
    return pixels[None] if mode == "L" else pixels.permute(2, 0, 1)
