"""The set `digits`: real handwritten digits, rendered ones, and other characters as an eleventh class.

A split is made by one call: the caller splits the real digits and names those of each part, and everything else in
the part is made for it alone. So no stroke of a test digit reaches training.
"""

import zlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import attrs
import numpy as np
from numpy.typing import NDArray

from tuneforge.builtin.datasets.demo.bitmaps import Images, Integers
from tuneforge.builtin.datasets.demo.fonts import CHARACTERS, Font, find_fonts
from tuneforge.builtin.datasets.demo.glyphs import render
from tuneforge.builtin.datasets.demo.strokes import recombine

DIGITS = "0123456789"
OTHER = "other"

AMBIGUOUS = {
    "O": "0",
    "o": "0",
    "D": "0",
    "Q": "0",
    "I": "1",
    "l": "1",
    "i": "1",
    "J": "3",
    "j": "3",
    "Z": "2",
    "z": "2",
    "S": "5",
    "s": "5",
    "G": "6",
    "b": "6",
    "T": "7",
    "B": "8",
    "g": "9",
    "q": "9",
}
"""Letters left out of `other`, and the digit each cannot be told from at 8x8.

Size and slant are normalised away, so case and baseline do not help. Measured, for D I O S Z B g i l o s z: a support
vector machine that learns all 11 classes (120 renderings a character, 5 folds) calls more than 6 % of them a digit, or
more than a quarter of them lie as near to a digit as nine in ten digits lie to their nearest. For J j a small
convolutional network failed on 3 of 12 each. By eye, for G Q T b q: handwriting has 0, 6 and 9 like that, and the stem
of T ends up under the left end of its bar, as that of a 7 does, when the slant is taken away.
"""

SYMBOLS = "@#%*=<>~ΔΛΞΠΣΦΨαγηκλμπφψω∂∞≠±"
"""Signs drawn as `other` besides the letters. Left out: ? ! / | + by the same measurement, $ and & by eye."""

OTHER_CHARACTERS = "".join(c for c in CHARACTERS if c not in DIGITS and c not in AMBIGUOUS) + SYMBOLS
"""All characters that are drawn as `other`."""


@attrs.frozen(eq=False)
class DigitImages:
    """Images of digits and other characters.

    Args:
        images: `(n, 8, 8)`, ink of each 4x4 block of a 32x32 bitmap, 0 to 16.
        labels: `(n,)`, places in `class_names`.
        class_names: `0` to `9` and, where there are others, `other`.
        origins: `(n,)`: `real`, `rendered`, `letters`, `strokes` or `control`.
        ids: `(n,)`, a name for each image that stays the same from run to run, such as `real/17`.
        parents: `(n, 2)`, indices of the real digits an image is made of, itself if it is one; -1 where none.
    """

    images: Images
    labels: Integers
    class_names: tuple[str, ...]
    origins: NDArray[np.str_]
    ids: NDArray[np.str_]
    parents: Integers


