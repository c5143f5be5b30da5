"""Characters that are not digits, made of the strokes of real digits, which are cut, joined and rotated.

A model that has only learnt to tell print from handwriting fails on these: pen and preprocessing are those of the
digits. A real digit is known as 8x8 counts of ink only; `bitmaps` lays the ink out again so that the counts come
out as they were, the pieces are cut from that, and the result is size-normalized as the digits were.

Suffixes: n images, y x pixels.
"""

from collections.abc import Callable

import attrs
import numpy as np
from numpy.typing import NDArray

from characters.bitmaps import (
    Bools,
    Floats,
    Images,
    Integers,
    block_counts,
    bounds,
    deepest,
    distances,
)

_SIDE = 32
_MIDDLE = _SIDE // 2
_WIDTHS = 18, 23  # Least and most of what NIST's box of 20 and the slant taken away leave, in pixels.
_LEAST_INK = 60  # Of a piece, in pixels: a crumb says nothing.
_CANDIDATES = 3  # Made for each one wanted; the filter leaves more than half.
_MARGIN = 0.5  # Of the filter: real digits it has not seen reach 0 to +1.5, one in a hundred less.


@attrs.frozen(eq=False)
class StrokeImages:
    """Characters made of strokes.

    Args:
        images: `(n, 8, 8)`, 0 to 16.
        parents: `(n, 2)`, places of the digits each is made of among those given; -1 where there is no second.
        transforms: `(n,)`, how each was made: a key of `TRANSFORMS`.
    """

    images: Images
    parents: Integers
    transforms: NDArray[np.str_]

    def __getitem__(self, chosen: Integers | Bools | slice) -> "StrokeImages":
        return StrokeImages(self.images[chosen], self.parents[chosen], self.transforms[chosen])


def recombine(count: int, *, images: Images, labels: Integers, rng: np.random.Generator) -> StrokeImages:
    """Make up to `count` characters of the digits' strokes that do not look like a digit.

    A support vector machine decides. It learns to tell the given digits from what is not a digit by construction
    (flipped, rotated by 90 or 180 degrees), and what it is not sure of is left out. The digits it learns from have been
    resampled in the same way, so that the resampling gives nothing away.

    Args:
        count: How many are wanted; fewer come back if the digits are very few.
        images: The digits `(n, 8, 8)`, 0 to 16; nothing else goes into the result.
        labels: What digits they are `(n,)`.
        rng: The only source of randomness.
    """
    made = make(count * _CANDIDATES, images=images, labels=labels, rng=rng)
    sure = made[np.isin(made.transforms, [name for name, transform in TRANSFORMS.items() if transform.sure])]
    if not len(sure.images):
        return made[:0]
    return made[np.flatnonzero(digit_margin(made.images, images, sure.images) < -_MARGIN)[:count]]


def make(count: int, *, images: Images, labels: Integers, rng: np.random.Generator) -> StrokeImages:
    """Make `count` characters, or a few less, by each of `TRANSFORMS` in turn, without the filter."""
    masks_nyx = bitmaps(images)
    names = list(TRANSFORMS)
    made: list[tuple[Bools, tuple[int, int], str]] = []
    for i in range(count):
        name = names[i % len(names)]
        parents = _parents(labels, TRANSFORMS[name], rng)
        if parents is not None:
            mask = TRANSFORMS[name].make(masks_nyx[parents[0]], masks_nyx[parents[1]], rng)
            made.append((mask, parents, name))
    made = [entry for entry in made if entry[0].sum() >= _LEAST_INK]
    masks = np.array([entry[0] for entry in made], bool).reshape(-1, _SIDE, _SIDE)
    places = np.array([entry[1] for entry in made], np.int64).reshape(-1, 2)
    ink = masks_nyx.sum(axis=(1, 2))[places[:, 0]]
    return StrokeImages(normalized(masks, ink), places, np.array([entry[2] for entry in made], np.str_))


