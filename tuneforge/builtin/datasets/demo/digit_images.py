"""Shipped images of digits and other characters, random distortions of them, and rendering of other fonts.

An image is uint8 (8, 8): the ink of each 4x4 block of a 32x32 bitmap, 0 to 16, as in UCI's optdigits.
"""

import string
import zlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeAlias

import attrs
import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

from tuneforge import DataError
from tuneforge.exporting import load_tensors

InkCounts: TypeAlias = NDArray[np.uint8]
Integers: TypeAlias = NDArray[np.int64]
Names: TypeAlias = NDArray[np.str_]

DIGITS = string.digits
CHARACTERS = DIGITS + string.ascii_uppercase + string.ascii_lowercase
"""The 62 classes of `glyphs`."""

CHARACTER_IMAGES = Path(__file__).with_name("character_images.safetensors")
"""The rendered characters, drawn by `examples/render_characters.py`."""

MEAN_INK = 312.6
"""Ink of a real digit, in pixels of the 32x32 bitmap."""

_BOX = Image.Resampling.BOX
_SIDE = 32
_BATCH = 1024  # Images distorted at a time, which bounds the memory.
_HELD_OUT_FAMILIES = ("stix", "xits")  # Families of the control digits: STIX and its fork.
# Standard deviations in half heights of the image: width, shear and shift; vertical shear; relative ink; elastic.
_SPREADS = (0.035, 0.05, 0.02, 0.035, 0.0, 0.0, 0.056, *[0.035] * 2 * 4 * 4)


@attrs.frozen(eq=False)
class CharacterImages:
    """The shipped characters.

    Args:
        glyphs: `(62, instances, families, 8, 8)`, the characters of `CHARACTERS` for the data source `glyphs`.
        digits: `(10, instances, 8, 8)`, digits in the same fonts for `digits`.
        others: `(characters, instances, 8, 8)`, letters and symbols that differ from digits at 8x8 pixels.
        control: `(10, instances, 8, 8)`, digits in a font family of no other array.
        strokes: `(n, 8, 8)`, characters other than digits, made by cutting, joining and rotating real digits.
        sources: `(n, 2)`, the real digits that each of `strokes` is composed of; -1 for no second one.
        transforms: `(n,)`, transform of each of `strokes`, an index into `transform_shares`.
        families: Number of styles of each font family of `glyphs`.
        other_characters: The characters of `others`.
        transform_shares: Fraction of each transform among the strokes of a split.
        versions: Versions of the packages that rendered the file.
    """

    glyphs: InkCounts
    digits: InkCounts
    others: InkCounts
    control: InkCounts
    strokes: InkCounts
    sources: Integers
    transforms: Integers
    families: dict[str, int]
    other_characters: str
    transform_shares: dict[str, float]
    versions: dict[str, str]


@lru_cache(maxsize=1)
def character_images() -> CharacterImages:
    """Read the shipped file, in which arrays of images are zlib-compressed and have their shapes in the metadata."""
    tensors, metadata = load_tensors(CHARACTER_IMAGES)
    arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in tensors.items()}
    for name, shape in metadata.pop("shapes").items():
        arrays[name] = np.frombuffer(zlib.decompress(arrays[name].tobytes()), np.uint8).reshape(shape)
    return CharacterImages(**arrays, **metadata)