@lru_cache(maxsize=1)
def real_digits() -> tuple[Images, Integers]:
    """The 1,797 handwritten digits that ship in scikit-learn: images `(1797, 8, 8)` and labels `(1797,)`, read-only.

    They are the test part of UCI's optdigits (E. Alpaydin and C. Kaynak, 1998).
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images, labels = bunch.images.astype(np.uint8), bunch.target.astype(np.int64)
    images.flags.writeable = labels.flags.writeable = False
    return images, labels


def digits_and_others(
    real_indices: Integers,
    *,
    other_share: float = 0.4,
    seed: int,
    split: str,
    rendered_share: float = 0.2,
    strokes_share: float = 0.4,
    folders: Sequence[Path] = (),
) -> DigitImages:
    """Make one split: these real digits, and for them rendered digits and others, in fixed shares.

    Without others there are no rendered digits either: they are there so that print does not mean `other`.

    Args:
        real_indices: The real digits of this split, places in `real_digits()`.
        other_share: Share of the class `other` in the whole; 0 leaves the real digits alone, in ten classes.
        seed: With `split` the only source of randomness.
        split: Name of the split, such as `train`: two of them with one seed share no drawn image.
        rendered_share: Share of rendered digits among the digits. They are of every family but the control's.
        strokes_share: Share of characters made of the real digits' strokes among the others. If the digits are too
            few for it, letters fill the rest.
        folders: Font folders besides matplotlib's.

    Raises:
        ValueError: A share is outside 0 <= share < 1 (`strokes_share` may be 1), or there are no real digits.
    """
    _check(real_indices, other_share, rendered_share, strokes_share)
    real = _real(real_indices, other_share > 0)
    if other_share == 0:
        return real
    num_rendered = round(len(real_indices) * rendered_share / (1 - rendered_share))
    num_others = round((len(real_indices) + num_rendered) * other_share / (1 - other_share))
    strokes = _strokes(round(num_others * strokes_share), real, seed, split)
    num_letters = num_others - len(strokes.images)
    fonts = find_fonts(folders)
    parts = [
        real,
        _drawn(num_rendered, DIGITS, f"rendered/{split}", seed, fonts),
        _drawn(num_letters, OTHER_CHARACTERS, f"letters/{split}", seed, fonts),
        strokes,
    ]
    return _joined(parts)


def control_digits(count: int = 500, *, seed: int) -> DigitImages:
    """Render digits in the family that neither training nor pretraining has seen: does print mean `other`?

    Args:
        count: How many, each digit as often as any other (give or take one).
        seed: The only source of randomness.
    """
    drawn = _drawn(count, DIGITS, "control", seed, find_fonts(held_out=True))
    return attrs.evolve(drawn, class_names=tuple(DIGITS))


def _check(real_indices: Integers, other_share: float, rendered_share: float, strokes_share: float) -> None:
    for name, share in (("other_share", other_share), ("rendered_share", rendered_share)):
        if not 0 <= share < 1:
            raise ValueError(f"{name} is {share}; it must be at least 0 and less than 1")
    if not 0 <= strokes_share <= 1:
        raise ValueError(f"strokes_share is {strokes_share}; it must be from 0 to 1")
    if not len(real_indices):
        raise ValueError("real_indices is empty; a split needs at least one real digit")


def _real(indices: Integers, with_others: bool) -> DigitImages:
    images, labels = real_digits()
    return DigitImages(
        images=images[indices],
        labels=labels[indices],
        class_names=(*DIGITS, OTHER) if with_others else tuple(DIGITS),
        origins=np.full(len(indices), "real"),
        ids=np.array([f"real/{index}" for index in indices]),
        parents=np.stack([indices, np.full(len(indices), -1)], axis=1).astype(np.int64),
    )


def _drawn(count: int, characters: str, stream: str, seed: int, fonts: Sequence[Font]) -> DigitImages:
    """Rendered characters, each of them once before any comes a second time, in random order."""
    rng = np.random.default_rng([seed, zlib.crc32(f"order/{stream}".encode())])
    rounds = [rng.permutation(list(characters)) for _ in range(-(-count // len(characters)))]
    drawn = np.concatenate([*rounds, np.zeros(0, np.str_)])[:count]
    images, _ = render(drawn, fonts, seed=seed, stream=stream)
    labels = [DIGITS.index(c) if c in DIGITS else len(DIGITS) for c in drawn.tolist()]
    return DigitImages(
        images=images,
        labels=np.array(labels, np.int64),
        class_names=(*DIGITS, OTHER),
        origins=np.full(count, stream.split("/")[0]),
        ids=np.array([f"{stream}/{c}/{i}" for i, c in enumerate(drawn.tolist())], np.str_),
        parents=np.full((count, 2), -1, np.int64),
    )


def _strokes(count: int, real: DigitImages, seed: int, split: str) -> DigitImages:
    rng = np.random.default_rng([seed, zlib.crc32(f"strokes/{split}".encode())])
    made = recombine(count, images=real.images, labels=real.labels, rng=rng)
    indices = real.parents[:, 0]
    return DigitImages(
        images=made.images,
        labels=np.full(len(made.images), len(DIGITS), np.int64),
        class_names=(*DIGITS, OTHER),
        origins=np.full(len(made.images), "strokes"),
        ids=np.array([f"strokes/{split}/{making}/{i}" for i, making in enumerate(made.making.tolist())], np.str_),
        parents=np.where(made.parents < 0, -1, indices[made.parents]),
    )


def _joined(parts: Sequence[DigitImages]) -> DigitImages:
    fields = {a.name: [getattr(part, a.name) for part in parts] for a in attrs.fields(DigitImages)}
    names = fields.pop("class_names")[0]
    return DigitImages(class_names=names, **{name: np.concatenate(arrays) for name, arrays in fields.items()})