def digit_margin(images: Images, digits: Images, others: Images) -> NDArray[np.float64]:
    """How surely each image `(n, 8, 8)` is a digit: above 0 it looks like `digits`, below like `others`."""
    from sklearn.svm import SVC

    handled = normalized(bitmaps(digits), digits.sum(axis=(1, 2)))
    known = _points(np.concatenate([digits, handled, others]))
    answers = np.arange(len(known)) < 2 * len(digits)
    machine = SVC(C=10, gamma=0.1, class_weight="balanced").fit(known, answers)
    margins: NDArray[np.float64] = machine.decision_function(_points(images)) if len(images) else np.zeros(0)
    return margins


def bitmaps(images: Images) -> Bools:
    """Lay out the ink of 8x8 counts in 32x32 pixels: smooth across the blocks, and each block's count as it was."""
    places = (np.arange(_SIDE) + 0.5) / 4 - 0.5
    weights = np.exp(-((places[:, None] - np.arange(8)) ** 2) / (2 * 0.6**2))
    weights /= weights.sum(axis=1, keepdims=True)
    smooth = weights @ images.astype(np.float64) @ weights.T
    blocks = smooth.reshape(-1, 8, 4, 8, 4).swapaxes(2, 3).reshape(-1, 64, 16)
    order = np.argsort(np.argsort(-blocks, axis=2, kind="stable"), axis=2, kind="stable")
    ink = order < images.reshape(-1, 64, 1)
    return ink.reshape(-1, 8, 8, 4, 4).swapaxes(2, 3).reshape(-1, _SIDE, _SIDE)


def normalized(masks_nyx: Bools, ink_n: NDArray[np.integer]) -> Images:
    """Stretch each mask to the height of the bitmap, bring it to its ink in pixels, and count blocks: `(n, 8, 8)`."""
    depth = distances(~masks_nyx) - distances(masks_nyx)
    top, bottom, left, right = bounds(masks_nyx)
    least = np.minimum(_WIDTHS[0], np.float32(1.6) * (right - left))
    width = (right - left).clip(least, _WIDTHS[1])
    pixels = np.arange(_SIDE, dtype=np.float32) + np.float32(0.5)
    y_ny = top[:, None] + pixels * ((bottom - top) / _SIDE)[:, None] - np.float32(0.5)
    x_nx = (left + right)[:, None] / 2 + (pixels - _MIDDLE) * ((right - left) / width)[:, None] - np.float32(0.5)
    return block_counts(deepest(_resampled(depth, y_ny, x_nx), ink_n))


def _points(images: Images) -> NDArray[np.float64]:
    return images.reshape(-1, 64) / 16


def _resampled(fields_nyx: Floats, y_ny: Floats, x_nx: Floats) -> Floats:
    """Values between pixels, by bilinear interpolation; outside, those of the border less the distance to it."""
    inside_y, inside_x = y_ny.clip(0, _SIDE - 1), x_nx.clip(0, _SIDE - 1)
    rows, columns = _hats(inside_y), _hats(inside_x)
    outside = np.abs(y_ny - inside_y)[:, :, None] + np.abs(x_nx - inside_x)[:, None, :]
    values: Floats = (rows @ fields_nyx @ columns.swapaxes(1, 2) - outside).astype(np.float32)
    return values


def _hats(places: Floats) -> Floats:
    """Weight `(n, places, pixels)` of each pixel at each place."""
    weights: Floats = np.maximum(0, 1 - np.abs(places[:, :, None] - np.arange(_SIDE, dtype=np.float32)))
    return weights


# -- transforms ------------------------------------------------------------------------------------------------


@attrs.frozen
class Transform:
    """One way to make a character out of the strokes of digits.

    Args:
        make: From two masks `(32, 32)` and a generator, the new mask.
        digits: Those it may be done to (the first of the two).
        parents: How many digits it takes, 1 or 2.
        sure: Whether the result is not a digit by construction.
    """

    make: Callable[[Bools, Bools, np.random.Generator], Bools]
    digits: str
    parents: int
    sure: bool