@lru_cache(maxsize=1)
def real_digits() -> tuple[InkCounts, Integers]:
    """Return the 1,797 handwritten digits of scikit-learn: images `(1797, 8, 8)` and labels `(1797,)`, read-only.

    They are the test part of UCI's optdigits (E. Alpaydin and C. Kaynak, 1998).
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images, labels = bunch.images.astype(np.uint8), bunch.target.astype(np.int64)
    images.flags.writeable = labels.flags.writeable = False
    return images, labels


def distort(images: InkCounts, rng: Generator, *, strength: float = 1.0, ink: float | None = None) -> InkCounts:
    """Distort images at random: shear, scale, shift and elastic deformation, all slight.

    Elastic: P. Simard, D. Steinkraus and J. Platt, Best practices for convolutional neural networks applied to visual
    document analysis, 2003.

    Args:
        images: `(n, 8, 8)`.
        rng: The only source of randomness. The result for an image does not depend on how many follow it.
        strength: Multiplies all spreads.
        ink: Mean ink of the results, in pixels; None keeps the ink of each image, within a few percent.

    Returns:
        `(n, 8, 8)`.
    """
    batches = [_distort(images[i : i + _BATCH], rng, strength, ink) for i in range(0, len(images), _BATCH)]
    return np.concatenate([images[:0], *batches])


def _distort(images: InkCounts, rng: Generator, strength: float, mean_ink: float | None) -> InkCounts:
    count = len(images)
    normal = torch.from_numpy(rng.standard_normal((count, len(_SPREADS)), dtype=np.float32).clip(-2.5, 2.5))
    normal *= torch.tensor(_SPREADS) * strength
    matrices = torch.eye(2, 3) + normal[:, :6].reshape(count, 2, 3)
    affine = F.affine_grid(matrices, [count, 1, _SIDE, _SIDE], align_corners=False)
    bend = F.interpolate(normal[:, 7:].reshape(count, 2, 4, 4), size=_SIDE, mode="bicubic").permute(0, 2, 3, 1)
    counts = torch.from_numpy(images[:, None].astype(np.float32))
    # A bitmap with the counts of the image, because interpolated counts would blur the result.
    smooth = F.interpolate(counts, size=_SIDE, mode="bicubic")
    bitmap = F.fold((_ranks(F.unfold(smooth, 4, stride=4)) < counts.flatten(2)).float(), _SIDE, 4, stride=4)
    bent = F.grid_sample(bitmap + smooth / 50, affine + bend, align_corners=False).flatten(1)
    num_pixels = (counts.sum((1, 2, 3)) if mean_ink is None else mean_ink) * (1 + normal[:, 6])
    variants: InkCounts = _ranks(bent).lt(num_pixels[:, None]).reshape(count, 8, 4, 8, 4).sum((2, 4)).byte().numpy()
    return variants


def _ranks(values: Tensor) -> Tensor:
    """Return the rank of each value along dimension 1, 0 for the largest."""
    order = values.argsort(dim=1, descending=True, stable=True)
    places = torch.arange(values.shape[1]).reshape(-1, *[1] * (values.ndim - 2))
    return torch.empty_like(order).scatter_(1, order, places.expand_as(order))


def render_families(folders: Sequence[Path]) -> dict[str, InkCounts]:
    """Render the 62 characters in the fonts of folders: `(62, styles, 8, 8)` for each family.

    Fonts that lack a character, ship with matplotlib, or belong to the family of the control digits are skipped.

    Args:
        folders: Folders, searched recursively for `.ttf` and `.otf` files.

    Raises:
        DataError: A folder does not exist, or a character is empty in a font.
    """
    from matplotlib import get_data_path
    from matplotlib.ft2font import FT2Font

    shipped = {path.name for path in (Path(get_data_path()) / "fonts" / "ttf").iterdir()}
    styles: dict[str, list[InkCounts]] = {}
    for folder in folders:
        if not folder.is_dir():
            fix = "name a folder of .ttf or .otf files"
            raise DataError(f"the font folder '{folder}' does not exist", where="--data.fonts", fix=fix)
        for path in sorted(path for path in folder.rglob("*") if path.suffix.lower() in {".ttf", ".otf"}):
            font = FT2Font(str(path))
            family = font.family_name
            held_out = path.name in shipped or family.lower().startswith(_HELD_OUT_FAMILIES)
            if not held_out and set(map(ord, CHARACTERS)) <= font.get_charmap().keys():
                styles.setdefault(family, []).append(_render(path))
    return {family: np.stack(images, axis=1) for family, images in sorted(styles.items())}


def _render(path: Path) -> InkCounts:
    """Render the 62 characters in a font, each as high as the image and at most 20/32 as wide, as NIST does."""
    font = ImageFont.truetype(str(path), 120)
    images = []
    for character in CHARACTERS:
        sheet = Image.new("L", (480, 480))
        ImageDraw.Draw(sheet).text((240, 240), character, fill=255, font=font, anchor="mm")
        box = sheet.getbbox()
        if box is None:
            fix = "remove the font from the folder"
            raise DataError(f"'{path}' has an empty glyph for '{character}'", where="--data.fonts", fix=fix)
        # Characters narrower than 0.45 of their height (1, l) keep their proportion.
        width = max(2, round(20 * min(1.0, (box[2] - box[0]) / (box[3] - box[1]) / 0.45)))
        left = (width - _SIDE) // 2
        bitmap = sheet.crop(box).resize((width, _SIDE), _BOX).crop((left, 0, left + _SIDE, _SIDE))
        images.append(np.rint(np.asarray(bitmap.resize((8, 8), _BOX)) / 255 * 16))
    return np.stack(images).astype(np.uint8)
