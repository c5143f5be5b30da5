"""Made files: images that are broken, odd or hostile, each with what a check must say about it."""

from __future__ import annotations

import io
import os
import socket
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

FINE, BAD, EITHER = "fine", "bad", "either"
Maker = Callable[[Path], None]

FORMATS = {"png": "PNG", "jpg": "JPEG", "gif": "GIF", "bmp": "BMP", "webp": "WEBP", "tif": "TIFF", "ppm": "PPM"}
OTHERS = {
    "pdf": b"%PDF-1.7\n1 0 obj<</Type/Catalog>>endobj", "zip": b"PK\x03\x04" + bytes(60),
    "svg": b"<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'/>", "html": b"<html><script>alert(1)</script>",
    "elf": b"\x7fELF" + bytes(60), "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) run",
    "pickle": b"\x80\x02cposix\nsystem\nX\x05\0\0\0falseq\0\x85R.", "psd": b"8BPS\0\1" + bytes(60),
    "ico": b"\0\0\1\0\1\0" + bytes(60), "gz": b"\x1f\x8b\x08" + bytes(60), "text": b"only words\n",
    "script": b"#!/bin/sh\ntouch pwned\n", "wav": b"RIFF\x24\0\0\0WAVEfmt " + bytes(40),
    "heic": b"\0\0\0\x18ftypheic" + bytes(60), "lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n",
    "zeros": bytes(5000), "ones": b"\xff" * 5000, "xml": b"<?xml version='1.0'?><!DOCTYPE a [<!ENTITY b 'c'>]>",
    "fits": b"SIMPLE  =                    T" + bytes(99), "byte": b"\x89", "nothing": b"",
}  # fmt: skip
NAMES = [
    b"new\nline", b"carriage\rreturn", b"tab\there", b"\x1b[31mred\x1b[0m", b"bell\x07", b"not utf-8 \xff\xfe",
    b"<script>alert(1)</script>".replace(b"/", b"\xe2\x88\x95"), b'"onerror="alert(1)', b"' or 1=1 --", b"-rf",
    b"--help", b"$(touch pwned)", b"`touch pwned`", b"%s%n", b"=cmd|calc", b"back\\slash", b"x" * 240,
    "right\u202eleft".encode(), "\U0001f4a5".encode(), b"{{ 7*7 }}", b" leading", b"a,b;c", b"NUL", b"a..twice..",
]  # fmt: skip


def make_image(seed: int = 0, *, mode: str = "RGB", size: tuple[int, int] = (40, 30)) -> Image.Image:
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    return small.resize(size, Image.Resampling.BICUBIC).convert(mode)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png(width: int, height: int, *chunks: tuple[bytes, bytes], depth: int = 8, color: int = 2) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    body = b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in ((b"IHDR", header), *chunks, (b"IEND", b""))
    )
    return b"\x89PNG\r\n\x1a\n" + body


def _written(content: bytes) -> Maker:
    return lambda path: path.write_bytes(content) and None


def _truncated() -> Iterator[tuple[str, Maker, str]]:
    for suffix, kind in FORMATS.items():
        whole = encoded(make_image(1), kind)
        for share in (0.02, 0.1, 0.3, 0.6, 0.9):
            yield f"cut-{share}.{suffix}", _written(whole[: max(1, int(share * len(whole)))]), EITHER


def _flipped(rounds: int) -> Iterator[tuple[str, Maker, str]]:
    rng = np.random.default_rng(0)
    for suffix, kind in FORMATS.items():
        whole = encoded(make_image(2), kind)
        for number in range(rounds):
            changed = bytearray(whole)
            for place in rng.integers(0, len(whole) if number % 2 else 64, 1 + number):
                changed[place] ^= 1 << int(rng.integers(8))
            yield f"flip-{number}.{suffix}", _written(bytes(changed)), EITHER


