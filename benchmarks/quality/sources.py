"""Samples of the tasks, read from what Debian packages and Python packages ship.

`--data ROOT` is the folder below which the Debian packages lie: `/` where they are installed, or a folder into which
`dpkg-deb -x` unpacked them. README.md of this folder lists them.
"""

import gzip
import re
import subprocess
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import attrs
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

PER_CLASS = 300
"""At most so many samples of a class are kept."""

MAX_PIXELS = 8_000_000
"""A few drawings are larger; they are left out, since decoding them takes gigabytes."""


@attrs.frozen(eq=False)
class Examples:
    """What a source gives.

    Args:
        values: Images, uint8 (n, channels, height, width); or texts.
        labels: Class of each (n,).
        classes: Names of the classes.
        groups: Group of each, or None.
    """

    values: Any
    labels: NDArray[np.int64]
    classes: tuple[str, ...]
    groups: tuple[str, ...] | None = None


def photographs(root: Path, size: int) -> Examples:
    """Read the stamps of tuxpaint that are no cartoons and no mirror images, by category."""
    folder = root / "usr/share/tuxpaint/stamps"
    kinds = {
        "birds": ("animals/birds",),
        "mammals": ("animals/mammals",),
        "food": ("food",),
        "household": ("household",),
        "plants": ("plants",),
    }
    files = {
        kind: [path for part in parts for path in sorted((folder / part).rglob("*.png")) if _is_photograph(path)]
        for kind, parts in kinds.items()
    }
    return _images(files, size)


def _is_photograph(path: Path) -> bool:
    return "cartoon" not in str(path) and not re.search(r"(_mirror|_flip)$", path.stem)


def clip_art(root: Path, size: int) -> Examples:
    """Read the drawings of the Open Clip Art Library, by category."""
    folder = root / "usr/share/openclipart/png"
    kinds = ("animals", "buildings", "food", "geography", "people", "plants", "tools", "transportation")
    return _images({kind: [p for p in sorted((folder / kind).rglob("*.png")) if p.is_file()] for kind in kinds}, size)


def emoji(root: Path, size: int) -> Examples:
    """Draw the emoji of one code point in Noto Color Emoji; the classes are groups of Unicode."""
    kinds = ("Animals & Nature", "Food & Drink", "Travel & Places", "Activities", "Objects", "Symbols")
    font = ImageFont.truetype(root / "usr/share/fonts/truetype/noto/NotoColorEmoji.ttf", 109)
    drawn: dict[str, list[Image.Image]] = {kind: [] for kind in kinds}
    for kind, text in _emoji_of_one_code_point(root / "usr/share/unicode/emoji/emoji-test.txt"):
        if kind in drawn:
            image = Image.new("RGB", (136, 128), "white")
            ImageDraw.Draw(image).text((0, 0), text, font=font, embedded_color=True)
            drawn[kind].append(image)
    images = [_square(image, size) for kind in kinds for image in drawn[kind]]
    return Examples(np.stack(images), _repeat([len(drawn[kind]) for kind in kinds]), kinds)


def _emoji_of_one_code_point(path: Path) -> Iterator[tuple[str, str]]:
    kind, seen = "", set()
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("# group: "):
            kind = line.removeprefix("# group: ")
        points = line.partition(";")[0].split() if line and line[0] != "#" else []
        if points and [point for point in points if point != "FE0F"] == points[:1] and points[0] not in seen:
            seen.add(points[0])
            yield kind, chr(int(points[0], 16))


def fashion(root: Path, size: int) -> Examples:
    """Read the training images of Fashion-MNIST: clothes, 28x28, bright on black (1 channel)."""
    folder = next((root / "usr/share").glob("*/train-images-idx3-ubyte.gz"), None) or next(
        (root / "usr/share").rglob("train-images-idx3-ubyte.gz")
    )
    folder = folder.parent
    labels = np.frombuffer(gzip.decompress((folder / "train-labels-idx1-ubyte.gz").read_bytes()), np.uint8, offset=8)
    pixels = np.frombuffer(gzip.decompress((folder / "train-images-idx3-ubyte.gz").read_bytes()), np.uint8, offset=16)
    rows = np.concatenate([np.flatnonzero(labels == each)[:PER_CLASS] for each in range(10)])
    images = pixels.reshape(-1, 28, 28)[rows]
    names = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
    return Examples(np.stack([_resized(each, size) for each in images]), labels[rows].astype(np.int64), names)


