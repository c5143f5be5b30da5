"""Images of digits and other characters: those that ship, random distortions of them, and those of other fonts.

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
"""The 62 classes of `glyphs`, each named by itself."""

CHARACTER_IMAGES = Path(__file__).with_name("character_images.safetensors")
"""The rendered characters, drawn by `examples/render_characters.py`."""

MEAN_INK = 312.6
"""Ink of a real digit, in pixels of the 32x32 bitmap."""

_BOX = Image.Resampling.BOX
_SIDE = 32
_BATCH = 1024  # Images distorted at a time, which bounds the memory.
_HELD_OUT_FAMILIES = ("stix", "xits")  # The control digits are of this family and its fork.
# Standard deviations in half heights of the image: width, shear and shift; vertical shear; ink, as a share; elastic.
_SPREADS = (0.035, 0.05, 0.02, 0.035, 0.0, 0.0, 0.056, *[0.035] * 2 * 4 * 4)


@attrs.frozen(eq=False)
class CharacterImages:
    """The rendered characters that ship.

    Args:
        glyphs: `(62, instances, families, 8, 8)`, the characters of `CHARACTERS` for the data source `glyphs`.
        digits: `(10, instances, 8, 8)`, digits in the same fonts for `digits`.
        others: `(characters, instances, 8, 8)`, letters and symbols that 8x8 pixels can tell from digits.
        control: `(10, instances, 8, 8)`, digits in a font family that none of the others is drawn in.
        strokes: `(n, 8, 8)`, characters that are no digits, made by cutting, joining and turning real digits.
        sources: `(n, 2)`, the real digits that each of `strokes` is made of; -1 where there is no second.
        transforms: `(n,)`, how each of `strokes` was made, an index into `transform_shares`.
        families: The font families of `glyphs`, and the number of styles of each.
        other_characters: The characters of `others`.
        transform_shares: Share that each transform has among the strokes of a split, by its name.
        versions: Of the packages that drew the file.
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
    """Read the shipped file. It holds each array of images compressed with zlib, and its shape in the metadata."""
    tensors, metadata = load_tensors(CHARACTER_IMAGES)
    arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in tensors.items()}
    for name, shape in metadata.pop("shapes").items():
        arrays[name] = np.frombuffer(zlib.decompress(arrays[name].tobytes()), np.uint8).reshape(shape)
    return CharacterImages(**arrays, **metadata)


@lru_cache(maxsize=1)
def real_digits() -> tuple[InkCounts, Integers]:
    """The 1,797 handwritten digits that ship in scikit-learn: images `(1797, 8, 8)` and labels `(1797,)`, read-only.

    They are the test part of UCI's optdigits (E. Alpaydin and C. Kaynak, 1998).
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images, labels = bunch.images.astype(np.uint8), bunch.target.astype(np.int64)
    images.flags.writeable = labels.flags.writeable = False
    return images, labels


def distort(images: InkCounts, rng: Generator, *, strength: float = 1.0, ink: float | None = None) -> InkCounts:
    """Random variants of images: slightly sheared, scaled, shifted and elastically bent.

    Elastic: P. Simard, D. Steinkraus and J. Platt, Best practices for convolutional neural networks applied to visual
    document analysis, 2003.

    Args:
        images: `(n, 8, 8)`.
        rng: The only source of randomness. An image's variant does not depend on how many follow it.
        strength: Multiplies all spreads.
        ink: Mean ink of the variants in pixels; None keeps the ink of each image, give or take a few percent.

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
    # A bitmap with the counts of the image: only so is a variant as sharp as its original.
    smooth = F.interpolate(counts, size=_SIDE, mode="bicubic")
    bitmap = F.fold((_ranks(F.unfold(smooth, 4, stride=4)) < counts.flatten(2)).float(), _SIDE, 4, stride=4)
    bent = F.grid_sample(bitmap + smooth / 50, affine + bend, align_corners=False).flatten(1)
    num_pixels = (counts.sum((1, 2, 3)) if mean_ink is None else mean_ink) * (1 + normal[:, 6])
    variants: InkCounts = _ranks(bent).lt(num_pixels[:, None]).reshape(count, 8, 4, 8, 4).sum((2, 4)).byte().numpy()
    return variants


def _ranks(values: Tensor) -> Tensor:
    """Rank of each value along dimension 1, 0 for the largest."""
    order = values.argsort(dim=1, descending=True, stable=True)
    places = torch.arange(values.shape[1]).reshape(-1, *[1] * (values.ndim - 2))
    return torch.empty_like(order).scatter_(1, order, places.expand_as(order))


def render_families(folders: Sequence[Path]) -> dict[str, InkCounts]:
    """Render the 62 characters in the fonts of some folders: `(62, styles, 8, 8)` for each family.

    Fonts that lack one of the characters, that ship in matplotlib, or that are of the control digits' family are left
    out.

    Args:
        folders: Searched with their subfolders for `.ttf` and `.otf` files.

    Raises:
        DataError: A folder does not exist, or a font draws nothing for a character.
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
    """The 62 characters in one font, each as high as the image and at most 20/32 as wide, as NIST scales them."""
    font = ImageFont.truetype(str(path), 120)
    images = []
    for character in CHARACTERS:
        sheet = Image.new("L", (480, 480))
        ImageDraw.Draw(sheet).text((240, 240), character, fill=255, font=font, anchor="mm")
        box = sheet.getbbox()
        if box is None:
            fix = "take the font out of the folder"
            raise DataError(f"'{path}' draws nothing for '{character}'", where="--data.fonts", fix=fix)
        # Characters narrower than 0.45 of their height (1, l) keep their proportion.
        width = max(2, round(20 * min(1.0, (box[2] - box[0]) / (box[3] - box[1]) / 0.45)))
        left = (width - _SIDE) // 2
        bitmap = sheet.crop(box).resize((width, _SIDE), _BOX).crop((left, 0, left + _SIDE, _SIDE))
        images.append(np.rint(np.asarray(bitmap.resize((8, 8), _BOX)) / 255 * 16))
    return np.stack(images).astype(np.uint8)
