"""Real digits that a model has not seen, in the training domain and in shifted ones."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

import tuneforge as tf
from tuneforge.builtin.datasets.demo.digit_images import CHARACTERS, character_images, real_digits

Sample = tuple[bytes, str]
NEW_CLASS = "A"


def plain(counts: np.ndarray, side: int = 8) -> Image.Image:
    """Return light ink on dark, as in the training data, from ink counts (8, 8)."""
    small = Image.fromarray((counts * 15.9375).astype(np.uint8))
    return small if side == 8 else small.resize((side, side), Image.Resampling.BICUBIC)


def inverted(counts: np.ndarray) -> Image.Image:
    """Return dark ink on light."""
    return Image.fromarray(255 - np.asarray(plain(counts)))


def rotated(counts: np.ndarray) -> Image.Image:
    """Return the digit rotated by 40 degrees."""
    return plain(counts, 32).rotate(40)


def new_pen(counts: np.ndarray) -> Image.Image:
    """Return the digit written with a much broader pen."""
    return plain(counts, 64).filter(ImageFilter.MaxFilter(13))


class Production:
    """The samples of production, each digit once per domain.

    Args:
        base: The run whose training, validation and test digits are excluded.
    """

    def __init__(self, base: Path) -> None:
        data = tf.load(base).with_data().data
        used = {split.id_of(row) for split in data.splits().values() for row in range(len(split))}
        self.images, self.labels = real_digits()
        free = [index for index in range(len(self.labels)) if f"real/{index}" not in used]
        self.free = np.random.default_rng(0).permutation(free)

    def digits(self, domain: Callable[[np.ndarray], Image.Image], start: int, stop: int) -> list[Sample]:
        """Return some of the unused digits in a domain."""
        return [(_png(domain(self.images[index])), str(self.labels[index])) for index in self.free[start:stop]]

    def letters(self, start: int, stop: int) -> list[Sample]:
        """Return samples of a new class: a letter in many fonts."""
        drawn = character_images().glyphs[CHARACTERS.index(NEW_CLASS)].reshape(-1, 8, 8)
        return [(_png(plain(each)), NEW_CLASS) for each in drawn[start:stop]]


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()