def handwritten_digits(root: Path, size: int) -> Examples:
    """Read scikit-learn's digits: handwritten, 8x8, bright on black (1 channel)."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = (digits.images * (255 / 16)).round().astype(np.uint8)
    names = tuple(str(each) for each in range(10))
    return Examples(np.stack([_resized(each, size) for each in images]), digits.target.astype(np.int64), names)


def letters(root: Path, size: int) -> Examples:
    """Draw a to j in the 465 decorative fonts of Brian Kent; a group is the family of a font."""
    fonts = sorted((root / "usr/share/fonts").rglob("aenigma/**/*.ttf"))
    images, labels, groups = [], [], []
    for label, letter in enumerate("abcdefghij"):
        for path in fonts:
            image = _glyph(path, letter, size)
            if image is not None:
                images.append(image)
                labels.append(label)
                groups.append(path.stem.lower()[:4])
    return Examples(np.stack(images), np.array(labels), tuple("abcdefghij"), tuple(groups))


def scripts(root: Path, size: int) -> Examples:
    """Draw letters of ten scripts in Noto Sans and Noto Serif; the class is the script, a group is a letter."""
    ranges = {
        "Arabic": (0x621, 0x64A),
        "Armenian": (0x531, 0x586),
        "Bengali": (0x985, 0x9B9),
        "Devanagari": (0x905, 0x939),
        "Ethiopic": (0x1200, 0x1357),
        "Georgian": (0x10D0, 0x10FA),
        "Hebrew": (0x5D0, 0x5EA),
        "Khmer": (0x1780, 0x17B3),
        "Malayalam": (0xD05, 0xD3A),
        "Thai": (0xE01, 0xE2E),
    }
    images, labels, groups = [], [], []
    for label, (script, (first, last)) in enumerate(ranges.items()):
        fonts = sorted((root / "usr/share/fonts/truetype/noto").glob(f"Noto*{script}-*.ttf"))
        for point in range(first, last + 1):
            for path in fonts:
                image = _glyph(path, chr(point), size)
                if image is not None:
                    images.append(image)
                    labels.append(label)
                    groups.append(chr(point))
    return _at_most(Examples(np.stack(images), np.array(labels), tuple(ranges), tuple(groups)))


def package_descriptions(root: Path, size: int) -> Examples:
    """Read the one-line descriptions of Debian's packages; the class is the section."""
    sections = ("admin", "games", "graphics", "mail", "math", "net", "science", "sound")
    listed = subprocess.run(["apt-cache", "dumpavail"], capture_output=True, text=True, check=True).stdout
    found: dict[str, set[str]] = {section: set() for section in sections}
    for entry in listed.split("\n\n"):
        fields = dict(line.partition(": ")[::2] for line in entry.splitlines() if line[:1] not in (" ", ""))
        text = fields.get("Description-en", fields.get("Description", "")).strip()
        section = fields.get("Section", "")
        if section in found and text and not re.search(r"transitional|dummy|metapackage", text):
            found[section].add(text)
    return _texts({section: sorted(texts) for section, texts in found.items()})


def fortunes(root: Path, size: int) -> Examples:
    """Read the sayings of `fortunes` of 20 to 240 characters, by category."""
    kinds = ("computers", "drugs", "education", "food", "law", "men-women", "politics", "sports")
    found = {}
    for kind in kinds:
        sayings = (root / "usr/share/games/fortunes" / kind).read_text(encoding="utf-8").split("\n%\n")
        cleaned = {" ".join(saying.split()) for saying in sayings}
        found[kind] = sorted(saying for saying in cleaned if 20 <= len(saying) <= 240)
    return _texts(found)


Reader = Callable[[Path, int], Examples]


def _texts(found: dict[str, list[str]]) -> Examples:
    texts = [text for each in found.values() for text in each]
    return _at_most(Examples(texts, _repeat([len(each) for each in found.values()]), tuple(found)))


def _images(files: dict[str, list[Path]], size: int) -> Examples:
    rng = np.random.default_rng(0)
    chosen = {kind: [paths[i] for i in rng.permutation(len(paths))[:PER_CLASS]] for kind, paths in files.items()}
    images, counts = [], []
    for paths in chosen.values():
        squares = [_square(image, size) for image in map(_opened, paths) if image is not None]
        images += squares
        counts.append(len(squares))
    return Examples(np.stack(images), _repeat(counts), tuple(files))


def _at_most(examples: Examples) -> Examples:
    """Keep at most `PER_CLASS` samples of each class."""
    rng = np.random.default_rng(0)
    rows = np.concatenate(
        [
            np.sort(rng.permutation(np.flatnonzero(examples.labels == each))[:PER_CLASS])
            for each in range(len(examples.classes))
        ]
    )
    values = examples.values
    return Examples(
        [values[row] for row in rows] if isinstance(values, list) else values[rows],
        examples.labels[rows],
        examples.classes,
        None if examples.groups is None else tuple(examples.groups[row] for row in rows),
    )


def _repeat(counts: Sequence[int]) -> NDArray[np.int64]:
    return np.repeat(np.arange(len(counts)), counts)


def _opened(path: Path) -> Image.Image | None:
    """Return the image on white, or None where the file is no image or has too many pixels."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            opened = Image.open(path)
        if opened.width * opened.height > MAX_PIXELS:
            return None
        image = opened.convert("RGBA")
    except (OSError, Image.DecompressionBombError):
        return None
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _square(image: Image.Image, size: int) -> NDArray[np.uint8]:
    """Return the image (3, size, size), with white added so that nothing is cut off."""
    side = max(image.size)
    canvas = Image.new("RGB", (side, side), "white")
    canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return np.asarray(canvas.resize((size, size), Image.Resampling.BICUBIC)).transpose(2, 0, 1)


def _resized(pixels: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    return np.asarray(Image.fromarray(pixels).resize((size, size), Image.Resampling.BILINEAR))[None]


def _glyph(font_file: Path, character: str, size: int) -> NDArray[np.uint8] | None:
    """Draw a character, bright on black, cropped to its ink; None where the font has no ink for it."""
    font = ImageFont.truetype(font_file, 2 * size)
    image = Image.new("L", (6 * size, 6 * size))
    ImageDraw.Draw(image).text((2 * size, 2 * size), character, font=font, fill=255)
    box = image.getbbox()
    if box is None or not _has_character(font_file, character):
        return None
    ink = image.crop(box)
    side = round(1.15 * max(ink.size))
    canvas = Image.new("L", (side, side))
    canvas.paste(ink, ((side - ink.width) // 2, (side - ink.height) // 2))
    return np.asarray(canvas.resize((size, size), Image.Resampling.BILINEAR))[None]


def _has_character(font_file: Path, character: str) -> bool:
    from matplotlib.ft2font import FT2Font

    return FT2Font(str(font_file)).get_char_index(ord(character)) != 0
