"""Check in sandboxed processes whether each file is an image that can be decoded.

Imports no torch, so that a sandboxed process starts quickly and stays small.
"""

from __future__ import annotations

import base64
import hashlib
import io
import os
import queue
import stat
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

import attrs
import numpy as np
from PIL import Image, UnidentifiedImageError

from tuneforge.errors import DataError, escape_name
from tuneforge.plugin.image_decoding import (
    IMAGE_FORMATS,
    MAX_IMAGE_BYTES,
    MAX_IMAGE_PIXELS,
    MAX_JPEG_PIXELS,
    check_bit_depth,
    convert_to_upright,
    open_image,
)
from tuneforge.sandbox import Sandbox

GRAY_THUMBNAIL_SIZE, COLOR_THUMBNAIL_SIZE = 48, 24
"""Side lengths of the two thumbnails, in pixels."""

_MEMORY_MB = 300
_TIMEOUT_S = 4.0
_PREVIEW_SIZE = 128
_CHUNK_SIZE = 256
_MAX_FILES_FOR_ONE_PROCESS = 64  # starting a second process takes longer than this many files
_FILE_TYPE_BY_MAGIC = {
    b"%PDF": "a PDF", b"PK\x03\x04": "a ZIP archive", b"\x1f\x8b": "a gzip archive", b"\x7fELF": "a program",
    b"MZ": "a program", b"<svg": "an SVG", b"<?xml": "XML", b"<!DOCTYPE": "HTML", b"<html": "HTML", b"#!": "a script",
    b"8BPS": "a Photoshop file", b"%!PS": "PostScript", b"SQLite": "a database", b"\x80\x02": "a pickle",
    b"\x00\x00\x01\x00": "an icon", b"version https://git-lfs": "a Git LFS pointer, not the file itself",
}  # fmt: skip


@attrs.frozen
class ImageScan:
    """The result of opening one file.

    Args:
        why: Why the file cannot be used, in words that complete "because ..."; empty if it can.
        size: Width and height in pixels; (0, 0) if the file cannot be used.
        format: Format and mode, such as `JPEG CMYK`.
        digest: SHA-256 of the file's bytes, in hexadecimal.
        gray_hw: Grayscale thumbnail, uint8 of shape (48, 48); None unless requested.
        color_hwc: RGB thumbnail, uint8 of shape (24, 24, 3); None unless requested.
        preview: PNG of at most 128 x 128 pixels for display, in base64; None unless requested.
    """

    why: str = ""
    size: tuple[int, int] = (0, 0)
    format: str = ""
    digest: str = ""
    gray_hw: np.ndarray[Any, Any] | None = None
    color_hwc: np.ndarray[Any, Any] | None = None
    preview: str | None = None


def scan_images(
    paths: Sequence[str],
    *,
    thumbnails: bool = False,
    preview: bool = False,
    memory_mb: int = _MEMORY_MB,
    timeout_s: float = _TIMEOUT_S,
    max_pixels: int = MAX_IMAGE_PIXELS,
) -> Iterator[ImageScan]:
    """Open each file in a sandboxed process and yield the results in order.

    No file, however hostile, raises here, ends this process or blocks it for longer than `timeout_s`.

    Args:
        paths: The files.
        thumbnails: Also make the two thumbnails of each file.
        preview: Also make the preview of each file.
        memory_mb: Memory limit of each process, in MB.
        timeout_s: Time limit for each file, in seconds.
        max_pixels: Size of the largest image that is decoded, in pixels; a JPEG is decoded at a fraction of its size.
    """
    count = min(4, os.cpu_count() or 1) if len(paths) > _MAX_FILES_FOR_ONE_PROCESS else 1
    idle: queue.SimpleQueue[Sandbox] = queue.SimpleQueue()
    processes = [Sandbox(f"{__name__}:inspect_image", memory_mb=memory_mb, timeout_s=timeout_s) for _ in range(count)]
    for each in processes:
        idle.put(each)

    def scan(path: str) -> ImageScan:
        process = idle.get()
        try:
            return _to_image_scan(
                process.call(path=path, thumbnails=thumbnails, preview=preview, max_pixels=max_pixels)
            )
        except DataError as error:
            return ImageScan(why=escape_name(error.what))
        finally:
            idle.put(process)

    waiting = iter(paths)
    try:
        with ThreadPoolExecutor(count) as pool:
            while block := list(islice(waiting, _CHUNK_SIZE)):
                yield from pool.map(scan, block)
    finally:
        for each in processes:
            each.close()