def _parents(labels: Integers, transform: Transform, rng: np.random.Generator) -> tuple[int, int] | None:
    """Rows of a digit that the transform takes and of one of another class if it takes two; None if there are none."""
    fit = np.flatnonzero(np.isin(labels, [int(digit) for digit in transform.digits]))
    if not len(fit):
        return None
    first = int(rng.choice(fit))
    if transform.parents == 1:
        return first, -1
    unlike = np.flatnonzero(labels != labels[first])
    return (first, int(rng.choice(unlike))) if len(unlike) else None


def _swap_halves(a: Bools, b: Bools, rng: np.random.Generator) -> Bools:
    """The bottom of one digit over the top of another."""
    cut = rng.integers(13, 20)
    return np.concatenate([a[cut:], b[:cut]])


def _back_to_back(a: Bools, b: Bools, rng: np.random.Generator) -> Bools:
    """The right of one digit, and to its right the left of another."""
    half = int(rng.integers(8, 11))
    joined = np.concatenate([a[:, _MIDDLE : _MIDDLE + half], b[:, _MIDDLE - half : _MIDDLE]], axis=1)
    return np.pad(joined, ((0, 0), (_MIDDLE - half, _MIDDLE - half)))


def _rotate_bottom(a: Bools, b: Bools, rng: np.random.Generator) -> Bools:
    """The top of one digit over a half of another that lies on its side."""
    cut = rng.integers(13, 20)
    return np.concatenate([a[:cut], _rotate_90(b, a, rng)[cut:]])


def _flip_bottom(a: Bools, b: Bools, rng: np.random.Generator) -> Bools:
    """The top of one digit over the bottom of another, flipped."""
    cut = rng.integers(13, 20)
    return np.concatenate([a[:cut], b[cut:, ::-1]])


def _cut_off(a: Bools, b: Bools, rng: np.random.Generator) -> Bools:
    """A digit without what lies on one side of a line near its middle."""
    angle, offset = rng.uniform(0, 2 * np.pi), rng.uniform(-3, 4)
    places = np.arange(_SIDE) - (_SIDE - 1) / 2
    kept: Bools = np.add.outer(np.sin(angle) * places, np.cos(angle) * places) < offset
    return a & kept


def _flip(a: Bools, b: Bools, rng: np.random.Generator) -> Bools:
    """A digit flipped."""
    return a[:, ::-1]


def _rotate_180(a: Bools, b: Bools, rng: np.random.Generator) -> Bools:
    """A digit turned by half a turn."""
    return a[::-1, ::-1]


def _rotate_90(a: Bools, b: Bools, rng: np.random.Generator) -> Bools:
    """A digit turned by a quarter, one way or the other."""
    return np.rot90(a, 1 if rng.random() < 0.5 else 3)


TRANSFORMS: dict[str, Transform] = {
    "swap-halves": Transform(_swap_halves, "0123456789", 2, sure=False),
    "back-to-back": Transform(_back_to_back, "023456789", 2, sure=False),
    "rotate-bottom": Transform(_rotate_bottom, "0123456789", 2, sure=False),
    "flip-bottom": Transform(_flip_bottom, "0123456789", 2, sure=False),
    "cut-off": Transform(_cut_off, "023456789", 1, sure=False),
    # 2 and 5 resemble each other when flipped; 0, 1 and 8 hardly change.
    "flip": Transform(_flip, "34679", 1, sure=True),
    # 0, 1, 2, 5 and 8 hardly change, 6 and 9 change places.
    "rotate-180": Transform(_rotate_180, "347", 1, sure=True),
    # 0 stays a ring, 1 fills the box, 8 is left with its two rings.
    "rotate-90": Transform(_rotate_90, "2345679", 1, sure=True),
}
"""The transforms a character that is no digit, by name."""