def _bombs() -> Iterator[tuple[str, Maker, str]]:
    zeros = zlib.compress(bytes(100_000_000), 9)
    yield "huge-header.png", _written(png(60000, 60000, (b"IDAT", zlib.compress(b"")))), BAD
    yield "overflow.png", _written(png(2**31 - 1, 2**31 - 1, (b"IDAT", zlib.compress(b"")))), BAD
    yield "zero-wide.png", _written(png(0, 10, (b"IDAT", zlib.compress(b"")))), BAD
    yield "rows-of-nothing.png", _written(png(9000, 9000, (b"IDAT", zeros))), BAD
    yield "deflate.png", _written(encoded(Image.new("L", (9000, 9000)), compress_level=1)), FINE
    yield "deflate-rgb.png", _written(encoded(Image.new("RGB", (9400, 9400)), compress_level=1)), BAD
    yield "deflate-1bit.png", _written(encoded(Image.new("1", (9400, 9400)))), EITHER
    yield (
        "text-bomb.png",
        _written(png(8, 8, (b"zTXt", b"a\0\0" + zeros), (b"IDAT", zlib.compress(bytes(200))))),
        EITHER,
    )
    yield (
        "profile-bomb.png",
        _written(png(8, 8, (b"iCCP", b"a\0\0" + zeros), (b"IDAT", zlib.compress(bytes(200))))),
        EITHER,
    )
    many = [(b"tEXt", b"k\0" + bytes([65 + n % 26]) * 50) for n in range(20000)]
    yield "many-chunks.png", _written(png(8, 8, *many, (b"IDAT", zlib.compress(bytes(200))))), EITHER
    yield "palette-of-none.png", _written(png(8, 8, (b"IDAT", zlib.compress(bytes(99))), color=3)), EITHER
    jpeg = bytearray(encoded(make_image(3), "JPEG"))
    at = jpeg.index(b"\xff\xc0")
    jpeg[at + 5 : at + 9] = b"\xff\xff\xff\xff"
    yield "huge.jpg", _written(bytes(jpeg)), BAD
    yield (
        "huge.gif",
        _written(b"GIF89a\xff\xff\xff\xff\x80\0\0" + bytes(6) + b",\0\0\0\0\xff\xff\xff\xff\0\x08\0;"),
        BAD,
    )
    yield (
        "huge.bmp",
        _written(b"BM" + struct.pack("<IHHIIiiHHIIiiII", 99, 0, 0, 54, 40, 2**30, 2**30, 1, 24, 0, 0, 0, 0, 0, 0)),
        BAD,
    )
    yield (
        "negative.bmp",
        _written(b"BM" + struct.pack("<IHHIIiiHHIIiiII", 99, 0, 0, 54, 40, -5, -5, 1, 24, 0, 0, 0, 0, 0, 0)),
        BAD,
    )
    yield "huge.ppm", _written(b"P6 99999 99999 255\n" + bytes(99)), BAD
    yield "digits.ppm", _written(b"P6 " + b"9" * 100_000 + b" 1 255\n"), BAD
    yield "comment.ppm", _written(b"P3\n#" + b"x" * 3_000_000 + b"\n1 1 255 0 0 0"), EITHER
    webp = encoded(make_image(4, size=(16, 16)), "WEBP", lossless=True)
    yield "huge.webp", _written(webp[:21] + b"\xff\xff\xff\x0f" + webp[25:]), BAD
    yield "huge.tif", _written(tiff(60000, 60000)), BAD
    yield "loop.tif", _written(tiff(8, 8, following=8)), EITHER
    yield "strips.tif", _written(tiff(8, 8, strip=2**31 - 9)), EITHER
    yield "deflate.tif", _written(encoded(Image.new("L", (3000, 3000)), "TIFF", compression="tiff_deflate")), FINE
    frames = [make_image(n, mode="P") for n in range(40)]
    yield "frames.gif", _written(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])), FINE
    yield "sparse.png", _sparse, BAD


def tiff(width: int, height: int, *, following: int = 0, strip: int = 64) -> bytes:
    """A gray TIFF of one strip; `following` is where the next directory is said to lie."""
    entries = [
        (256, 4, width),
        (257, 4, height),
        (258, 3, 8),
        (259, 3, 1),
        (262, 3, 1),
        (273, 4, 200),
        (278, 4, height),
    ]
    entries += [(277, 3, 1), (279, 4, strip)]
    body = struct.pack("<H", len(entries)) + b"".join(
        struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in sorted(entries)
    )
    return (b"II*\0" + struct.pack("<I", 8) + body + struct.pack("<I", following)).ljust(200, b"\0") + bytes(64)


def _sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(10 * 2**30)