def inspect_image(
    path: str,
    *,
    thumbnails: bool = False,
    preview: bool = False,
    max_bytes: int = MAX_IMAGE_BYTES,
    max_pixels: int = MAX_IMAGE_PIXELS,
) -> dict[str, Any]:
    """Read and decode one file; `scan_images` calls this function in the sandboxed process.

    Args:
        path: The file.
        thumbnails: Also make the two thumbnails.
        preview: Also make the preview.
        max_bytes: Size of the largest file that is read, in bytes.
        max_pixels: Size of the largest image that is decoded, in pixels.

    Returns:
        The fields of an `ImageScan` as JSON values.

    Raises:
        DataError: The file cannot be used; the message completes "because ...".
    """
    content = _read_content(path, max_bytes)
    try:
        image = open_image(io.BytesIO(content))
        limit = max(max_pixels, MAX_JPEG_PIXELS) if image.format == "JPEG" else max_pixels
        if image.width * image.height > limit:
            raise DataError(f"it is {image.width}x{image.height} pixels large; at most {limit:,} pixels are decoded")
        size, kind = image.size, f"{image.format} {image.mode}"
        image.draft("RGB", (2 * _PREVIEW_SIZE, 2 * _PREVIEW_SIZE))
        image.load()
        check_bit_depth(image)
        made = _make_previews(image, thumbnails=thumbnails, preview=preview)
    except (DataError, MemoryError):
        raise
    except UnidentifiedImageError:
        raise DataError(_guess_file_type(content)) from None
    except Exception as error:  # noqa: BLE001 - PIL raises whatever a hostile file makes it raise
        raise DataError(f"it is broken: {str(error).strip() or type(error).__name__}") from None
    return {"size": size, "format": kind, "digest": hashlib.sha256(content).hexdigest(), **made}


def _to_image_scan(response: dict[str, Any]) -> ImageScan:
    gray, color = (_decode_array(response.get(key)) for key in ("gray", "color"))
    return ImageScan(
        size=(response["size"][0], response["size"][1]),
        format=response["format"],
        digest=response["digest"],
        gray_hw=None if gray is None else gray.reshape(GRAY_THUMBNAIL_SIZE, GRAY_THUMBNAIL_SIZE),
        color_hwc=None if color is None else color.reshape(COLOR_THUMBNAIL_SIZE, COLOR_THUMBNAIL_SIZE, 3),
        preview=response.get("preview"),
    )


def _decode_array(text: str | None) -> np.ndarray[Any, Any] | None:
    return None if text is None else np.frombuffer(base64.b64decode(text), dtype=np.uint8)


def _read_content(path: str, max_bytes: int) -> bytes:
    """Return the content of a regular file of at most `max_bytes` bytes; opening a FIFO does not block."""
    try:
        _require_regular_file(os.stat(path))
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            status = os.fstat(file.fileno())  # the very file that was opened
            _require_regular_file(status)
            if status.st_size > max_bytes:
                raise DataError(f"it is {status.st_size:,} bytes large; at most {max_bytes:,} bytes are read")
            content = file.read(max_bytes + 1)
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise DataError(f"it cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if not content:
        raise DataError("it is empty")
    return content


def _require_regular_file(status: os.stat_result) -> None:
    kinds = {"a folder": stat.S_ISDIR, "a FIFO": stat.S_ISFIFO, "a socket": stat.S_ISSOCK}
    kinds |= {"a device": lambda mode: stat.S_ISCHR(mode) or stat.S_ISBLK(mode)}
    for name, test in kinds.items():
        if test(status.st_mode):
            raise DataError(f"it is {name}, not a file")


def _guess_file_type(content: bytes) -> str:
    start = content[:64].lstrip()
    for magic, name in _FILE_TYPE_BY_MAGIC.items():
        if start.startswith(magic):
            return f"it is {name}"
    if content[4:8] == b"ftyp":
        kind = "AVIF" if content[8:12] in (b"avif", b"avis") else "HEIC or a video"
        return f"it is {kind}, a format that is not supported; supported are {', '.join(IMAGE_FORMATS)}"
    if not content.strip(b"\0"):
        return "it contains only zeros"
    return f"it is not an image of a supported format ({', '.join(IMAGE_FORMATS)})"


def _make_previews(image: Image.Image, *, thumbnails: bool, preview: bool) -> dict[str, str]:
    made: dict[str, str] = {}
    # Without a thumbnail or preview too, because some modes that PIL decodes cannot be converted to RGB.
    plain = convert_to_upright(_downscale(image, _PREVIEW_SIZE)).convert("RGB")
    if thumbnails:
        gray = plain.convert("L").resize((GRAY_THUMBNAIL_SIZE, GRAY_THUMBNAIL_SIZE), Image.Resampling.BOX)
        color = plain.resize((COLOR_THUMBNAIL_SIZE, COLOR_THUMBNAIL_SIZE), Image.Resampling.BOX)
        made |= {"gray": _base64(gray.tobytes()), "color": _base64(color.tobytes())}
    if preview:
        plain.thumbnail((_PREVIEW_SIZE, _PREVIEW_SIZE))
        file = io.BytesIO()
        plain.save(file, format="PNG")
        made["preview"] = _base64(file.getvalue())
    return made


def _downscale(image: Image.Image, min_side: int) -> Image.Image:
    """Reduce the image by an integer factor that leaves both sides at least `min_side` pixels, using little memory."""
    factor = min(image.width, image.height) // min_side
    if factor < 2:
        return image
    if image.mode.startswith("I"):
        return Image.fromarray(np.asarray(image)[::factor, ::factor].copy())
    whole = image if image.mode not in ("1", "P", "PA") else image.convert("RGBA" if _has_alpha(image) else "RGB")
    return whole.reduce(factor)


def _has_alpha(image: Image.Image) -> bool:
    return bool(image.has_transparency_data)


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()
