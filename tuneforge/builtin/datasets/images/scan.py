"""Whether each file is a picture that can be read, found in processes with limits before anything is trained.

Imports no torch: a process that looks at a file is small, and starts at once.
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

from tuneforge import DataError
from tuneforge.builtin.datasets.images.exif_orientation import (
    FORMATS,
    MAX_BYTES,
    MAX_PIXELS,
    check_bit_depth,
    convert_to_upright,
)
from tuneforge.errors import escape_name
from tuneforge.plugin import Sandbox

MEMORY_MB = 300
TIMEOUT_S = 4.0
GRAY_THUMBNAIL_SIZE, COLOR_THUMBNAIL_SIZE = 48, 24
"""Sides of the two small pictures that are made of each file on request, in pixels."""

_PREVIEW_SIZE = 128
_CHUNK_SIZE = 256
_MAX_FILES_FOR_ONE_PROCESS = 64  # files, for which a second process would not pay
_FILE_TYPE_BY_MAGIC = {
    b"%PDF": "a PDF", b"PK\x03\x04": "a ZIP archive", b"\x1f\x8b": "a gzip archive", b"\x7fELF": "a program",
    b"MZ": "a program", b"<svg": "an SVG", b"<?xml": "XML", b"<!DOCTYPE": "HTML", b"<html": "HTML", b"#!": "a script",
    b"8BPS": "a Photoshop file", b"%!PS": "PostScript", b"SQLite": "a database", b"\x80\x02": "a pickle",
    b"\x00\x00\x01\x00": "an icon", b"version https://git-lfs": "a pointer of Git LFS, not the file itself",
}  # fmt: skip


@attrs.frozen
class ScanResult:
    """What looking at a file gave.

    Args:
        why: Why it cannot be used; empty where it can.
        size: Width and height, in pixels; (0, 0) where it cannot be used.
        format: Format and mode, such as `JPEG CMYK`.
        digest: SHA-256 of its bytes.
        gray_hw: The picture in small, uint8 (48, 48); None unless asked for.
        color_hwc: The same in colours, uint8 (24, 24, 3).
    """

    why: str = ""
    size: tuple[int, int] = (0, 0)
    format: str = ""
    digest: str = ""
    gray_hw: np.ndarray[Any, Any] | None = None
    color_hwc: np.ndarray[Any, Any] | None = None


def scan(
    paths: Sequence[str], *, thumbnails: bool = False, memory_mb: int = MEMORY_MB, timeout_s: float = TIMEOUT_S
) -> Iterator[ScanResult]:
    """A verdict on each file, in order, whatever the files are: none ends or holds up the process that asks.

    Args:
        paths: Of the files.
        thumbnails: Make the two small pictures of each, too.
        memory_mb: Memory of each process that looks, in MB.
        timeout_s: Time for a file.
    """
    count = min(4, os.cpu_count() or 1) if len(paths) > _MAX_FILES_FOR_ONE_PROCESS else 1
    idle: queue.SimpleQueue[Sandbox] = queue.SimpleQueue()
    processes = [Sandbox(f"{__name__}:inspect_image", memory_mb=memory_mb, timeout_s=timeout_s) for _ in range(count)]
    for each in processes:
        idle.put(each)

    def look(path: str) -> ScanResult:
        process = idle.get()
        try:
            return _to_scan_result(process.call(path=path, thumbnails=thumbnails))
        except DataError as error:
            return ScanResult(why=escape_name(error.what))
        finally:
            idle.put(process)

    waiting = iter(paths)
    try:
        with ThreadPoolExecutor(count) as pool:
            while block := list(islice(waiting, _CHUNK_SIZE)):
                yield from pool.map(look, block)
    finally:
        for each in processes:
            each.close()


def inspect_image(
    path: str,
    *,
    thumbnails: bool = False,
    preview: bool = False,
    max_bytes: int = MAX_BYTES,
    max_pixels: int = MAX_PIXELS,
) -> dict[str, Any]:
    """Read and decode one file; runs in the process with limits.

    Args:
        path: Of the file.
        thumbnails: Make the two small pictures.
        preview: Make a PNG of it for people, at most 128 pixels wide and high.
        max_bytes: Largest file that is read.
        max_pixels: Largest picture that is decoded.

    Raises:
        DataError: It cannot be used, in words that complete "because ...".
    """
    content = _read_content(path, max_bytes)
    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
        if image.width * image.height > max_pixels:
            raise DataError(
                f"it is {image.width}x{image.height} pixels large; at most {max_pixels:,} pixels are decoded"
            )
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
    return {"size": size, "kind": kind, "digest": hashlib.sha256(content).hexdigest(), **made}


def render_preview(process: Sandbox, path: str) -> str | None:
    """A PNG of a file for people, in base64, made by a process of `inspect_image`; None where it cannot be read."""
    try:
        return str(process.call(path=path, preview=True)["preview"])
    except DataError:
        return None


def _to_scan_result(answer: dict[str, Any]) -> ScanResult:
    gray, color = (_decode_array(answer.get(key)) for key in ("gray", "color"))
    return ScanResult(
        size=(answer["size"][0], answer["size"][1]),
        format=answer["kind"],
        digest=answer["digest"],
        gray_hw=None if gray is None else gray.reshape(GRAY_THUMBNAIL_SIZE, GRAY_THUMBNAIL_SIZE),
        color_hwc=None if color is None else color.reshape(COLOR_THUMBNAIL_SIZE, COLOR_THUMBNAIL_SIZE, 3),
    )


def _decode_array(text: str | None) -> np.ndarray[Any, Any] | None:
    return None if text is None else np.frombuffer(base64.b64decode(text), dtype=np.uint8)


def _read_content(path: str, max_bytes: int) -> bytes:
    """All bytes of a file, bounded before they are read; a FIFO is never waited for."""
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
        return "it is HEIC, AVIF or a film, which are not read"
    if not content.strip(b"\0"):
        return "it holds nothing but zeros"
    return f"it is no picture of a format that is read ({', '.join(FORMATS)})"


def _make_previews(image: Image.Image, *, thumbnails: bool, preview: bool) -> dict[str, str]:
    made: dict[str, str] = {}
    plain = convert_to_upright(_downscale(image, _PREVIEW_SIZE)).convert(
        "RGB"
    )  # always: not every mode that is decoded converts
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


def _downscale(image: Image.Image, least: int) -> Image.Image:
    """The picture at a whole fraction of its size, no side under `least` pixels by that; takes little memory."""
    factor = min(image.width, image.height) // least
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