def _odd() -> Iterator[tuple[str, Maker, str]]:
    wide = Image.fromarray((np.arange(900, dtype=np.uint16) * 70).reshape(30, 30))
    makers: dict[str, tuple[Image.Image, str, dict[str, object]]] = {
        "cmyk.jpg": (make_image(mode="CMYK"), "JPEG", {}),
        "gray.jpg": (make_image(mode="L"), "JPEG", {}),
        "progressive.jpg": (make_image(), "JPEG", {"progressive": True}),
        "cmyk.tif": (make_image(mode="CMYK"), "TIFF", {}),
        "16-bit.png": (wide, "PNG", {}),
        "16-bit.tif": (wide, "TIFF", {}),
        "1-bit.png": (make_image(mode="1"), "PNG", {}),
        "palette.png": (make_image(mode="P"), "PNG", {"transparency": 3}),
        "rgba.png": (make_image(mode="RGBA"), "PNG", {}),
        "la.png": (make_image(mode="LA"), "PNG", {}),
        "one.png": (make_image(size=(1, 1)), "PNG", {}),
        "thin.png": (make_image(size=(1, 3000)), "PNG", {}),
        "1-bit.bmp": (make_image(mode="1"), "BMP", {}),
        "palette.bmp": (make_image(mode="P"), "BMP", {}),
        "rgba.webp": (make_image(mode="RGBA"), "WEBP", {}),
        "lossless.webp": (make_image(), "WEBP", {"lossless": True}),
        "lzw.tif": (make_image(), "TIFF", {"compression": "tiff_lzw"}),
        "palette.gif": (make_image(mode="P"), "GIF", {}),
        "jpeg.tif": (make_image(), "TIFF", {"compression": "jpeg"}),
        "gray.pgm": (make_image(mode="L"), "PPM", {}),
        "bits.pbm": (make_image(mode="1"), "PPM", {}),
        "ycbcr.jpg": (make_image(mode="YCbCr"), "JPEG", {}),
        "profile.png": (make_image(), "PNG", {"icc_profile": b"no profile"}),
        "exif.jpg": (make_image(), "JPEG", {"exif": b"Exif\0\0II*\0rubbish"}),
        "group4.tif": (make_image(mode="1"), "TIFF", {"compression": "group4"}),
        "subsampled.jpg": (make_image(), "JPEG", {"subsampling": 2}),
    }
    for name, (image, kind, options) in makers.items():
        yield name, _written(encoded(image, kind, **options)), FINE
    for number in range(1, 10):
        exif = Image.Exif()
        exif[0x0112] = number
        yield f"turned-{number}.jpg", _written(encoded(make_image(), "JPEG", exif=exif)), FINE
    yield "text.ppm", _written(b"P3 2 2 255 " + b"9 " * 12), FINE
    yield "lab.tif", _written(encoded(make_image().convert("LAB"), "TIFF")), FINE
    yield "float.tif", _written(encoded(Image.new("F", (9, 9), 0.5), "TIFF")), BAD
    yield "32-bit.tif", _written(encoded(Image.new("I", (9, 9), 70000), "TIFF")), BAD
    yield "behind.png", _written(encoded(make_image()) + b"<script>alert(1)</script>"), FINE
    suffixes = list(FORMATS)
    for place, suffix in enumerate(suffixes):  # a image of one format under the name of another
        yield f"misnamed.{suffix}", _written(encoded(make_image(), FORMATS[suffixes[place - 1]])), FINE


def special() -> Iterator[tuple[str, Maker, str]]:
    yield "fifo.png", lambda path: os.mkfifo(path), BAD
    for name in ("zero", "null", "random", "full", "tty"):
        yield f"device-{name}.png", lambda path, name=name: path.symlink_to(f"/dev/{name}"), BAD
    yield "socket.png", _socket, BAD
    yield "itself.png", lambda path: path.symlink_to(path.name), BAD
    yield "loop-a.png", lambda path: path.symlink_to("loop-b.png"), BAD
    yield "loop-b.png", lambda path: path.symlink_to("loop-a.png"), BAD
    yield "nowhere.png", lambda path: path.symlink_to("/nonexistent/x"), BAD
    yield "passwd.png", lambda path: path.symlink_to("/etc/passwd"), BAD
    yield "up", lambda path: path.symlink_to(".."), BAD
    yield "linked.png", _linked, FINE
    yield "memory.png", lambda path: path.symlink_to("/proc/self/mem"), BAD


def _socket(path: Path) -> None:
    before = os.getcwd()
    os.chdir(path.parent)  # the name of a socket has room for about 100 bytes
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(before)


def _linked(path: Path) -> None:
    target = path.with_name(".target")
    target.write_bytes(encoded(make_image(9)))
    path.symlink_to(target.name)


def _false() -> Iterator[tuple[str, Maker, str]]:
    for name, content in OTHERS.items():
        for suffix in ("png", "jpg"):
            yield f"{name}.{suffix}", _written(content), BAD


def named() -> Iterator[tuple[str, Maker, str]]:
    for number, name in enumerate(NAMES):
        yield os.fsdecode(name + b".png"), _written(encoded(make_image(100 + number))), FINE


def hostile_files() -> list[tuple[str, Maker, str]]:
    """300 files: a name, what makes it, and whether it is fine, bad, or either (a verdict is all that is asked)."""
    kinds = [*_truncated(), *_bombs(), *_odd(), *special(), *_false(), *named()]
    return [*kinds, *list(_flipped(20))[: 300 - len(kinds)]]


def plant(folder: Path, files: Iterable[tuple[str, Maker, str]] | None = None) -> dict[str, str]:
    """Make files in a folder, all 300 by default; what is expected of each, by name."""
    folder.mkdir(parents=True)
    expected = {}
    for name, make, verdict in files or hostile_files():
        assert name not in expected, name
        make(folder / name)
        expected[name] = verdict
    return expected
